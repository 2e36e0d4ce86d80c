"""The package in every form it is installed in, none of which needs a compiler or a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("fusedopt/**/*.py"),
        *(file for pattern in ("*.py", "ptx/*.py", "ptx/*.c") for file in ROOT.glob(f"fusedopt/kernels/{pattern}")),
        ROOT / "fusedopt" / "py.typed",
    )
)
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++")

# Steps once with fused=True, which fails unless a kernel runs, and says where everything came from.
PROBE = """
    import importlib.metadata, importlib.util, json, pathlib, torch, fusedopt, fusedopt.kernels
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    fusedopt.SGD([p], lr=0.5, fused=True).step()
    print(json.dumps({
        "stepped": p.tolist(),
        "package": fusedopt.__file__,
        "kernels": fusedopt.kernels.__file__,
        "typed": (pathlib.Path(fusedopt.__file__).parent / "py.typed").is_file(),
        "version": fusedopt.__version__,
        # The first on the path: the surrounding environment may have one, too.
        "installed": [found.version for found in importlib.metadata.distributions(name="fusedopt")][:1],
        "top-level kernels": importlib.util.find_spec("kernels") is not None,
    }))
"""


class Machine:
    """A virtual environment that finds this one's packages except fusedopt, and compilers that only leave a trace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False)
        self.python = next(path for path in folder.glob("venv/*/python*") if path.stem == "python")
        self.packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        # Paths named in a .pth file are searched last, and .pth files in them (editable installs) are not followed.
        found = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        (self.packages / "packages.pth").write_text("\n".join(found))

        self.compiled = folder / "compiled"
        (folder / "bin").mkdir()
        for name in COMPILERS:
            (folder / "bin" / name).write_text(f'#!/bin/sh\necho {name} "$@" >> "{self.compiled}"\nexit 1\n')
            (folder / "bin" / name).chmod(0o755)

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run this environment's Python in ``cwd``, by default a folder without packages; return its output."""
        leave_out = ("PYTHONPATH", "VIRTUAL_ENV", "CC", "CXX", "FUSEDOPT_DISABLE")
        environment = {name: value for name, value in os.environ.items() if name not in leave_out}
        environment["PATH"] = os.pathsep.join([str(self.folder / "bin"), os.environ["PATH"]])
        environment["FUSEDOPT_CACHE_DIR"] = str(self.folder.parent / "cache")
        command = [self.python, *arguments]
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, *arguments: str | Path) -> None:
        """Install by this environment's pip, from what is there already."""
        alone = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
        self.run("-m", "pip", "install", *alone, *arguments)

    def probe(self, cwd: Path | None = None) -> dict[str, object]:
        """Import fusedopt, step once, and return what the child found."""
        answer: dict[str, object] = json.loads(self.run("-c", textwrap.dedent(PROBE), cwd=cwd))
        assert answer["stepped"] == [0.5] * 3
        return answer


@pytest.fixture
def machine(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made from, its link included: builds leave nothing in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("fusedopt", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path) -> dict[str, Path]:
    """The source distribution, and the wheel built from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = checkout.glob("dist/*.whl")
    (source,) = checkout.glob("dist/*.tar.gz")
    return {"wheel": wheel, "source distribution": source}


@pytest.mark.parametrize("form", ["checkout", "wheel", "source distribution"])
def test_installs_and_steps(form: str, machine: Machine, checkout: Path, built: dict[str, Path]) -> None:
    machine.install({"checkout": checkout, **built}[form])
    found = machine.probe()
    assert found["package"] == str(machine.packages / "fusedopt" / "__init__.py")
    assert found["kernels"] == str(machine.packages / "fusedopt" / "kernels" / "__init__.py")
    assert found["typed"]
    assert found["installed"] == [found["version"]]
    assert not found["top-level kernels"]
    assert not machine.compiled.exists()


def test_editable_install_follows_the_checkout(machine: Machine, checkout: Path) -> None:
    machine.install("--editable", checkout)
    found = machine.probe()
    assert Path(str(found["package"])).resolve() == checkout / "fusedopt" / "__init__.py"
    assert Path(str(found["kernels"])).resolve() == checkout / "kernels" / "__init__.py"
    assert found["installed"] == [found["version"]]
    assert not found["top-level kernels"]
    assert not machine.compiled.exists()


def test_runs_from_a_checkout_that_is_not_installed(machine: Machine, checkout: Path) -> None:
    found = machine.probe(cwd=checkout)
    assert Path(str(found["package"])).resolve() == checkout / "fusedopt" / "__init__.py"
    assert Path(str(found["kernels"])).resolve() == checkout / "kernels" / "__init__.py"
    assert not machine.compiled.exists()


def test_checkout_wins_over_an_installed_wheel(machine: Machine, checkout: Path, built: dict[str, Path]) -> None:
    machine.install(built["wheel"])
    found = machine.probe(cwd=checkout)
    assert Path(str(found["kernels"])).resolve() == checkout / "kernels" / "__init__.py"


def test_wheel_holds_every_source_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (metadata,) = (message_from_bytes(wheel.read(name)) for name in wheel.namelist() if name.endswith("/METADATA"))
    assert sorted(names) == sorted(set(SOURCES))
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert {"triton", "demo", "test"} <= set(metadata.get_all("Provides-Extra", []))
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(each.split(">")[0] for each in needed) == ["numba", "numpy", "torch"]


def test_source_distribution_holds_real_kernels(built: dict[str, Path]) -> None:
    with tarfile.open(built["source distribution"]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert set(SOURCES) <= set(members)
    assert not any(member.issym() or member.islnk() for member in members.values())
    assert "LICENSE" in members
    assert not any(name.startswith(("tests", "kernels")) for name in members)


def test_import_loads_no_compiler_and_no_extra(machine: Machine, checkout: Path) -> None:
    """Beyond what torch itself imports, `import fusedopt` is light: kernels load what they need at the first step."""
    program = "import sys, torch.optim; before = set(sys.modules); import fusedopt; print(*set(sys.modules) - before)"
    loaded = {name.partition(".")[0] for name in machine.run("-c", program, cwd=checkout).split()}
    assert "fusedopt" in loaded
    assert loaded.isdisjoint({"numba", "llvmlite", "triton", "matplotlib", "sklearn", "scipy", "rich"})


def test_a_link_checked_out_as_text_is_explained(checkout: Path, tmp_path: Path) -> None:
    """Git for Windows writes symbolic links as text files unless told otherwise."""
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, symlinks=True)
    (copy / "fusedopt" / "kernels").unlink()
    (copy / "fusedopt" / "kernels").write_text("../kernels")
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=copy, capture_output=True, text=True)
    assert done.returncode != 0
    assert "core.symlinks" in done.stderr
