"""Tests marked `compiled` need what Triton compiles, and its interpreter is on or off for a whole process: they run in another.

A file is marked as a whole. Where the interpreter is on, the first of its tests starts one child for all of them, whose reports
stand in for theirs. Where it is off, they run as any others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

REPORTS = "COMPILED_TEST_REPORTS"
OPTION = "--gpu-proof"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="run the whole proof of the GPU kernels, not only its quick part")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compiled: needs Triton's compiler instead of its interpreter; whole files only")
    config.addinivalue_line("markers", f"proof: belongs to the whole proof of the GPU kernels, which {OPTION} runs")
    if REPORTS in os.environ:
        config.pluginmanager.register(_Reporter(config, Path(os.environ[REPORTS])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption(OPTION):
        # A GPU runs in seconds what takes minutes to execute.
        left_out = [item for item in items if item.get_closest_marker("proof") and not _has_its_gpu(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _has_its_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None and torch.cuda.is_available()


def runs_elsewhere(item: pytest.Item) -> bool:
    return item.get_closest_marker("compiled") is not None and os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not runs_elsewhere(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


class _Reporter:
    """Writes the reports of a child."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


_FOUND = pytest.StashKey[dict[str, list[pytest.TestReport]]]()
_OUTPUT = pytest.StashKey[str]()


def _reports(item: pytest.Item) -> list[pytest.TestReport]:
    config = item.config
    if _FOUND not in config.stash:
        config.stash[_FOUND] = _run([each.nodeid for each in item.session.items if runs_elsewhere(each)], config)
    found = config.stash[_FOUND].get(item.nodeid, [])
    if [report.when for report in found][-1:] == ["teardown"]:
        return found
    text = f"the process that ran it ended early:\n{config.stash[_OUTPUT]}"
    return [*found, pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")]


def _run(names: list[str], config: pytest.Config) -> dict[str, list[pytest.TestReport]]:
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder) / "reports"
        reports.touch()
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", OPTION, *names]
        environment = {**os.environ, "TRITON_INTERPRET": "0", REPORTS: str(reports)}
        done = subprocess.run(command, cwd=config.rootpath, env=environment, capture_output=True, text=True)
        lines = reports.read_text(encoding="utf-8").splitlines()
    config.stash[_OUTPUT] = done.stdout[-4000:] + done.stderr[-4000:]
    found: dict[str, list[pytest.TestReport]] = {}
    for line in lines:
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        if isinstance(report.longrepr, list):  # of a skip, which JSON knows no tuple for
            report.longrepr = tuple(report.longrepr)
        found.setdefault(report.nodeid, []).append(report)
    return found
