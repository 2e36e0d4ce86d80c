"""What no other tool checks: layers, the options of kernels, documented arguments, sizes, and what a text may say."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
API = sorted(path for path in (ROOT / "fusedopt").rglob("*.py") if "kernels" not in path.parts)
PUBLIC = {
    name: value
    for name, value in vars(fusedopt).items()
    if not name.startswith("_")
    and (inspect.isclass(value) or inspect.isfunction(value))
    and value.__module__.startswith("fusedopt")
}
# Each pattern is written so that it does not match itself.
UNWANTED = {
    "path of a machine": r"(?<![\w.])/(?:home|Users|root|tmp|work|opt)/\w",
    "package index": r"index[-_]url|find[-_]links",
    "unfinished": r"\bFIX[M]E\b|\bX{3}\b|^<{7} |^>{7} ",
    "number without its tracker": r"(?i)\b(?<![/])issues? #?[0-9]",
}
LONGEST_FILE = 400
LONGEST_RULE = 15


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def texts() -> Iterator[tuple[Path, str]]:
    """Every text file of the repository."""
    listing = ["git", "ls-files", "--cached"]  # what lies beside them is the user's own
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Each module that a file imports anywhere, or names as an attribute of torch, and its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path in API, f"{path}:{node.lineno}: kernels import by full names"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}", node.lineno


def calls_of(name: str, text: str) -> Iterator[str]:
    """The text of each call of ``name``, in templates of generated code too, up to its closing parenthesis."""
    for match in re.finditer(rf"\b{name}\(", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text[match.start() : end]


@pytest.mark.parametrize("unwanted", UNWANTED)
def test_texts_speak_of_the_product_alone(unwanted: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    pattern = re.compile(UNWANTED[unwanted], re.MULTILINE)
    found = [(path, line) for path, text in texts() for line in text.splitlines() if pattern.search(line)]
    assert not found, "\n".join(f"{relative(path)}: {line}" for path, line in found)


@pytest.mark.parametrize("path", [*KERNELS, *API], ids=relative)
def test_files_stay_short(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_FILE, f"{length} lines: split the file by what its parts are about"


def test_rules_stay_short() -> None:
    tree = ast.parse((ROOT / "kernels" / "rules.py").read_text(encoding="utf-8"))
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_RULE} == {}


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_know_nothing_of_the_api(path: Path) -> None:
    found = [
        f"line {line}: {name}"
        for name, line in imports(path)
        if name.startswith("torch.optim") or (name.startswith("fusedopt.") and not name.startswith("fusedopt.kernels"))
    ]
    assert not found, found


@pytest.mark.parametrize("path", API, ids=relative)
def test_api_knows_nothing_of_compilers(path: Path) -> None:
    found = [f"line {line}: {name}" for name, line in imports(path) if name.partition(".")[0] in ("numba", "triton")]
    assert not found, found


def test_no_step_imports_the_executor_of_ptx() -> None:
    """It is for tests, for documents and for `python -m fusedopt check`."""
    others = [path for path in (*KERNELS, *API) if path.parent.name != "ptx" and path.name != "check.py"]
    found = [
        f"{relative(path)}:{line}" for path in others for name, line in imports(path) if name.startswith("fusedopt.kernels.ptx")
    ]
    assert not found, found


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_numba_options_are_shared(path: Path) -> None:
    """Numba hands a helper's options down from its first caller: where they differ, an import's order decides."""
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"@(?:numba\.)?n?jit\s*$", text, re.MULTILINE), "an njit without options"
    assert [call for call in calls_of("njit", text) if "**JIT" not in call] == []
    assert not re.search(r"fastmath[\"']? ?[=:] ?(?!False)\w", text), "fastmath costs the equal bits of backends"


def documented_arguments(docstring: str) -> dict[str, str]:
    """Names and texts of the arguments under ``Args:``."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    entries = re.split(r"^    (?=\*{0,2}\w+(?:, \w+)*:)", section.group(1), flags=re.MULTILINE) if section else []
    found = {}
    for entry in entries:
        names, colon, text = entry.partition(":")
        if colon:
            found |= dict.fromkeys(names.strip().replace("*", "").split(", "), text)
    return found


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_documented_arguments_are_those_of_the_signature(name: str) -> None:
    """Arguments that a class has from the torch class it extends may be left to torch's documentation."""
    public = PUBLIC[name]
    docstring = vars(public).get("__doc__") if inspect.isclass(public) else public.__doc__
    assert docstring, f"{name} has no docstring of its own"
    parameters = dict(inspect.signature(public).parameters)
    documented = documented_arguments(docstring)
    assert set(documented) <= set(parameters)

    bases = inspect.getmro(public) if inspect.isclass(public) else ()
    extended = next((base for base in bases if base.__module__.startswith("torch.")), None)
    known = set(inspect.signature(extended).parameters) if extended else set()
    assert set(parameters) - known <= set(documented)

    for argument, text in documented.items():
        for stated in re.findall(r"\(default: ([^()]+|\([^()]*\))\)", " ".join(text.split())):
            assert ast.literal_eval(stated) == parameters[argument].default, f"{argument}: the default is another"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_commands_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ *(?:\$ )?)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert "test" in named
    assert named <= targets
    assert "demo" in named or document != "README.md"
