"""GPU kernels on a machine without a GPU: compiled for real targets, and their PTX executed on the CPU.

Triton compiles for any NVIDIA or AMD GPU without a driver. What it hands to an NVIDIA driver, PTX, is a text of simple
instructions; here it is translated into C, instruction by instruction, and run on the CPU, so that a kernel's very code is seen
to work, with every access checked: bounds, alignment, races, deadlocks. It models PTX and not what `ptxas` makes of it; a GPU
has not been used.

| module | what it does |
|---|---|
| ``parse`` | PTX text into statements, registers and parameters |
| ``translate``, ``floats``, ``integers``, ``memory``, ``warps`` | statements into C |
| ``execute`` | compiles the C, launches grids, reports bad accesses |
| ``driver`` | a Triton driver: ``kernel[grid](cpu_tensor, ...)`` compiles as on the GPU and is executed |
| ``steps`` | whole optimizer steps on CPU tensors |
| ``offline``, ``table`` | compiles for named GPUs; registers, spills, access widths and more, against limits |

No step imports this package. It needs Triton, and a C compiler to execute.
"""

from __future__ import annotations
