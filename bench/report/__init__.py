"""What is made of a record: one document, as a self-contained page of HTML and as Markdown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from . import contests, costs, formats, gpu, method
from .page import Section, as_html, as_markdown


def write(record: SimpleNamespace, name: Path) -> list[Path]:
    """Write the report of `record` to `name` with .html and .md; return both paths."""
    title = f"fusedopt on {record.machine.gpu or record.machine.cpu}, {record.machine.date}"
    sections = document(record)
    pages = {".html": as_html(title, sections, record), ".md": as_markdown(title, sections)}
    paths = []
    for suffix, text in pages.items():
        path = name.with_suffix(suffix)
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def document(record: SimpleNamespace) -> list[Section]:
    """All of the report, as far as it was measured."""
    sections = [
        contests.summary(record),
        *contests.main_optimizers(record),
        contests.other_packages(record),
        contests.other_optimizers(record),
        contests.bfloat16(record),
        formats.formats(record),
        contests.ends(record),
        costs.costs(record),
        costs.first_steps(record),
        costs.surroundings(record),
        gpu.measured(record),
        gpu.predicted(record),
        contests.subjects(record),
        method.method(record),
    ]
    return [section for section in sections if section.blocks]
