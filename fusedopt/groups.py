"""Parameter groups that users build by hand everywhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def no_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: weights with ``weight_decay``; biases and the parameters of norms without.

    A bias is what a module calls so, alone or between underscores (``bias``, ``in_proj_bias``, ``bias_k``); a norm is a module of
    torch.nn that normalises, or one whose class name ends in ``Norm``; any parameter of fewer than two dimensions counts as well.
    Parameters that need no gradient are left out; tied ones appear once.

    Args:
        model: whose parameters to sort.
        weight_decay: of the first group, >= 0.

    Returns:
        Dicts with "params" and "weight_decay", for any optimizer; an empty group is left out.

    Example:
        >>> optimizer = fusedopt.AdamW(fusedopt.no_decay_groups(model, 0.1), lr=3e-4)
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            undecayed = parameter.ndim < 2 or "bias" in name.split("_") or _is_norm(module)
            (kept if undecayed else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_norm(module: nn.Module) -> bool:
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, torch.nn.RMSNorm)
    return isinstance(module, norms) or type(module).__name__.endswith("Norm")
