"""How numbers are stored, and in what type they are computed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Format:
    """One way to store the elements of a parameter, a gradient or a state.

    Args:
        name: as in torch; kernels' loads, stores and conversions are named by it.
        dtype: of the tensors that hold it.
    """

    name: str
    dtype: torch.dtype
    #: Random bits by which a number is rounded up or down; none where it is rounded to the nearest.
    chance: int = 0
    #: What the 32-bit words are that a block of codes has beside it; none where elements stand for themselves.
    parts: tuple[str, ...] = ()
    #: The dtype of what a parameter has beside it for more bits, or None.
    master: torch.dtype | None = None

    @property
    def words(self) -> int:
        """32-bit words a block."""
        return len(self.parts)

    @property
    def title(self) -> str:
        """What people call it."""
        return "8bit" if self.words else "by chance" if self.name == "bfloat16_by_chance" else self.name

    @property
    def plain(self) -> str:
        """How the elements themselves are loaded."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        """Bytes an element."""
        return self.dtype.itemsize


FORMATS: dict[torch.dtype, Format] = {
    dtype: Format(str(dtype).removeprefix("torch."), dtype)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}

#: Formats of :mod:`fusedopt.kernels.codes`: of states, and of parameters that have a master.
BFLOAT16_BY_CHANCE = Format("bfloat16_by_chance", torch.bfloat16, chance=16)
CODES: dict[str, Format] = {
    "size": Format("size", torch.uint8, 16, ("base", "distance")),
    "root": Format("root", torch.uint8, 16, ("base", "distance")),
    "signed": Format("signed", torch.uint8, 16, ("factor",)),
    "relative": Format("relative", torch.uint8, 17, ("factor",)),
}
MASTERS: dict[str, Format] = {
    "fp32": Format("fp32", torch.bfloat16, master=torch.float32),
    "split16": Format("split16", torch.bfloat16, master=torch.int16),
    "split8": Format("split8", torch.bfloat16, chance=16, master=torch.int8),
}

#: A complex number is stored, and updated, as its real and its imaginary part.
REAL_DTYPES = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the real numbers that tensors of ``dtype`` hold."""
    return REAL_DTYPES.get(dtype, dtype)


def compute_dtype(parameter: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on parameters of dtype ``parameter``: float64 for float64, else float32."""
    return torch.float64 if real_dtype(parameter) == torch.float64 else torch.float32


def average_dtype(parameter: torch.dtype) -> torch.dtype:
    """Return the dtype of an average of parameters of dtype ``parameter``: a slow one would not move in 16 bits."""
    return parameter if parameter.is_complex else compute_dtype(parameter)
