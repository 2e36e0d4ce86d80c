"""Work that needs what Triton compiles, in a process of its own: its interpreter is on or off for a whole process."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from fusedopt.kernels.ptx import execute

Found = TypeVar("Found")


def obstacle() -> str | None:
    """Why kernels cannot be compiled and executed here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return execute.obstacle()


def in_child(work: Callable[..., Found], *arguments: Any) -> Found:
    """Return what `work` returns in a process that compiles; both travel as pickles do."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_compile) as child:
        return child.submit(work, *arguments).result()


def _compile() -> None:
    os.environ["TRITON_INTERPRET"] = "0"
