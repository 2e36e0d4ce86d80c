"""What a reader needs to judge the numbers; nothing that names the machine itself."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

#: Packages whose versions a report states, where they are installed.
PACKAGES = ("torch", "numba", "numpy", "triton", "deepspeed", "bitsandbytes", "torchao", "torch-optimi", "flashoptim")


@dataclass
class Machine:
    """Processors, system, versions and how busy the machine was."""

    cpu: str
    cores: int
    threads: int
    memory_gib: int | None
    gpu: str | None
    system: str
    versions: dict[str, str]
    date: str
    load: float | None

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine now."""
        return cls(
            cpu=cpu_model(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory_gib=_memory_gib(),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            system=f"{platform.system()} {platform.machine()}",
            versions=versions(),
            date=datetime.date.today().isoformat(),
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )

    @property
    def file_name(self) -> str:
        """The name of reports: the GPU or else the CPU, and the date."""
        return f"{re.sub(r'[^a-z0-9]+', '-', (self.gpu or self.cpu).lower()).strip('-')}-{self.date}"


def versions() -> dict[str, str]:
    """Versions of Python and of packages."""
    import fusedopt

    found = {"fusedopt": fusedopt.__version__, "Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The name that the processor gives itself."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else None
    return named.group(1).strip() if named else platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
