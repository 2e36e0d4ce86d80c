"""Settings of Sphinx; `make docs` runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import pages  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import fusedopt  # noqa: E402

project = "fusedopt"
version = release = fusedopt.__version__
project_copyright = "fusedopt contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
# Formulas between dollar signs, as the lecture has them.
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
html_title = f"fusedopt {release}"
html_copy_source = False

# Types stand in the text of each argument.
autodoc_typehints = "none"
napoleon_custom_sections = ["Differences from torch"]


def title_source(*event: Any) -> None:
    """Give the last part of a docstring, ``Source: ...``, a title like that of the others."""
    lines: list[str] = event[-1]
    for number, line in enumerate(lines):
        if line.startswith("Source: "):
            lines[number : number + 1] = [".. rubric:: Source", "", line.removeprefix("Source: ")]
            return


def setup(app: Sphinx) -> None:
    """Have the pages of the optimizers written before Sphinx looks for pages."""
    app.connect("builder-inited", lambda started: pages.write(Path(started.srcdir) / "optimizers"))
    # After napoleon, which takes 500.
    app.connect("autodoc-process-docstring", title_source, priority=600)
