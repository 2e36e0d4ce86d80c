"""The page of each optimizer: its docstring, and beside it what a real optimizer keeps and moves, found by taking a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.info import VARIABLES
from fusedopt.kernels import backends

#: What the tables show; a parameter's gradient has its dtype.
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Page:
    """An optimizer, and what only a person can choose.

    Args:
        optimizer: the class; all that is said of it stands in its docstring.
        example: arguments that a user might choose.
        variants: arguments that decide what is stored, one set for each possible answer.
        reads: how often a step reads a large parameter, and its gradient.
    """

    optimizer: type[torch.optim.Optimizer]
    example: dict[str, Any]
    variants: Sequence[dict[str, Any]] = field(default=({},))
    reads: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        """What the page is called."""
        return self.optimizer.__name__

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        assert self.optimizer.__doc__
        return " ".join(self.optimizer.__doc__.split("\n\n")[0].split())

    @property
    def kept(self) -> list[Kept]:
        """What each variant keeps."""
        return [Kept(self.optimizer, variant, self.reads) for variant in self.variants]


PAGES = [
    Page(fusedopt.SGD, {"lr": 0.1, "momentum": 0.9}, [{}, {"momentum": 0.9}]),
    Page(fusedopt.Momentum, {"lr": 0.1, "beta": 0.9}, [{"lr": 0.1}]),
    Page(fusedopt.Adam, {"lr": 1e-3, "betas": (0.9, 0.99)}, [{}, {"amsgrad": True}]),
    Page(fusedopt.AdamW, {"lr": 3e-4, "weight_decay": 0.1}, [{}, {"amsgrad": True}]),
    Page(
        fusedopt.RMSprop,
        {"lr": 1e-3, "momentum": 0.9},
        [{}, {"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True}],
    ),
    Page(fusedopt.Adafactor, {"lr": 1e-2, "weight_decay": 0.1}, reads=(2, 3)),
    Page(fusedopt.Adagrad, {"lr": 1e-2, "lr_decay": 1e-4}),
    Page(fusedopt.Adadelta, {"lr": 1.0, "rho": 0.95}),
    Page(fusedopt.Adamax, {"lr": 2e-3}),
    Page(fusedopt.NAdam, {"lr": 2e-3, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    Page(fusedopt.RAdam, {"lr": 1e-3, "weight_decay": 0.01, "decoupled_weight_decay": True}),
    Page(fusedopt.ASGD, {"lr": 1e-2, "t0": 1000}),
    Page(fusedopt.Rprop, {"lr": 1e-2}),
    Page(fusedopt.Lion, {"lr": 1e-4, "weight_decay": 0.1}),
]


class Kept:
    """What an optimizer keeps for each parameter, found by taking a step.

    Args:
        optimizer: the class.
        options: its arguments.
        reads: how often a step reads a large parameter, and its gradient.
    """

    def __init__(self, optimizer: type[torch.optim.Optimizer], options: dict[str, Any], reads: tuple[int, int]) -> None:
        self.reads = reads
        self.call = f"{optimizer.__name__}({_arguments(options)})"
        self.after_a_step = {dtype: self._after_a_step(optimizer, options, dtype) for dtype in DTYPES}

    @staticmethod
    def _after_a_step(
        optimizer: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parameter = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype))
        parameter.grad = torch.ones_like(parameter)
        stepping = optimizer([parameter], **options)
        # What is kept does not depend on who steps: operations of torch need nothing compiled.
        with backends.use("tensor"):
            stepping.step()
        return parameter, stepping.state[parameter]

    def states(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the states of the parameter's shape, by name."""
        parameter, state = self.after_a_step[dtype]
        return {name: value for name, value in state.items() if value.shape == parameter.shape}

    def shapes(self, dtype: torch.dtype) -> dict[str, str]:
        """Return the shape of each state in words, by name, those of the parameter's shape last."""
        parameter, state = self.after_a_step[dtype]
        words = {(): "one number", (*parameter.shape[:-1], 1): "one for each row", (1, parameter.shape[-1]): "one for each column"}
        others = {name: words[tuple(value.shape)] for name, value in state.items() if value.shape != parameter.shape}
        return others | dict.fromkeys(self.states(dtype), "the parameter's")

    def stored(self, dtype: torch.dtype) -> int:
        """Return the bytes of all states for each element of a parameter."""
        return sum(value.element_size() for value in self.states(dtype).values())

    def moved(self, dtype: torch.dtype) -> int:
        """Return the bytes that a step reads and writes for each element: gradients are read, all else is written, too."""
        parameter, _ = self.after_a_step[dtype]
        assert parameter.grad is not None
        of_parameter, of_gradient = self.reads
        read = of_gradient * parameter.grad.element_size() + of_parameter * parameter.element_size()
        return read + parameter.element_size() + 2 * self.stored(dtype)


