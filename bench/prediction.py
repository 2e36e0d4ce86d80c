"""What a step would take on GPUs that are not here: predicted by a roofline, and not measured.

The bytes are counted, by executing the PTX of a step on the CPU; the instructions are those of the machine code. A GPU is its
published numbers, and the share of its bandwidth that a copy has been measured to reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cases import OPTIMIZERS, Case
from .compiled import in_child
from .measure import Entrant
from .subjects import OURS

#: From the end of one kernel to the start of the next in a stream: short kernels of 2.9 µs followed each other every 3.8 µs on
#: a V100; https://developer.nvidia.com/blog/cuda-graphs
LAUNCH_SECONDS = 0.9e-6
#: The GPU whose PTX is executed to count bytes, which are the same on all.
COUNTED = "sm_90"


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: a part of how torch calls it.
        target: what kernels are compiled for.
        bandwidth: of its memory, in bytes a second, as published.
        copy_share: what of it a copy within the memory has been measured to reach, all bytes read and written counted.
        lanes: that finish an instruction of float32 in each cycle.
        clock: the boost clock, in cycles a second.
    """

    name: str
    target: str
    bandwidth: float
    copy_share: float
    lanes: int
    clock: float


GPUS = (
    # NVIDIA's data sheet of the A100 80 GB SXM. The copy: 1,727 of the 1,935 GB/s of an A800 80 GB PCIe, which has its memory;
    # https://github.com/mli/transformers-benchmarks/issues/4
    Gpu("A100", "sm_80", 2.039e12, 0.89, 6912, 1.41e9),
    # NVIDIA's data sheet of the H100 SXM. The copy: 2,903 of 3,350 GB/s; https://github.com/aigatech/vpbenchmarking
    Gpu("H100", "sm_90", 3.35e12, 0.87, 16896, 1.98e9),
    # NVIDIA's data sheet of the H200 SXM. The copy: taken to reach the same share as on the H100; no measurement was found.
    Gpu("H200", "sm_90", 4.8e12, 0.87, 16896, 1.98e9),
    # AMD's data sheet of the MI300X. The copy: 4,177 GB/s, which AMD's acceptance test with BabelStream asks for;
    # https://instinct.docs.amd.com/projects/system-acceptance
    Gpu("MI300X", "gfx942", 5.3e12, 0.79, 19456, 2.1e9),
)


@dataclass(frozen=True)
class Traffic:
    """What a step of an optimizer in float32 moves and does.

    Args:
        optimizer: its name.
        block: elements of a program.
        launches: of kernels.
        bytes_per_element: loaded and stored for each element.
        bytes_per_program: loaded for each program from tables.
        instructions_per_element: by target; of both paths, for full blocks and for ragged ones, so more than are executed.
    """

    optimizer: str
    block: int
    launches: int
    bytes_per_element: int
    bytes_per_program: int
    instructions_per_element: dict[str, float]

    def programs(self, case: Case) -> int:
        """How many programs a step on `case` has."""
        return sum(-(-math.prod(shape) // self.block) for shape in case.shapes)

    def bytes(self, case: Case) -> int:
        """What a step on `case` moves."""
        return self.bytes_per_element * case.elements + self.bytes_per_program * self.programs(case)


@dataclass
class Prediction:
    """The time of a step on a GPU, in milliseconds, and what it is made of; predicted.

    The memory's time and the instructions' overlap, so the longer of them counts, and launches are added.
    """

    optimizer: str
    case: str
    title: str
    gpu: str
    bytes: int
    milliseconds: float
    memory_milliseconds: float
    instruction_milliseconds: float
    launch_milliseconds: float


def predictions(optimizer_names: Sequence[str], cases: Sequence[Case]) -> list[Prediction]:
    """Predict the steps of ours on all GPUs."""
    counted = in_child(_count_all, optimizer_names)
    return [predict(traffic, case, gpu) for traffic in counted for case in cases for gpu in GPUS]


def _count_all(optimizer_names: Sequence[str]) -> list[Traffic]:
    return [count_traffic(name) for name in optimizer_names]


def predict(traffic: Traffic, case: Case, gpu: Gpu) -> Prediction:
    """Predict one step."""
    moved = traffic.bytes(case)
    memory = moved / (gpu.bandwidth * gpu.copy_share)
    # A ragged block takes as many instructions as a full one.
    executed = traffic.instructions_per_element[gpu.target] * traffic.block * traffic.programs(case)
    instructions = executed / (gpu.lanes * gpu.clock)
    launches = traffic.launches * LAUNCH_SECONDS
    times = (max(memory, instructions) + launches, memory, instructions, launches)
    return Prediction(traffic.optimizer, case.name, case.title, gpu.name, moved, *(1e3 * seconds for seconds in times))


def count_traffic(optimizer_name: str) -> Traffic:
    """Execute steps on one element and on one block, and read the machine code; only where Triton compiles."""
    from fusedopt.kernels.gpu_kernels import BLOCK
    from fusedopt.kernels.ptx import offline, steps, table
    from fusedopt.kernels.ptx.execute import Settings

    counted = []
    for elements in (1, BLOCK):
        entrant = Entrant(OURS, OPTIMIZERS[optimizer_name], Case.equal(1, elements))
        with steps.executing(COUNTED, Settings(races=False)) as session:
            entrant.step_with_gradients(1)
        counted.append(session.counts())
    moved = [counts.bytes_loaded + counts.bytes_stored for counts in counted]
    per_element, rest = divmod(moved[1] - moved[0], BLOCK - 1)
    if rest:
        raise RuntimeError(f"{moved} bytes were counted on 1 and {BLOCK} elements, which no line goes through")
    (kind,) = entrant.kinds()
    targets = dict.fromkeys(gpu.target for gpu in GPUS)
    instructions = {
        target: table.cost(offline.compile_update(kind, target), target).instructions_per_element() for target in targets
    }
    return Traffic(optimizer_name, BLOCK, counted[1].launches, per_element, moved[0] - per_element, instructions)
