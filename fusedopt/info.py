"""`python -m fusedopt info`: what fusedopt finds on this machine, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fusedopt

#: Variables that fusedopt reads, and what they do.
VARIABLES = {
    "FUSEDOPT_DISABLE": "1 turns all kernels off; rules run on torch tensors",
    "FUSEDOPT_CACHE_DIR": "the folder of generated and compiled kernels",
}

#: Elements of the parameter whose memory is looked at: as few as short formats take.
MEMORY_ELEMENTS = 4096
#: What AdamW keeps its states and parameters in, by how it is asked for: the dtype of parameters, and options.
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "as torch": (torch.float32, {}),
    'state_format="bf16"': (torch.float32, {"state_format": "bf16"}),
    'state_format="8bit"': (torch.float32, {"state_format": "8bit"}),
    '"8bit", split16': (torch.bfloat16, {"state_format": "8bit", "master_weights": "split16"}),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, what was found and, if something is missing, how to get it."""

    name: str
    found: str
    remedy: str | None = None


def report() -> str:
    """Return the whole report as text."""
    sections = {
        "Versions": versions(),
        "Backends": backends(),
        "Processors": processors(),
        "Memory of AdamW, in bytes a parameter (fusedopt.memory says it of any optimizer)": memory(),
        "Compiler (needed only by Triton on a GPU, and by tests that execute its PTX)": compilers(),
        "Cache of generated and compiled kernels": cache(),
        "Environment": variables(),
    }
    findings = [finding for section in sections.values() for finding in section]
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    for title, section in sections.items():
        lines += [title, *(f"  {finding.name:<{width}}  {finding.found}" for finding in section), ""]
    remedies = list(dict.fromkeys(finding.remedy for finding in findings if finding.remedy is not None))
    if remedies:
        lines += ["Missing, and how to get it", *(f"  - {remedy}" for remedy in remedies)]
    else:
        lines.append("Nothing is missing.")
    return "\n".join(lines)


def versions() -> list[Finding]:
    """Return the versions of fusedopt, of Python and of the packages that kernels need."""
    return [
        Finding("fusedopt", f"{fusedopt.__version__}, in {Path(fusedopt.__file__).parent}"),
        Finding("Python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", f"{torch.__version__}, {_torch_build()}"),
        _package("numba", "numba compiles the kernels for CPUs: pip install numba"),
        _package("numpy", "numpy is needed by numba: pip install numpy"),
        _package("triton", _triton_remedy()),
    ]


def backends() -> list[Finding]:
    """Return for each backend what it serves here."""
    return [
        Finding("numba", _serves("parameters on the CPU", _numba_obstacle())),
        Finding("triton", _serves("parameters on GPUs", _triton_obstacle())),
        Finding("tensor", _serves("all else, by the same rules on torch tensors")),
    ]


def processors() -> list[Finding]:
    """Return the CPU, the threads that steps use, and the GPUs."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("CPU", f"{_cpu_name()}, {os.cpu_count()} logical cores, {usable} of them usable by this process"),
        Finding("threads", f"{torch.get_num_threads()}, as torch.get_num_threads() says"),
        *_gpus(),
    ]


def memory() -> list[Finding]:
    """Return what an element of a parameter, its gradient and its states take, by format."""
    from fusedopt.kernels import backends

    found = []
    for name, (dtype, options) in FORMATS.items():
        parameter = torch.nn.Parameter(torch.zeros(MEMORY_ELEMENTS, dtype=dtype))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = fusedopt.AdamW([parameter], **options)
        with backends.use("tensor"):  # which compiles nothing
            optimizer.step()
        found.append(Finding(name, bytes_by_kind(optimizer)))
    return found


def bytes_by_kind(optimizer: torch.optim.Optimizer) -> str:
    """Say in a line how many bytes each element of the parameters takes, by kind; below a hundredth, as step counts, left out."""
    found = fusedopt.memory(optimizer)
    each = {name: size / max(1, found.elements) for name, size in found.bytes.items()}
    kinds = [f"{name} {size:.3g}" for name, size in each.items() if size >= 0.01]
    return f"{', '.join(kinds)}; all states {found.bytes_per_parameter:.3g}"


def compilers() -> list[Finding]:
    """Return the C compiler that Triton would call, and the headers it would include."""
    # The order in which Triton looks for one.
    wanted = os.environ.get("CC")
    path = shutil.which(wanted) if wanted else shutil.which("gcc") or shutil.which("clang")
    if path is not None:
        compiler = Finding("C compiler", path)
    elif wanted:
        remedy = f"CC={wanted} names no program: install that compiler, correct CC, or unset it"
        compiler = Finding("C compiler", f"missing: CC={wanted}", remedy)
    else:
        compiler = Finding("C compiler", "missing", "a C compiler; on Debian and Ubuntu: apt install gcc")
    scheme = "posix_prefix" if sysconfig.get_default_scheme() == "posix_local" else sysconfig.get_default_scheme()
    header = Path(sysconfig.get_path("include", scheme)) / "Python.h"
    if header.is_file():
        return [compiler, Finding("Python headers", str(header.parent))]
    remedy = f"the headers of Python; on Debian and Ubuntu: apt install python3-dev (looked for {header})"
    return [compiler, Finding("Python headers", "missing", remedy)]


def cache() -> list[Finding]:
    """Return the folder of generated kernels and what it holds."""
    from fusedopt.kernels import source

    folder = source.cache_directory()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return [Finding("folder", str(folder)), Finding("holds", f"{len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")]


def variables() -> list[Finding]:
    """Return the variables of the environment that are meant for fusedopt."""
    found = []
    for name, value in sorted(os.environ.items()):
        if name in VARIABLES:
            found.append(Finding(name, f"{value} ({VARIABLES[name]})"))
        elif name.startswith("FUSEDOPT_"):
            found.append(Finding(name, f"{value} (unknown to fusedopt, which reads {_listed(VARIABLES)})"))
    return found or [Finding("FUSEDOPT_*", f"none is set; fusedopt reads {_listed(VARIABLES)}")]


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)


def _torch_build() -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA and ROCm"


def _package(name: str, remedy: str) -> Finding:
    error = _import_error(name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed" if error else "of unknown version"
    if error is None:
        return Finding(name, version)
    if version != "not installed":
        version += f", but it cannot be imported: {error}"
    return Finding(name, version, remedy)


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # An installed package may fail in any way; the report says how.
        return f"{type(error).__name__}: {error}"
    return None


def _triton_remedy() -> str:
    if sys.platform != "linux":
        return "triton has no release for this system; GPUs are served by the rules on torch tensors"
    return 'triton compiles the kernels for GPUs; it comes with torch for CUDA, or: pip install "fusedopt[triton]"'


def _serves(what: str, obstacle: str | None = None) -> str:
    return f"serves nothing: {obstacle}" if obstacle else f"serves {what}"


def _numba_obstacle() -> str | None:
    return _import_error("numba") or _other_choice("cpu", "numba")


def _triton_obstacle() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return _import_error("triton") or _other_choice("cuda", "triton")


def _other_choice(device: str, wanted: str) -> str | None:
    from fusedopt.kernels.backends import choose

    chosen, reason = choose(torch.empty(0, device=device), None)
    return None if chosen == wanted else reason


def _cpu_name() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [_missing_gpu()]
    found = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append(Finding(f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    return found


def _missing_gpu() -> Finding:
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        remedy = "a driver of NVIDIA is here, but this torch is built without CUDA: install a build of torch for CUDA"
        return Finding("GPU", "none found by torch", remedy)
    return Finding("GPU", "none found")
