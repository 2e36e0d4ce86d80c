"""A document of sections, tables and pictures, as Markdown and as a self-contained page of HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from .. import plots


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; the first column to the left, the others to the right."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Picture:
    """One of the plots, by name, and what it shows."""

    name: str
    caption: str


@dataclass
class Section:
    """A heading, and paragraphs, tables and pictures."""

    title: str
    blocks: list[str | Table | Picture] = field(default_factory=list)


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The document in Markdown; its pictures are in the page of HTML."""
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, Table):
                parts.append(markdown_table(block))
            elif isinstance(block, str):
                parts.append(block)
    parts.append("The page of HTML beside this file shows the same with plots.")
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table in Markdown."""
    rule = ["---" if i in table.left else "---:" for i in range(len(table.heading))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (table.heading, rule, *table.rows))


def as_html(title: str, sections: Sequence[Section], record: SimpleNamespace) -> str:
    """The document as one page that needs nothing else."""
    body = []
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        for block in section.blocks:
            if isinstance(block, Table):
                body.append(_html_table(block))
            elif isinstance(block, Picture):
                figure = plots.FIGURES[block.name](record)
                if figure is not None:
                    drawing = plots.svg(figure, block.name)
                    body.append(f"<figure>{drawing}<figcaption>{html.escape(block.caption)}</figcaption></figure>")
            else:
                body.append(f"<p>{_inline(block)}</p>")
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [(" class=text" if len(cell) > 40 else " class=left") if i in table.left else "" for i, cell in enumerate(cells)]
        made = [f"<{tag}{kind}>{_inline(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)]
        return f"<tr>{''.join(made)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in table.rows)
    return f"<div class=table><table>\n<thead>{row(table.heading, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"


def _inline(text: str) -> str:
    text = html.escape(text)
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "strong"), (r"\*([^*]+)\*", "em")):
        text = re.sub(pattern, rf"<{tag}>\1</{tag}>", text)
    return text


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; }}
body {{ max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }}
h1 {{ font-size: 1.7rem; border-bottom: 3px solid #123a7a; padding-bottom: .4rem; }}
h2 {{ font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }}
p {{ max-width: 52rem; }}
code {{ font: .88em ui-monospace, monospace; background: #f2f4f7; padding: .05em .3em; border-radius: 3px; }}
.table {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .6rem; text-align: right; }}
td {{ border-top: 1px solid #e3e3e3; white-space: nowrap; }}
th {{ vertical-align: bottom; border-bottom: 2px solid #123a7a; font-weight: 600; }}
.left, .text {{ text-align: left; }}
td.text {{ white-space: normal; }}
tbody tr:nth-child(even) {{ background: #f7f9fb; }}
figure {{ margin: 1.4rem 0; }}
figure svg {{ width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: .85rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
