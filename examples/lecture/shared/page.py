"""The page: Markdown with pictures beside it, and the same as one file of HTML that needs no other."""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from markdown_it import MarkdownIt
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

import fusedopt

from .topic import Result, Setting, text_of

TOPICS_FOLDER = Path(__file__).resolve().parents[1]

STYLE = """
body { font: 17px/1.55 Georgia, serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { font-family: system-ui, sans-serif; line-height: 1.2; } h2 { margin-top: 3.5rem; }
p.formula { text-align: center; } p.formula img { max-width: 100%; }
p > img:only-child { display: block; width: 100%; }
table { border-collapse: collapse; font: 14px/1.4 system-ui, sans-serif; width: 100%; }
td, th { border-bottom: 1px solid #ddd; padding: 0.25rem 0.5rem; text-align: left; }
td:last-child, th:last-child { text-align: right; white-space: nowrap; }
code { font-size: 0.85em; background: #f3f3f3; padding: 0.1em 0.25em; } pre code { background: none; }
"""


def write(folder: Path, results: Mapping[str, Result], setting: Setting) -> None:
    """Write ``lecture.md`` and ``lecture.html`` beside the pictures, which are there already."""
    text = markdown(results, setting, folder)
    (folder / "lecture.md").write_text(text, encoding="utf-8")
    (folder / "lecture.html").write_text(as_html(text, folder), encoding="utf-8")


def markdown(results: Mapping[str, Result], setting: Setting, folder: Path) -> str:
    """Return the page; its links to code lead from ``folder``."""
    quick = ", in short runs (`--quick`)" if setting.quick else ""
    parts = [
        "# The lecture, runnable",
        f"Every claim of a lecture on training deep models, trained, measured and drawn: with the optimizers of fusedopt "
        f"{fusedopt.__version__} and otherwise with PyTorch's own parts, on {setting.data.name}{quick}. "
        "`make lecture` writes this page, and the same as one file, `lecture.html`.",
        "Seeds are fixed and all runs on one thread, so a run gives the same numbers again, but for times. Another processor or "
        "another build of torch may round otherwise, and training amplifies roundings: there the last digits may differ, and more "
        f"where training is long. These are of torch {torch.__version__}.",
    ]
    for name, result in results.items():
        title, text = text_of(name)
        rows = [f"| {what} | {shown(value)} |" for what, value in result.numbers.items()]
        code = os.path.relpath(TOPICS_FOLDER / f"{name}.py", folder.resolve())
        parts += [f"## {title}", text, f"![{title}]({name}.png)", "\n".join(["| measured | value |", "| --- | ---: |", *rows])]
        parts.append(f"Repeat with `python -m examples.lecture {name}`; the program is [{name}.py]({Path(code).as_posix()}).")
    return "\n\n".join(parts) + "\n"


def shown(value: float | str) -> str:
    """A number to three digits, or text."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def as_html(text: str, folder: Path) -> str:
    """Return one page with pictures and formulas inside."""
    text = re.sub(
        r"\$\$(.+?)\$\$", lambda found: f'<p class="formula">{_formula(found[1], 13, display=True)}</p>', text, flags=re.DOTALL
    )
    text = re.sub(r"\$([^$]+)\$", lambda found: _formula(found[1], 11), text)
    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r'src="(\w+\.png)"', lambda found: f'src="{_inside((folder / found[1]).read_bytes(), "png")}"', body)
    # The programs are not inside; their names say where they stand in a checkout.
    body = re.sub(r'<a href="[^"]*\.py">(\w+\.py)</a>', r"<code>examples/lecture/\1</code>", body)
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def _formula(tex: str, points: int, *, display: bool = False) -> str:
    """A formula as a picture in the line, drawn by matplotlib: the page needs no script and no network."""
    tex = " ".join(tex.split())
    drawn = io.BytesIO()
    # Full height for fractions in a line of their own, as TeX has it.
    shown_tex = tex.replace(r"\frac", r"\dfrac") if display else tex
    depth = math_to_image(f"${shown_tex}$", drawn, prop=FontProperties(size=points, math_fontfamily="stix"), format="svg")
    # Points of an SVG are 72 to an inch.
    style = f"vertical-align:{-depth:.1f}pt"
    return f'<img alt="{html.escape(tex)}" style="{style}" src="{_inside(drawn.getvalue(), "svg+xml")}">'


def _inside(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
