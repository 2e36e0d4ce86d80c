"""`python -m fusedopt info`: each finding and its remedy, and the command line around it."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

import child
import fusedopt
from fusedopt import __main__, info


def found(findings: list[info.Finding], name: str) -> info.Finding:
    (finding,) = (finding for finding in findings if finding.name == name)
    return finding


def missing_part() -> str:
    return info.report().partition("Missing, and how to get it")[2]


@pytest.mark.parametrize("name", ["torch", "numba", "numpy"])
def test_versions_are_those_installed(name: str) -> None:
    finding = found(info.versions(), name)
    assert finding.found.startswith(importlib.metadata.version(name))
    assert finding.remedy is None


@pytest.mark.parametrize(("name", "remedy"), [("numba", "pip install numba"), ("triton", "triton")])
def test_missing_package_is_named_with_its_remedy(name: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert "cannot be imported" in found(info.versions(), name).found
    assert "serves nothing" in found(info.backends(), name).found
    assert remedy in missing_part()


def test_backends_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found(info.backends(), "numba").found == "serves parameters on the CPU"
    assert found(info.backends(), "triton").found == "serves nothing: torch finds no GPU"
    assert found(info.processors(), "GPU").found.startswith("none found")


def test_backends_that_are_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_DISABLE", "1")
    assert found(info.backends(), "numba").found == "serves nothing: FUSEDOPT_DISABLE is set"


@pytest.mark.gpu
def test_gpu_is_named_with_its_memory() -> None:
    finding = found(info.processors(), "GPU 0")
    assert finding.found.startswith(torch.cuda.get_device_name(0))
    assert finding.found.endswith("GiB")


def test_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert found(info.processors(), "threads").found.startswith(f"{before + 1},")
    finally:
        torch.set_num_threads(before)


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(info.compilers(), "C compiler").found == "missing"
    assert "apt install gcc" in missing_part()


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_compiler_on_the_path(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / name
    program.touch(mode=0o755)
    assert found(info.compilers(), "C compiler") == info.Finding("C compiler", str(program))


def test_compiler_that_the_environment_names_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert found(info.compilers(), "C compiler").found == "missing: CC=no-such-compiler"
    assert "CC=no-such-compiler" in missing_part()


@pytest.mark.parametrize(
    ("name", "by_kind"),
    [
        ("as torch", {"parameters": 4, "gradients": 4, "exp_avg": 4, "exp_avg_sq": 4, "all states": 8}),
        ('state_format="bf16"', {"parameters": 4, "gradients": 4, "exp_avg": 2, "exp_avg_sq": 2, "all states": 4}),
        ('state_format="8bit"', {"parameters": 4, "exp_avg": 1, "exp_avg_sq": 1, "exp_avg_sq_words": 0.0312, "all states": 2.05}),
        ('"8bit", split16', {"parameters": 2, "gradients": 2, "exp_avg": 1, "master": 2, "all states": 4.05}),
    ],
)
def test_memory_is_told_by_kind(name: str, by_kind: dict[str, float]) -> None:
    line = found(info.memory(), name).found
    numbers = {kind: float(number) for kind, _, number in (part.rpartition(" ") for part in line.replace(";", ",").split(", "))}
    assert {kind: numbers[kind] for kind in by_kind} == by_kind
    assert "numbers" not in numbers, "a step count is a thousandth of a byte"
    assert numbers["all states"] == pytest.approx(
        sum(numbers.values()) - numbers["parameters"] - numbers["gradients"] - numbers["all states"], abs=0.01
    )


def test_memory_compiles_nothing() -> None:
    program = """
        import sys
        from fusedopt import info
        info.memory()
        sys.exit("numba" in sys.modules)
    """
    finished = child.run(program)
    assert finished.returncode == 0, finished.stderr


def test_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_CACHE_DIR", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kernel.nbc").write_bytes(bytes(3 * 2**20))
    assert [finding.found for finding in info.cache()] == [str(tmp_path), "1 files, 3.0 MiB"]


def test_variables_are_listed_and_misspelt_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FUSEDOPT_")]:
        monkeypatch.delenv(name)
    assert found(info.variables(), "FUSEDOPT_*").found.startswith("none is set")
    monkeypatch.setenv("FUSEDOPT_DISABLE", "1")
    monkeypatch.setenv("FUSEDOPT_DISABLED", "1")
    assert "turns all kernels off" in found(info.variables(), "FUSEDOPT_DISABLE").found
    assert "unknown to fusedopt" in found(info.variables(), "FUSEDOPT_DISABLED").found


def test_variables_are_all_that_the_code_reads() -> None:
    package = Path(fusedopt.__file__).parent
    sources = [path for folder in (package, package / "kernels") for path in folder.rglob("*.py")]
    words = " ".join(path.read_text(encoding="utf-8") for path in sources if path.name != "info.py")
    assert {word for word in words.replace('"', " ").split() if word.startswith("FUSEDOPT_")} >= set(info.VARIABLES)


def test_module_prints_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fusedopt", "info"])
    monkeypatch.delitem(sys.modules, "fusedopt.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fusedopt", run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for expected in (f"fusedopt {fusedopt.__version__}", "Backends", "Memory of AdamW", "C compiler", "Cache"):
        assert " ".join(expected.split()) in " ".join(printed.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: COMMAND"), (["train"], "invalid choice: 'train'"), (["info", "--all"], "--all")],
    ids=["no command", "unknown command", "unknown option"],
)
def test_wrong_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        __main__.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["matplotlib", "rich", "sklearn"])
def test_demo_without_its_extra_names_it(name: str) -> None:
    program = """
        import sys
        sys.modules[sys.argv[1]] = None
        from fusedopt.__main__ import main
        sys.exit(main(["demo"]))
    """
    finished = child.run(program, name)
    assert finished.returncode == 2
    assert name in finished.stderr
    assert "fusedopt[demo]" in finished.stderr
