"""Count what Numba compiles and what it takes from its cache."""

from __future__ import annotations

import sys
from collections import Counter

PREFIX = "fusedopt_generated_"


def kernels():
    """Yield the compiled kernels of this process, by the name of their generated module."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PREFIX) and hasattr(module, "run") and hasattr(module.run, "stats"):
            yield name, module.run


def compilations() -> Counter[str]:
    """Return how many versions of each kernel this process has compiled or loaded."""
    return Counter({name: len(kernel.signatures) for name, kernel in kernels()})


def cache_hits() -> int:
    """Return how many kernels came from the cache."""
    return sum(sum(kernel.stats.cache_hits.values()) for _, kernel in kernels())


def cache_misses() -> int:
    """Return how many kernels had to be compiled."""
    return sum(sum(kernel.stats.cache_misses.values()) for _, kernel in kernels())
