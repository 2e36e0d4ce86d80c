"""Gradients that ranks reduce: DistributedDataParallel tells of them by its communication hook."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class Reduction:
    """The communication hooks of the DistributedDataParallel modules of a model.

    Buckets are reduced while backward goes on, and waited for when the next one is ready, or at the end.

    Args:
        model: DistributedDataParallel, or with such modules in it; or any other.
        ready: called with each parameter whose ``grad`` holds what ranks have reduced.
        takes: whether gradients are taken as soon as they are ready; otherwise they stay where torch leaves them.
    """

    def __init__(self, model: torch.nn.Module, ready: Callable[[Tensor], None], takes: Callable[[], bool]) -> None:
        self._ready, self._takes = ready, takes
        self._modules: list[Any] = []
        self._reduced: set[Tensor] = set()
        #: Parameters and gradients of buckets on their way.
        self._under_way: list[tuple[Any, list[Tensor], list[Tensor]]] = []
        # Nobody has one who has not imported it, and that takes a second.
        flat = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
        for module in model.modules():
            if isinstance(module, flat):
                raise ValueError(
                    "FullyShardedDataParallel keeps gradients in flat parameters of its own, which cannot step inside backward: "
                    "shard by torch.distributed.fsdp.fully_shard"
                )
            if isinstance(module, DistributedDataParallel):
                _check(module)
                self._modules.append(module)
                self._reduced |= {p for name, p in module.module.named_parameters() if name not in module.parameters_to_ignore}

    def reduces(self, parameter: Tensor) -> bool:
        """Whether ranks reduce the gradient of ``parameter`` after autograd has computed it."""
        return parameter in self._reduced

    def register(self) -> None:
        """Register the communication hooks."""
        for module in self._modules:
            # torch takes no hook whose annotations are text.
            module.register_comm_hook(None, lambda _, bucket, module=module: self._reduce(module, bucket))
            # Otherwise it would put a copy of each gradient into `grad` at the end of backward.
            module.reducer._set_optimizer_in_backward()

    def _reduce(self, module: Any, bucket: Any) -> Any:
        group = module.process_group
        # As torch does without a hook: to the bit.
        buffer = bucket.buffer().mul_(1.0 / group.size())
        future = dist.all_reduce(buffer, group=group, async_op=True).get_future()
        arrived = future, bucket.parameters(), bucket.gradients()
        if self._takes():
            for parameter in arrived[1]:
                parameter.grad = None  # what this rank has computed, which the bucket holds
            earlier, self._under_way = self._under_way, [arrived]
            self._take(earlier)
        else:
            future.wait()
            for parameter, gradient in zip(*arrived[1:], strict=True):
                _give(parameter, gradient, module.gradient_as_bucket_view)
        return future.then(lambda done: done.value()[0])

    def finish(self) -> None:
        """Wait for all that is under way."""
        earlier, self._under_way = self._under_way, []
        self._take(earlier)

    def _take(self, arrived: list[tuple[Any, list[Tensor], list[Tensor]]]) -> None:
        for future, parameters, gradients in arrived:
            future.wait()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
                self._ready(parameter)


@torch.no_grad()
def _give(parameter: Tensor, gradient: Tensor, is_view: bool) -> None:
    """Have ``parameter`` hold the reduced ``gradient``, which lies in memory of DistributedDataParallel."""
    if parameter.grad is None:
        parameter.grad = gradient if is_view else gradient.clone()
    else:
        parameter.grad.copy_(gradient)


def _check(module: Any) -> None:
    refused = {
        "find_unused_parameters=True": module.find_unused_parameters,
        "static_graph=True": module.static_graph,
        "mixed_precision": module.mixed_precision is not None,
    }
    for option, given in refused.items():
        if given:
            raise ValueError(
                f"DistributedDataParallel({option}) does not tell its communication hook all that a step inside backward must "
                "know: leave the option out, or step after backward"
            )
