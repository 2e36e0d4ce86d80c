"""Who updates a parameter: a kernel, the rule by operations of torch, or torch's own implementation; and what none can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedopt import low_bit
from fusedopt.kernels import backends, layout
from fusedopt.kernels.tables import BY_ADDRESS
from fusedopt.settings import averaging

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

_SUPPORTED = "`fused=True` requires all the params to be floating point Tensors of supported devices: ['cpu', 'cuda']"


def _asked_for_torch(group: dict[str, Any], gradient: Tensor | None) -> str | None:
    if gradient is not None and gradient.layout != torch.strided:
        return "its gradient is sparse"
    for option, value in (("differentiable", True), ("foreach", True), ("fused", False)):
        if group.get(option) is value:
            return f"{option}={value}"
    return None


def choose(optimizer: FusedOptimizer, parameter: Tensor, gradient: Tensor | None, group: dict[str, Any]) -> tuple[str, str]:
    """Return who updates ``parameter``, a backend's name or "torch", and why.

    Raises:
        RuntimeError: if options or a sparse gradient ask for what neither torch's implementation nor ours has.
    """
    asked = _asked_for_torch(group, gradient)
    if asked is None:
        name, reason = backends.choose(parameter, gradient)
        asked = optimizer._obstacle(parameter, name, reason)
        if asked is not None and group.get("fused") and backends.state() == (None, False):
            raise RuntimeError(
                f"{_SUPPORTED}, but a parameter of shape {tuple(parameter.shape)}, {parameter.dtype}, on {parameter.device} has no "
                f"kernel: {asked}; construct the optimizer with fused=None, which takes torch's own implementation there"
            )
        if asked is None:
            if not (name == "tensor" and group.get("capturable") and parameter.device.type != "cpu"):
                return name, reason
            asked = f"capturable=True, and no kernel serves: {reason}"
    sparse = gradient is not None and gradient.layout != torch.strided
    if sparse and optimizer._sparse_message is not None:
        raise RuntimeError(optimizer._sparse_message)
    if sparse and group.get("fused"):
        raise RuntimeError(
            "`fused=True` does not support sparse gradients: construct the optimizer with fused=None, which leaves "
            "parameters with sparse gradients to torch's implementation"
        )
    lacking = optimizer._lacking(group)
    if lacking is None:
        return "torch", asked
    if sparse or group.get("differentiable"):
        raise RuntimeError(
            f"{type(optimizer).__name__} cannot step where {asked} and {lacking}: only torch's implementation takes the one, "
            "and only ours the other; change either"
        )
    # An option that torch does not know is never dropped: the rule runs, unfused as it was asked for.
    name, _ = backends.choose(parameter, gradient)
    return ("tensor" if name in BY_ADDRESS else name), f"{asked}, but {lacking}"


def check(index: int, parameter: Tensor, gradient: Tensor | None, group: dict[str, Any], path: str) -> None:
    """Raise RuntimeError if ``path`` cannot update ``parameter``, or may not because of ``fused=True``."""
    what = f"parameter {index} (shape {tuple(parameter.shape)}, {parameter.dtype}, on {parameter.device})"
    if parameter.device.type == "meta":
        prefix = f"{_SUPPORTED}, but " if group.get("fused") else ""
        raise RuntimeError(f"{prefix}{what} has no memory: call to_empty() and initialise it before the first step with a gradient")
    if path != "torch" and not (parameter.is_floating_point() or parameter.is_complex()):
        raise RuntimeError(f"{_SUPPORTED}, but {what} is not floating point: convert it, or leave it out of the optimizer")
    if group.get("fused") and path == "tensor" and not backends.disabled():
        raise RuntimeError(
            f"{_SUPPORTED}, but no kernel can update {what}: {backends.choose(parameter, gradient)[1]}; construct the "
            "optimizer with fused=None, which takes a slower path where no kernel serves"
        )
    if parameter.layout == torch.strided and layout.overlaps_itself(parameter):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location: "
            f"{what} has strides {parameter.stride()}; clone() it before making it a parameter"
        )
    if gradient is not None and (gradient.shape != parameter.shape or gradient.device != parameter.device):
        raise RuntimeError(
            f"{what} has a gradient of shape {tuple(gradient.shape)} on {gradient.device}: a gradient must have its "
            "parameter's shape and device; call zero_grad() after replacing a parameter's data"
        )


def explain(optimizer: FusedOptimizer) -> str:
    """Return a line for each parameter: who updates it and why."""
    lines: list[str] = []
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [f"parameter {len(lines) + i}" for i in range(len(group["params"]))]
        for parameter, name in zip(group["params"], names, strict=True):
            try:
                path, reason = choose(optimizer, parameter, parameter.grad, group)
                if not is_lazy(parameter):
                    check(len(lines), parameter, parameter.grad, group, path)
            except RuntimeError as error:
                path, reason = "error", str(error)
            shape = "not known yet" if is_lazy(parameter) else tuple(parameter.shape)
            dtype = str(parameter.dtype).removeprefix("torch.")
            short = "" if is_lazy(parameter) else _short_formats(optimizer, group, parameter, len(lines))
            lines.append(f"group {number}, {name}: shape {shape}, {dtype}{short}, {parameter.device} -> {path} ({reason})")
    return "\n".join(lines)


def _short_formats(optimizer: FusedOptimizer, group: dict[str, Any], parameter: Tensor, index: int) -> str:
    """Return what ``group`` asks for beside dtypes, in words."""
    if not optimizer._step_defaults:
        return ""
    update = optimizer._update(group, False)
    try:
        forms = low_bit.formats(update if group.get("ema_decay") is None else averaging(update), group, parameter, index)
    except RuntimeError as error:
        return f", {error}"
    return "".join(
        f", {'rounded' if name == 'p' and form.master is None else 'master' if name == 'p' else name} {form.title}"
        for name, form in forms.items()
    )