def write(folder: Path) -> None:
    """Write all pages and tables into ``folder``; files that are right already keep their times."""
    folder.mkdir(exist_ok=True)
    files = {f"{page.name}.rst": optimizer_page(page) for page in PAGES}
    files["overview.txt"] = overview(PAGES)
    files["variables.txt"] = variables()
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def optimizer_page(page: Page) -> str:
    """Return the text of the page of one optimizer."""
    return "\n\n".join(
        [
            f"{page.name}\n{'=' * len(page.name)}",
            f".. autoclass:: fusedopt.{page.name}",
            "Methods are :doc:`those of all optimizers </optimizers>`, and so are the :doc:`other differences from torch "
            "</differences>`.",
            _headline("Example"),
            ".. code-block:: python\n\n" + _indented(example(page)),
            _headline("What is stored"),
            "For each parameter, from its first step on:",
            _table(["optimizer", "state", "shape", *(f"for {_name(dtype)}" for dtype in DTYPES)], stored_rows(page)),
            _headline("Bytes"),
            "For each element of the parameters: what the states take, and what one step reads and writes (the gradient is read"
            f"{'' if page.reads == (1, 1) else _times(page.reads)}; the parameter and its states are read and written). "
            "The single numbers above come once for each parameter"
            f"{'' if page.reads == (1, 1) else ', those of rows and columns once for each of these'}.",
            _table(
                ["optimizer", *(f"{what}, {_name(dtype)}" for what in ("stored", "moved") for dtype in DTYPES)],
                byte_rows(page),
            ),
        ]
    )


def example(page: Page) -> str:
    """Return a program that takes one step."""
    return f"""\
import torch
import fusedopt

model = torch.nn.Linear(64, 10)
optimizer = fusedopt.{page.name}(model.parameters(), {_arguments(page.example)})

loss = model(torch.randn(32, 64)).square().mean()
optimizer.zero_grad()
loss.backward()
optimizer.step()
"""


def stored_rows(page: Page) -> list[list[str]]:
    """Return the rows of the table of states: variant, state, shape, and its dtype for each dtype of parameters."""
    rows = []
    for kept in page.kept:
        shapes = kept.shapes(DTYPES[0])
        for name, shape in shapes.items():
            dtypes = [_name(kept.after_a_step[dtype][1][name].dtype) for dtype in DTYPES]
            rows.append([_code(kept.call), _code(name), shape, *dtypes])
        if not shapes:
            rows.append([_code(kept.call), "none", *[""] * (1 + len(DTYPES))])
    return rows


def byte_rows(page: Page) -> list[list[str]]:
    """Return the rows of the table of bytes: variant, then stored and moved for each dtype of parameters."""
    return [
        [_code(kept.call), *(str(count(dtype)) for count in (kept.stored, kept.moved) for dtype in DTYPES)] for kept in page.kept
    ]


def overview(pages: Iterable[Page]) -> str:
    """Return the table of all optimizers."""
    head = ["", "", *(f"bytes stored, {_name(dtype)}" for dtype in DTYPES)]
    rows = []
    for page in pages:
        stored = [", ".join(map(str, sorted({kept.stored(dtype) for kept in page.kept}))) for dtype in DTYPES]
        rows.append([f":doc:`/optimizers/{page.name}`", page.summary, *stored])
    return _table(head, rows)


def variables() -> str:
    """Return the table of environment variables, as ``python -m fusedopt info`` explains them."""
    return _table(["variable", "meaning"], [[_code(name), meaning] for name, meaning in VARIABLES.items()])


def _times(reads: tuple[int, int]) -> str:
    words = {1: "once", 2: "twice", 3: "three times"}
    return f" {words[reads[1]]} where a matrix is larger than a tile, and the parameter {words[reads[0]]}"


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _code(text: str) -> str:
    return f"``{text}``"


def _headline(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def _indented(text: str) -> str:
    return "".join(f"   {line}".rstrip() + "\n" for line in text.splitlines())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for first, *others in (head, *rows):
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
    return "\n".join(line.rstrip() for line in lines) + "\n"
