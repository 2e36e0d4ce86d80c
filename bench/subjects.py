"""The implementations that are measured: torch's, fusedopt's, and those of other packages where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fusedopt

from .cases import Optimizer

#: In ulps, for what torch and fusedopt compute. A step rounds the parameter two or three times, by half an ulp at most, and some
#: more inside the update: torch's own for-loop in float32 comes to 4.1 in three steps of AdamW.
ALLOWED_ULPS = 8.0
#: For packages that compute 1 - beta2^t in float32: there it is off by up to 2^-24 / 0.001, its root by half of that, and a
#: parameter that begins at zero by 390 ulps in three steps. Three steps without their decay are off by 500.
ALLOWED_ULPS_OF_OTHERS = 400.0

Build = Callable[[Optimizer, Sequence[Tensor]], Any]


@dataclass(frozen=True)
class Subject:
    """One implementation.

    Args:
        name: as reports call it.
        build: makes an optimizer of it for parameters.
        serves: whether it has an optimizer.
        device: where its parameters lie.
        package: what has to be installed, by its name for import.
        only_on_gpu: whether it refuses parameters on the CPU.
        dtype: of its parameters and gradients.
        allowed_ulps: error of a parameter beyond which it is wrong.
        allowed_error: for formats that are not meant to be exact, in the place of ulps: the relative L2 error of the way that all
            parameters have come, beyond which it is wrong.
        every_round: whether it takes part in all rounds, as ours and the baseline do, and not in the first few alone.
        remark: what a reader has to know of it.
    """

    name: str
    build: Build
    serves: Callable[[Optimizer], bool] = lambda optimizer: True
    device: str = "cpu"
    package: str | None = None
    only_on_gpu: bool = False
    dtype: torch.dtype = torch.float32
    allowed_ulps: float = ALLOWED_ULPS
    allowed_error: float | None = None
    every_round: bool = False
    remark: str = ""

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be measured here, or None."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.only_on_gpu and self.device == "cpu":
            return "needs a GPU"
        if self.device == "cuda" and not torch.cuda.is_available():
            return "torch finds no GPU"
        return None


def _torch(**implementation: bool) -> Build:
    def build(optimizer: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        known = {name: value for name, value in implementation.items() if name != "fused" or value or optimizer.torch_fuses}
        return optimizer.torch_class(parameters, **optimizer.arguments, **known)  # type: ignore[arg-type]

    return build


def _ours(optimizer: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = getattr(fusedopt, optimizer.class_name)(parameters, **optimizer.arguments, fused=True)
    return found


def _ours_with_float32_states(optimizer: Optimizer, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """States keep the dtype that they have in a checkpoint: load one with states of zeros in float32."""
    twin = torch.ones(2, requires_grad=True)
    twin.grad = torch.ones(2)
    example = _ours(optimizer, [twin])
    example.step()
    built = _ours(optimizer, parameters)
    checkpoint = built.state_dict()
    checkpoint["state"] = {
        index: {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) if part.dim() else torch.zeros_like(part)
            for name, part in example.state[twin].items()
        }
        for index, parameter in enumerate(parameters)
    }
    built.load_state_dict(checkpoint)
    return built


def from_package(package: str, class_names: dict[str, str], **arguments: Any) -> tuple[Build, Callable[[Optimizer], bool]]:
    """Build what `package` calls by `class_names` (by our names of optimizers); and whether it has an optimizer."""

    def build(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Any:
        # Defaults differ between packages, so torch's are given.
        defaults = optimizer.torch_class([torch.empty(1)], **optimizer.arguments).defaults
        known = {name: defaults[name] for name in ("lr", "betas", "eps", "momentum", "weight_decay") if name in defaults}
        with warnings.catch_warnings(action="ignore"):  # of what other packages import, and of what they deprecate
            made = getattr(importlib.import_module(package), class_names[optimizer.name])
            return made(parameters, **known, **arguments)

    return build, lambda optimizer: optimizer.name in class_names


_APEX_ADAM = from_package("apex.optimizers", {"AdamW": "FusedAdam"}, adam_w_mode=True)
_APEX_SGD = from_package("apex.optimizers", {"SGD momentum": "FusedSGD"})
_DEEPSPEED_GPU = from_package("deepspeed.ops.adam", {"AdamW": "FusedAdam"}, adam_w_mode=True)
_DEEPSPEED = from_package("deepspeed.ops.adam", {"AdamW": "DeepSpeedCPUAdam"}, adamw_mode=True, fp32_optimizer_states=True)
_BITSANDBYTES = from_package("bitsandbytes.optim", {"AdamW": "AdamW32bit"})
_OPTIMI = {"AdamW": "AdamW", "SGD momentum": "SGD"}

LOOP = Subject("torch loop", _torch(foreach=False, fused=False))
FOREACH = Subject("torch foreach", _torch(foreach=True))
FUSED = Subject("torch fused", _torch(fused=True), lambda optimizer: optimizer.torch_fuses)
OURS = Subject("fusedopt", _ours)
FUSED_FLOAT32 = replace(FUSED, name="torch fused, float32")
OURS_BFLOAT16 = Subject("fusedopt, bfloat16", _ours_with_float32_states, dtype=torch.bfloat16)

#: On the CPU. What a package has for GPUs as well is measured there, too.
ON_CPU = (
    LOOP,
    FOREACH,
    FUSED,
    OURS,
    Subject(
        "DeepSpeed CPUAdam",
        *_DEEPSPEED,
        package="deepspeed",
        allowed_ulps=ALLOWED_ULPS_OF_OTHERS,
        every_round=True,
        remark="C++ that it compiles at its first use; a call for each tensor",
    ),
    Subject(
        "bitsandbytes",
        *_BITSANDBYTES,
        package="bitsandbytes",
        allowed_ulps=ALLOWED_ULPS_OF_OTHERS,
        remark="AdamW32bit; on a CPU operations of torch, tensor by tensor",
    ),
    Subject(
        "optimi",
        *from_package("optimi", _OPTIMI),
        package="optimi",
        allowed_ulps=ALLOWED_ULPS_OF_OTHERS,
        remark="its default: on a CPU operations of torch, tensor by tensor; on a GPU its kernels in Triton",
    ),
    Subject(
        "optimi foreach",
        *from_package("optimi", _OPTIMI, foreach=True),
        package="optimi",
        allowed_ulps=ALLOWED_ULPS_OF_OTHERS,
        remark="torch's operations on lists; deprecated there, and a step overwrites the gradients",
    ),
)
#: On a GPU alone.
_ONLY_ON_GPU = (
    Subject("apex FusedAdam", *_APEX_ADAM, package="apex", allowed_ulps=ALLOWED_ULPS_OF_OTHERS),
    Subject("apex FusedSGD", *_APEX_SGD, package="apex", allowed_ulps=ALLOWED_ULPS_OF_OTHERS),
    Subject("DeepSpeed FusedAdam", *_DEEPSPEED_GPU, package="deepspeed", allowed_ulps=ALLOWED_ULPS_OF_OTHERS),
)
ON_GPU = tuple(
    replace(subject, name=f"{subject.name}, CUDA", device="cuda")
    for subject in (*ON_CPU, *_ONLY_ON_GPU)
    if subject.name not in ("torch loop", "DeepSpeed CPUAdam", "optimi foreach")
)
SUBJECTS = {subject.name: subject for subject in (*ON_CPU, *ON_GPU)}


def baseline(optimizer: Optimizer, device: str = "cpu") -> tuple[str, ...]:
    """Names of the implementations of torch of which the fastest is the baseline: the fused one where torch has it."""
    names = ("torch fused",) if optimizer.torch_fuses else ("torch loop", "torch foreach")
    return names if device == "cpu" else tuple(f"{name}, CUDA" for name in names)
