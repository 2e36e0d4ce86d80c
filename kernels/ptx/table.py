"""What compiled kernels cost, read from their machine code, and the limits that they are held to."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs

from fusedopt.kernels import generate, gpu_kernels
from fusedopt.kernels.tables import Kind

#: A thread's registers that leave room for half of the threads on a GPU of NVIDIA, and for all on one of AMD.
MOST_REGISTERS = {**dict.fromkeys(("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"), 64), "gfx1100": 96}


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel takes.

    Args:
        target: that it was compiled for.
        registers: of a thread.
        spilled: bytes a thread keeps in memory for want of registers.
        shared: bytes of shared memory a program takes.
        occupancy: the part of the threads that a multiprocessor can hold, by registers and shared memory.
        loads: how many instructions load from global memory, by bits a thread.
        stores: as loads.
        instructions: in the machine code, those of both paths, for full and for ragged blocks.
        float64: instructions on float64 numbers.
        approximate: divisions and roots that are not correctly rounded.
        threads: of a program.
    """

    target: str
    registers: int
    spilled: int
    shared: int
    occupancy: float
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    float64: int
    approximate: int
    threads: int

    @property
    def widest_load(self) -> int:
        """Bits of the widest load."""
        return max(self.loads, default=0)

    def instructions_per_element(self, block: int = gpu_kernels.BLOCK) -> float:
        """Return the instructions of both paths over the elements that a thread updates."""
        return self.instructions * self.threads / block


@dataclass(frozen=True)
class _Multiprocessor:
    """What one holds: registers of a lane for all warps together, in units, and warps."""

    registers: int
    unit: int
    warps: int
    shared: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's instruction set manuals, per SIMD.
_MULTIPROCESSORS = {
    "sm_75": _Multiprocessor(2048, 8, 32, 65_536),
    "sm_80": _Multiprocessor(2048, 8, 64, 167_936),
    "sm_90": _Multiprocessor(2048, 8, 64, 233_472),
    "sm_100": _Multiprocessor(2048, 8, 64, 233_472),
    "sm_120": _Multiprocessor(2048, 8, 48, 102_400),
    "gfx90a": _Multiprocessor(512, 8, 8, 65_536),
    "gfx942": _Multiprocessor(512, 8, 8, 65_536),
    "gfx1100": _Multiprocessor(1536, 24, 16, 131_072),
}


def cost(compiled: Any, target: str) -> Cost:
    """Return what ``compiled``, a kernel of Triton's for ``target``, takes."""
    metadata = compiled.metadata
    read = _read_nvidia if metadata.target.backend == "cuda" else _read_amd
    numbers = read(compiled)
    return Cost(
        target=target,
        shared=metadata.shared,
        occupancy=_occupancy(target, numbers["registers"], metadata.shared, metadata.num_warps),
        threads=metadata.num_warps * metadata.target.warp_size,
        **numbers,
    )


def _occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    device = _MULTIPROCESSORS[target]
    fitting = device.registers // (-(-registers // device.unit) * device.unit)
    if shared:
        fitting = min(fitting, device.shared // shared * warps)
    if target.startswith("sm_"):  # where a program's warps share a multiprocessor
        fitting = fitting // warps * warps
    return min(fitting, device.warps) / device.warps


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    each = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code)]
    each = [name for name in each if name != "NOP"]  # fills the last line
    return {
        "registers": registers,
        "spilled": stack + local,
        "loads": _widths(each, r"LDG\b", _nvidia_bits),
        "stores": _widths(each, r"STG\b", _nvidia_bits),
        "instructions": len(each),
        "float64": sum(
            bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64|[FI]2[FI]\.\w*F64|[FI]2[FI].*F64", name)) for name in each
        ),
        "approximate": len(
            re.findall(r"^\s*(?:@!?%p\d+ )?(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)", compiled.asm["ptx"], re.MULTILINE)
        ),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia_bits(name: str) -> int:
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in name.split(".") if part in widths), 32)


def _amd_bits(name: str) -> int:
    widths = {"byte": 8, "ubyte": 8, "u8": 8, "short": 16, "ushort": 16, "b16": 16, "u16": 16, "d16": 16, "dwordx2": 64, "b64": 64}
    widths |= {"dwordx3": 96, "b96": 96, "dwordx4": 128, "b128": 128}
    return next((widths[part] for part in name.split("_") if part in widths), 32)


def _widths(names: Sequence[str], pattern: str, bits: Any) -> dict[int, int]:
    return dict(sorted(Counter(bits(name) for name in names if re.match(pattern, name)).items()))


def _read_amd(compiled: Any) -> dict[str, Any]:
    code, intermediate = compiled.asm["amdgcn"], compiled.asm["llir"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found.group(1))

    each = re.findall(r"^\s+((?:v|s|global|buffer|ds|flat|scratch)_\w+)", code, re.MULTILINE)
    # Flags and bounds that let the back end take the reciprocal or the root of its units as they are.
    approximate = r"= (?:fdiv|(?:tail )?call).*\b(?:arcp|afn|fast)\b|llvm\.amdgcn\.(?:rcp|rsq|sqrt)|(?:fdiv|llvm\.sqrt).*!fpmath"
    return {
        "registers": number("vgpr_count"),
        "spilled": 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")) + number("private_segment_fixed_size"),
        "loads": _widths(each, r"(global|buffer|flat)_load_", _amd_bits),
        "stores": _widths(each, r"(global|buffer|flat)_store_", _amd_bits),
        "instructions": len(each),
        "float64": sum(bool(re.match(r"v_\w*f64", name)) for name in each),
        "approximate": len(re.findall(approximate, intermediate)),
    }


def expected_wide_accesses(kind: Kind, threads: int) -> tuple[int, int]:
    """Return how many 128-bit loads and stores a thread makes in a full block, for the widest of the arrays of ``kind``."""
    widest = max(form.itemsize for form in kind.formats)
    arrays = [name for name, form in zip(generate.arrays(kind.update), kind.formats, strict=True) if form.itemsize == widest]
    each = gpu_kernels.BLOCK // threads * widest // 16
    written = len(arrays) - ("g" in arrays and not kind.unscale)
    return each * len(arrays), each * written


def violations(kind: Kind, found: Cost) -> list[str]:
    """Return in words the limits for kernels of aligned buckets that ``found`` exceeds."""
    loads, stores = expected_wide_accesses(kind, found.threads)
    float64, most = kind.compute.name == "float64", MOST_REGISTERS[found.target]
    checks = [
        (found.spilled == 0, f"{found.spilled} bytes are spilled"),
        (found.shared == 0, f"{found.shared} bytes of shared memory are used"),
        (found.registers <= most, f"{found.registers} registers, more than {most}"),
        (found.approximate == 0, f"{found.approximate} divisions or roots are approximate"),
        (float64 or found.float64 == 0, f"{found.float64} instructions compute in float64"),
        (loads > 0, f"a thread's {gpu_kernels.BLOCK // found.threads} elements are too few for accesses of 128 bits"),
        (found.loads.get(128, 0) >= loads, f"{found.loads.get(128, 0)} loads of 128 bits, not {loads}"),
        (found.stores.get(128, 0) >= stores, f"{found.stores.get(128, 0)} stores of 128 bits, not {stores}"),
    ]
    return [message for holds, message in checks if not holds]
