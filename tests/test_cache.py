"""Compiled kernels on disk: the next process finds them, a changed rule does not, and no home is too poor."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from child import PACKAGE_ROOT, output, start

#: Steps of one optimizer or several; prints what was compiled, what was found, the result, and the folder.
PROGRAM = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import torch
    import fusedopt
    from compilations import cache_hits, cache_misses
    from fusedopt.kernels.source import cache_directory
    param = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    param.grad = torch.linspace(1, 3, 9)
    for name in sys.argv[1:]:
        getattr(fusedopt, name)([param], lr=0.1).step()
    print(cache_misses(), cache_hits(), param.double().sum().item(), cache_directory(), sep="\\n")
"""


class Run:
    """One process that stepped, and what it said."""

    def __init__(self, text):
        misses, hits, self.result, folder = text.split("\n")[:4]
        self.compiled, self.found, self.folder = int(misses), int(hits), Path(folder)


def steps(*names, **environment):
    return Run(output(PROGRAM, *names, **environment))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_second_process_finds_what_the_first_compiled(tmp_path):
    first = steps("SGD", "AdamW", FUSEDOPT_CACHE_DIR=str(tmp_path))
    assert (first.compiled, first.found) == (2, 0)
    assert first.folder == tmp_path
    files = contents(tmp_path)
    assert files
    second = steps("SGD", "AdamW", FUSEDOPT_CACHE_DIR=str(tmp_path))
    assert (second.compiled, second.found) == (0, 2)
    assert second.result == first.result
    assert contents(tmp_path) == files


def test_changed_rule_and_changed_runtime_are_compiled_anew(tmp_path):
    package, cache = tmp_path / "package", str(tmp_path / "cache")
    shutil.copytree(PACKAGE_ROOT / "fusedopt", package / "fusedopt", ignore=shutil.ignore_patterns("__pycache__"))

    def run():
        return steps("SGD", "AdamW", FUSEDOPT_CACHE_DIR=cache, PYTHONPATH=str(package), PYTHONDONTWRITEBYTECODE="1")

    def edit(name, old, new):
        path = package / "fusedopt" / "kernels" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), encoding="utf-8")

    first = run()
    assert (first.compiled, first.found) == (2, 0)
    # Of equal length, so that size and (within a second) time of the file tell nothing.
    edit("rules.py", "return (p - lr * g,)", "return (p + lr * g,)")
    changed = run()
    assert (changed.compiled, changed.found) == (1, 1)  # gradient descent anew, AdamW as before
    assert changed.result != first.result
    edit("rules.py", "return (p + lr * g,)", "return (p - lr * g,)")
    again = run()
    assert (again.compiled, again.found) == (0, 2)
    assert again.result == first.result
    edit("cpu_runtime.py", "return x != 0", "return x == 0")  # decides whether there is a weight decay
    runtime = run()
    assert (runtime.compiled, runtime.found) == (2, 0)
    assert runtime.result != first.result


HOMES = {
    "home cannot be made": {"HOME": "/dev/null/home"},
    "home is unknown": {"HOME": ""},
    "wanted folder cannot be made": {"FUSEDOPT_CACHE_DIR": "/dev/null/cache"},
}


@pytest.mark.skipif(sys.platform == "win32", reason="the paths are those of POSIX systems")
@pytest.mark.parametrize("home", HOMES.values(), ids=HOMES.keys())
def test_steps_without_a_cache_folder_and_leaves_nothing_behind(home, tmp_path):
    # Empty strings are no folders: relative paths would fill the working directory.
    before = set(Path.cwd().iterdir())
    found = steps("SGD", TMPDIR=str(tmp_path), **{"FUSEDOPT_CACHE_DIR": None, "XDG_CACHE_HOME": None, **home})
    assert found.compiled + found.found == 1
    assert set(Path.cwd().iterdir()) == before
    if found.folder.is_relative_to(tmp_path):
        assert list(tmp_path.glob("fusedopt*")) == []  # its folder is gone with it
    else:
        assert home == HOMES["home is unknown"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="only an ordinary user can be kept from writing")
def test_steps_with_a_read_only_home(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    found = steps("SGD", HOME=str(home), FUSEDOPT_CACHE_DIR=None, XDG_CACHE_HOME=None)
    assert found.compiled == 1


def test_default_folder_is_the_users_cache(tmp_path):
    environment = {"HOME": str(tmp_path), "FUSEDOPT_CACHE_DIR": None, "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    if sys.platform != "linux":
        pytest.skip("XDG_CACHE_HOME is for Linux")
    found = steps("SGD", **environment)
    assert found.folder == tmp_path / "xdg" / "fusedopt"
    assert found.folder.stat().st_mode & 0o077 == 0  # code is imported from it: nobody else may write there


def test_processes_that_start_at_once_on_an_empty_cache(tmp_path):
    processes = [start(PROGRAM, "SGD", FUSEDOPT_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    outputs = [(process.communicate(), process.returncode) for process in processes]
    assert all(status == 0 for _, status in outputs), outputs
    results = {Run(out).result for (out, _), _ in outputs}
    assert len(results) == 1
    assert not list(tmp_path.rglob("*.tmp"))
    later = steps("SGD", FUSEDOPT_CACHE_DIR=str(tmp_path))
    assert (later.compiled, later.found) == (0, 1)
    assert {later.result} == results


def test_damaged_files_are_made_anew(tmp_path):
    """A full disk, or a process that was killed: files of zero bytes, and halves of files."""
    first = steps("SGD", FUSEDOPT_CACHE_DIR=str(tmp_path))
    files = [tmp_path / name for name in contents(tmp_path)]
    for path in files:
        if path.suffix == ".py":
            path.write_bytes(b"")
        else:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    repaired = steps("SGD", FUSEDOPT_CACHE_DIR=str(tmp_path))
    assert repaired.compiled == 1
    assert repaired.result == first.result
    assert steps("SGD", FUSEDOPT_CACHE_DIR=str(tmp_path)).found == 1
