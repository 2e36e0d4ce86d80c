"""Clipping by the norm of gradients, as a function; ``max_grad_norm`` of an optimizer does it within the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fusedopt.kernels import backends
from fusedopt.kernels.norms import factor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale gradients in place so that the norm of all of them is at most ``max_norm``; in place of torch.nn.utils'.

    .. math::
        g \leftarrow g \, \min\left(1, \frac{\text{max\_norm}}{\lVert g \rVert + 10^{-6}}\right)

    On a CPU the 2-norm is summed in float64 and in a fixed order, the same bits for any number of threads, and gradients are
    only written where they change; other norms, devices and kinds of tensors are torch's.

    Args:
        parameters: whose gradients are clipped; those without one are left out.
        max_norm: the largest norm.
        norm_type: the order of the norm, or ``inf`` (default: 2.0).
        error_if_nonfinite: raise if the norm is not finite (default: False).
        foreach: as torch has it, where torch does it (default: None).

    Returns:
        The norm before, a tensor of one element in the gradients' dtype, in float32 for bfloat16 and float16.

    Raises:
        RuntimeError: if ``error_if_nonfinite`` and the norm is infinite or not a number; gradients are as they were then.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    squares = backends.sum_of_squares(gradients) if float(norm_type) == 2.0 and gradients else None
    if squares is None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm = torch.tensor(squares, dtype=torch.float64, device="cpu").sqrt()
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot be clipped. "
            "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )
    by = factor(float(norm), float(max_norm))
    if by != 1.0:  # also where it is not a number
        torch._foreach_mul_(gradients, by)
    return norm.to(torch.promote_types(gradients[0].dtype, torch.float32))
