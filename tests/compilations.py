"""Count what Numba compiles and what it takes from its cache."""

from __future__ import annotations

import sys
from collections import Counter

from numba.core.ccallback import CFunc

PREFIX = "fusedopt_generated_"


def kernels():
    """Yield the compiled kernels of this process, by the name of their generated module."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PREFIX) and isinstance(getattr(module, "run", None), CFunc):
            yield name, module.run


def compilations() -> Counter[str]:
    """Return the kernels that this process has compiled or loaded, each once."""
    return Counter(name for name, _ in kernels())


def cache_hits() -> int:
    """Return how many kernels came from the cache."""
    return sum(kernel.cache_hits for _, kernel in kernels())


def cache_misses() -> int:
    """Return how many kernels had to be compiled."""
    return sum(kernel.cache_hits == 0 for _, kernel in kernels())
