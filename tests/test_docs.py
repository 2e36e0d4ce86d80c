"""The documentation: a page for each optimizer that tells what a real one keeps, and a build without a warning."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fusedopt
from cases import CASES
from fusedopt.kernels import backends

ROOT = Path(__file__).resolve().parent.parent
# What the pages include.
FOLDERS, FILES = ("docs", "examples", "kernels"), ("README.md", "CONTRIBUTING.md")
NEEDED = ("sphinx", "furo", "myst_parser")

sys.path.insert(0, str(ROOT / "docs"))
pages = importlib.import_module("pages")

OWN = {
    name: value
    for name in fusedopt.__all__
    if inspect.isclass(value := getattr(fusedopt, name))
    and issubclass(value, torch.optim.Optimizer)
    and value.__module__.startswith("fusedopt.")
}
VARIANTS = [(page, kept, variant) for page in pages.PAGES for kept, variant in zip(page.kept, page.variants, strict=True)]

each_page = pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
each_variant = pytest.mark.parametrize(("page", "kept", "variant"), VARIANTS, ids=[kept.call for _, kept, _ in VARIANTS])
each_dtype = pytest.mark.parametrize("dtype", pages.DTYPES, ids=str)


def tables(page):
    """The tables of a page as it is written: for each a list of rows, in dicts by the titles of the columns."""
    found = []
    for table in pages.optimizer_page(page).split(".. list-table::")[1:]:
        rows = [re.findall(r"^     - ?(.*)$", "     - " + row, re.MULTILINE) for row in table.split("   * - ")[1:]]
        head, *others = ([cell.strip("`") for cell in row] for row in rows)
        found.append([dict(zip(head, row, strict=True)) for row in others])
    return found


def stepped(page, variant, dtype):
    """A parameter after two steps by a kernel, and its state."""
    parameter = torch.nn.Parameter(torch.randn(5, 7).to(dtype))
    optimizer = page.optimizer([parameter], fused=True, **variant)
    for _ in range(2):
        parameter.grad = torch.randn(5, 7).to(dtype)
        optimizer.step()
    assert "numba" in optimizer.explain()
    return parameter, optimizer.state[parameter]


def test_every_optimizer_has_a_page():
    assert {page.name: page.optimizer for page in pages.PAGES} == OWN


@each_dtype
@each_variant
def test_stored_is_what_a_real_optimizer_stores(page, kept, variant, dtype):
    _, state = stepped(page, variant, dtype)
    shapes = {(): "one number", (5, 1): "one for each row", (1, 7): "one for each column", (5, 7): "the parameter's"}
    real = {name: (shapes[tuple(value.shape)], pages._name(value.dtype)) for name, value in state.items()}
    rows = [row for row in tables(page)[0] if row["optimizer"] == kept.call]
    told = {row["state"]: (row["shape"], row[f"for {pages._name(dtype)}"]) for row in rows}
    assert told == (real or {"none": ("", "")})


@each_dtype
@each_variant
def test_bytes_are_those_of_a_real_optimizer(page, kept, variant, dtype):
    parameter, state = stepped(page, variant, dtype)
    of_states = sum(value.nbytes for value in state.values() if value.shape == parameter.shape) / parameter.numel()
    (row,) = (row for row in tables(page)[1] if row["optimizer"] == kept.call)
    assert float(row[f"stored, {pages._name(dtype)}"]) == of_states
    # Parameter and gradient, most often once each; what is written is written once.
    moved = (1 + sum(page.reads)) * parameter.element_size() + 2 * of_states
    assert float(row[f"moved, {pages._name(dtype)}"]) == moved


@pytest.mark.parametrize(
    ("call", "stored", "moved"),
    [
        ("SGD()", 0, 12),
        ("SGD(momentum=0.9)", 4, 20),
        ("AdamW()", 8, 28),
        ("AdamW(amsgrad=True)", 12, 36),
        ("Adafactor()", 0, 24),
    ],
)
def test_known_bytes_of_float32(call, stored, moved):
    (kept,) = (kept for _, kept, _ in VARIANTS if kept.call == call)
    assert (kept.stored(torch.float32), kept.moved(torch.float32)) == (stored, moved)


@pytest.mark.parametrize("case", [case for case in CASES if case.ours in OWN.values()], ids=str)
def test_options_keep_nothing_that_no_page_tells_of(case):
    (page,) = (page for page in pages.PAGES if page.optimizer is case.ours)
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    parameter.grad = torch.ones(2, 3)
    optimizer = case.make_ours([parameter])
    with backends.use("tensor"):
        optimizer.step()
    told = [kept.after_a_step[torch.float32][1].keys() for kept in page.kept]
    assert optimizer.state[parameter].keys() in told


@each_page
def test_example_runs(page):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {}
        exec(compile(pages.example(page), page.name, "exec"), names)
    assert type(names["optimizer"]) is page.optimizer
    assert page.example.items() <= names["optimizer"].defaults.items()


@each_page
def test_docstring_has_all_parts(page):
    text = inspect.cleandoc(page.optimizer.__doc__)
    for part in (r"\.\. math::\n", "Args:\n", "Raises:\n", "Differences from torch:\n", "Source: "):
        assert re.search(f"^{part}", text, re.MULTILINE), f"{part!r} is missing"


@pytest.mark.parametrize("page", [page for page in pages.PAGES if hasattr(torch.optim, page.name)], ids=lambda page: page.name)
def test_docstring_names_the_arguments_that_torch_lacks(page):
    theirs = getattr(torch.optim, page.name)
    differences = inspect.cleandoc(page.optimizer.__doc__).partition("Differences from torch:")[2].partition("Source:")[0]
    added = inspect.signature(page.optimizer).parameters.keys() - inspect.signature(theirs).parameters.keys()
    told = re.search(r"- (.*) (?:is|are) added", differences)
    assert set(re.findall(r"``(\w+)``", told.group(1) if told else "")) == added - {"options"}


@pytest.mark.parametrize("variable", fusedopt.info.VARIABLES)
def test_environment_variables_are_explained(variable):
    assert f"``{variable}``" in pages.variables()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What `make docs` makes of a copy, by the very command in the Makefile."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'fusedopt[docs]', or make docs")
    copy = tmp_path_factory.mktemp("docs")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "optimizers"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    (recipe,) = re.findall(
        r"^docs:.*\n\t@\$\(RUN\) (.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    path = os.pathsep.join(filter(None, (str(Path(fusedopt.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *recipe.split()]
    done = subprocess.run(command, cwd=copy, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return copy / "build" / "docs"


@pytest.mark.slow
def test_builds_without_a_warning(built):
    assert (built / "index.html").is_file()


@pytest.mark.slow
@each_page
def test_page_is_rendered_and_linked(page, built):
    text = (built / "optimizers" / f"{page.name}.html").read_text(encoding="utf-8")
    for part in (f'id="fusedopt.{page.name}"', 'class="math', "Differences from torch", "Source", "What is stored", "Bytes"):
        assert part in text
    assert f'href="optimizers/{page.name}.html"' in (built / "optimizers.html").read_text(encoding="utf-8")
