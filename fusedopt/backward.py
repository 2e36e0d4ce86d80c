"""Stepping inside backward: each parameter is updated, and its gradient freed, as soon as that gradient is ready."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fusedopt.kernels.plan import Plan
from fusedopt.kernels.tables import LossScale
from fusedopt.optimizer import FusedOptimizer
from fusedopt.prepared import same_objects
from fusedopt.reduction import Reduction
from fusedopt.settings import Settings
from fusedopt.units import Norm, Unit, check_apart

#: Bytes of gradients that step together. Beside one whole step (AdamW, 200 x 50,000 elements, one thread of an EPYC, median of 60
#: interleaved rounds on a shared machine) units of 1 MiB took 1.52, 2 MiB 1.27, 4 MiB 1.13, 8 MiB 1.08, 16 MiB 1.08 times as long.
UNIT_BYTES = 8 << 20


def step_in_backward(
    model: torch.nn.Module,
    optimizer: FusedOptimizer,
    *,
    unit_bytes: int = UNIT_BYTES,
    scaler: torch.amp.GradScaler | None = None,
) -> StepInBackward:
    """Have ``backward()`` update the parameters of ``optimizer``, and free each gradient, as soon as gradients are ready.

    Args:
        model: whose gradients they are; a DistributedDataParallel, in it or around it, is given a communication hook.
        optimizer: one of fusedopt's; ``optimizer.step()`` after each backward closes the step.
        unit_bytes: parameters step together whose gradients have so many bytes, >= 0 (default: 8388608).
        scaler: the gradient scaler that scales the loss; it asks for two passes (default: None).

    Returns:
        A handle, which tells what passes of backward are for, and removes all this.

    Raises:
        TypeError: if ``optimizer`` is not one of fusedopt's.
        ValueError: if a model, or an option of the optimizer, leaves no room for it; the message says why.
        RuntimeError: if ``optimizer`` steps inside backward already.

    Example:
        >>> handle = fusedopt.step_in_backward(model, optimizer)
        >>> for x, y in batches:
        ...     loss_function(model(x), y).backward()  # updates parameters
        ...     optimizer.step()  # closes the step: hooks and schedulers see one
        ...     scheduler.step()
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"step_in_backward() takes an optimizer of fusedopt, not {type(optimizer).__name__}")
    if optimizer._in_backward is not None:
        raise RuntimeError("this optimizer steps inside backward already: remove() the handle that step_in_backward() returned")
    if unit_bytes < 0:
        raise ValueError(f"Invalid unit_bytes: {unit_bytes}; it must be 0 or more")
    return StepInBackward(model, optimizer, unit_bytes, scaler)


class StepInBackward:
    """What :func:`fusedopt.step_in_backward` returns: the hooks of a model, and what passes of backward are for."""

    def __init__(
        self, model: torch.nn.Module, optimizer: FusedOptimizer, unit_bytes: int, scaler: torch.amp.GradScaler | None
    ) -> None:
        self._optimizer, self._unit_bytes = optimizer, unit_bytes
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._parameters: list[Tensor] = []
        # By id(), as a tensor's own hash is a call of Python.
        self._unit_of: dict[int, Unit] = {}
        #: By device, the unit that parameters join which have none.
        self._open: dict[torch.device, Unit] = {}
        #: Units with gradients that are ready, in the order of the first of them.
        self._waiting: dict[Unit, None] = {}
        #: Whose gradients have been ready in this pass.
        self._seen: dict[int, Tensor] = {}
        self._norm: Norm | None = None
        self._measured: dict[int, Tensor] = {}
        #: Keeps its gradient until the step is closed, for a gradient scaler to look at.
        self._witness: Tensor | None = None
        #: What is done with a unit; None where backward leaves gradients alone.
        self._default: Callable[[Unit], None] = self._step
        self._action: Callable[[Unit], None] | None = self._default
        # Devices run backward in threads of their own.
        self._lock = threading.RLock()
        trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if not any(parameter in trained for parameter in model.parameters()):
            raise ValueError("the optimizer has none of the model's parameters: give it those of this very model")
        self._reduction = Reduction(model, self._ready, lambda: self._action is not None and self._optimizer._in_backward is self)
        try:
            self._follow()
        except BaseException:
            self._remove_hooks()
            raise
        self._reduction.register()
        optimizer._in_backward = self

    # --- what a person calls ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def accumulating(self, enabled: bool = True, *, into_momentum: bool = False) -> Iterator[None]:
        """Add up the gradients of the passes in the block, and of a later one, which is the last and updates parameters.

        Gradients stay where they are, so that memory falls in the last pass alone; or they join the first moments, as by
        ``optimizer.accumulate()``, and memory falls in all passes.

        Args:
            enabled: False makes the block one without effect, as for the last of some passes (default: True).
            into_momentum: whether gradients join the first moments; for optimizers that can ``accumulate()`` (default: False).

        Raises:
            RuntimeError: if parameters have been updated in this step; or gradients cannot join a moment, inside backward.
        """
        if not enabled:
            yield
        elif not into_momentum:
            with self._passes(None):
                yield
        else:
            if self._scaler is not None:
                raise RuntimeError("gradients that a scaler has scaled cannot join a moment: leave into_momentum out")
            with self._passes(Unit.accumulate):
                try:
                    yield
                    self._finish()
                except BaseException:
                    self._drop()
                    raise

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure the norm of the gradients of the one pass in the block, and free them; the next pass steps.

        Both passes must find the same gradients: by ``backward(retain_graph=True)`` in the block, or by another forward that
        draws the same random numbers.
        """
        if self._step_of_its_own:
            raise RuntimeError(
                f"{type(self._optimizer).__name__} has a step of its own, which measures no norm: clip, and scale losses, without "
                "stepping inside backward"
            )
        if any(parameter.grad is not None for group in self._optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError(
                "a pass measures gradients and frees them, but some have been accumulated, which it would lose: accumulate all "
                "passes of the step by accumulating(), whose gradients step() measures itself"
            )
        with self._passes(self._measure):
            self._norm = Norm()
            try:
                yield
                self._finish()
                self._norm.close()
            except BaseException:
                self._drop()
                self._norm = None
                raise
            self._measured = self._seen
            if self._scaler is not None and self._measured and id(self._witness) not in self._measured:
                self._set_apart(min(self._measured.values(), key=Tensor.numel))

    def discard(self) -> None:
        """Drop the gradients that are left, and close the step without taking it; for after an error inside backward.

        Parameters that have been updated before the error stay so.
        """
        with self._lock:
            self._reduction.finish()
            self._drop()
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            self._reset()

    def remove(self) -> None:
        """Have backward leave gradients to ``optimizer.step()`` again; those that wait for it stay."""
        with self._lock:
            self._reduction.finish()
            self._remove_hooks()
            if self._optimizer._in_backward is self:
                self._optimizer._in_backward = None

    @property
    def units(self) -> list[list[Tensor]]:
        """The parameters that step together; known after the first pass, in whose order they are gathered."""
        return [list(unit.parameters) for unit in dict.fromkeys(self._unit_of.values())]

    @property
    def plans(self) -> list[Plan | None]:
        """What the units have planned."""
        return [unit.plan for unit in dict.fromkeys(self._unit_of.values())]

    # --- inside backward --------------------------------------------------------------------------------------------------

    def _ready(self, parameter: Tensor) -> None:
        """Take note of the gradient of ``parameter``, and do what is due."""
        with self._lock:
            if self._action is None:
                return
            if not self._seen:
                self._begin()
            key, steps = id(parameter), self._steps
            if key in self._seen and self._action is not Unit.accumulate:
                raise RuntimeError(
                    "a parameter has a second gradient in this step, but the first one has been used: call optimizer.step() after "
                    "each backward, or run all but the last of a step within accumulating(); weights that reentrant checkpoints "
                    "share need use_reentrant=False"
                )
            if steps and self._norm is not None and key not in self._measured:
                raise RuntimeError("a parameter has a gradient that it had not when the norm was measured: both passes must agree")
            self._seen[key] = parameter
            if steps and parameter is self._witness and self._norm is not None:
                if not self._norm.finite and parameter.grad is not None:
                    parameter.grad.fill_(torch.inf)  # what the scaler looks for
                return
            unit = self._wait(parameter)
            if unit.complete:
                self._run(unit)
            # Units whose other parameters take no part in this pass must not pile up.
            while len(self._waiting) > 1 and sum(each.ready_bytes for each in self._waiting) > 2 * self._unit_bytes:
                self._run(next(iter(self._waiting)))

    @property
    def _steps(self) -> bool:
        return self._action is self._default

    @property
    def _step_of_its_own(self) -> bool:
        return type(self._optimizer)._step is not FusedOptimizer._step

    def _begin(self) -> None:
        if self._optimizer._swapped:
            raise RuntimeError("the parameters hold their averages: run backward after the block of swap_ema()")
        self._follow()
        if not self._steps:
            return
        self._optimizer._check_accumulated()
        if self._norm is not None:
            return
        scaled = self._scaler is not None and self._scaler.is_enabled()
        asked = "a gradient scaler" if scaled else "max_grad_norm or skip_nonfinite" if self._clips() else None
        if asked is not None:
            raise RuntimeError(
                f"{asked} must know all gradients before the first parameter is updated: run backward twice, first within "
                "measuring() with retain_graph=True; or all passes within accumulating(), which saves no memory"
            )

    def _wait(self, parameter: Tensor) -> Unit:
        """Put ``parameter`` among those that are ready in its unit."""
        unit = self._unit_of.get(id(parameter))
        if unit is None:
            unit = self._open.get(parameter.device)
            if unit is None:
                unit = self._open[parameter.device] = Unit(self._optimizer)
            unit.add(parameter)
            self._unit_of[id(parameter)] = unit
            if unit.bytes >= self._unit_bytes:
                del self._open[parameter.device]
                unit.open = False
        unit.wait(parameter)
        self._waiting[unit] = None
        return unit

    def _run(self, unit: Unit) -> None:
        assert self._action is not None
        self._action(unit)
        unit.free()
        del self._waiting[unit]

    def _finish(self) -> None:
        """Do with the units that wait what is done in this pass, though some of their gradients have not come."""
        self._reduction.finish()
        for unit in list(self._waiting):
            self._run(unit)
        self._close_units()

    def _close_units(self) -> None:
        for unit in self._open.values():
            unit.open = False
        self._open.clear()

    def _step(self, unit: Unit, loss_scale: LossScale | None = None) -> None:
        if self._norm is None or self._norm.finite or not self._skips():
            unit.step(self._norm, loss_scale or self._loss_scale())

    def _skips(self) -> bool:
        """Whether a step whose norm is not finite is left out: a scaler does so, or skip_nonfinite."""
        scaled = self._scaler is not None and self._scaler.is_enabled()
        return scaled or any(group.get("skip_nonfinite") for group in self._optimizer.param_groups)

    def _measure(self, unit: Unit) -> None:
        assert self._norm is not None
        unit.measure(self._norm, self._loss_scale())

    def _loss_scale(self) -> LossScale | None:
        measured = self._scaler is not None and self._norm is not None
        return LossScale(None, self._scaler.get_scale()) if measured and self._scaler is not None else None

    # --- between passes ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _passes(self, action: Callable[[Unit], None] | None) -> Iterator[None]:
        """Have ``action`` done with the units of the passes in the block."""
        if self._seen:
            raise RuntimeError("a pass that updates parameters is the last of its step: call optimizer.step() before another pass")
        before, self._action = self._action, action
        try:
            yield
        finally:
            self._action, self._seen = before, {}

    def close(self) -> None:
        """Step what has a gradient left, and begin another step: what ``optimizer.step()`` does."""
        with self._lock:
            optimizer = self._optimizer
            self._reduction.finish()
            asked = optimizer._loss_scale()
            if asked is not None and self._seen and self._scaler is None:
                raise RuntimeError(
                    "a gradient scaler takes this step, but backward has updated parameters by gradients that were scaled: give "
                    "it to step_in_backward(..., scaler=scaler), and run backward twice, first within measuring()"
                )
            self._follow()
            for parameter in optimizer._accumulated.parameters if optimizer._accumulated is not None else ():
                if id(parameter) not in self._seen and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)  # all of its gradients have joined the moment
            for parameter in self._parameters:
                if parameter.grad is not None and (id(parameter) not in self._seen or parameter is self._witness):
                    self._wait(parameter)
            if self._norm is None and self._clips():  # nothing has been updated yet
                self._norm = Norm()
                for unit in self._waiting:
                    unit.measure(self._norm, asked)
                self._norm.close()
            self._report()
            for unit in list(self._waiting):
                self._step(unit, asked)
                unit.free()
                del self._waiting[unit]
            self._reset()

    def _report(self) -> None:
        optimizer, norm = self._optimizer, self._norm
        if norm is None or not self._clips():
            return
        optimizer._grad_norm = norm.norms
        if not norm.finite and any(group.get("skip_nonfinite") for group in optimizer.param_groups):
            optimizer._skipped_steps = optimizer.skipped_steps + 1

    def _reset(self) -> None:
        self._close_units()
        self._seen, self._norm, self._measured = {}, None, {}

    def _drop(self) -> None:
        for unit in self._waiting:
            unit.free()
        self._waiting.clear()

    def _clips(self) -> bool:
        optimizer = self._optimizer
        if self._step_of_its_own:
            return False
        if optimizer._settings is None or not optimizer._settings.hold(optimizer.param_groups):
            optimizer._settings = Settings(optimizer)
        return optimizer._settings.clipping is not None

    def _follow(self) -> None:
        """Take up parameters that have joined the optimizer, or are trained now."""
        groups = self._optimizer.param_groups
        parameters = [parameter for group in groups for parameter in group["params"]]
        if not same_objects(parameters, self._parameters):
            if any(group.get("differentiable") for group in groups):
                raise ValueError("differentiable=True asks for a step that autograd can pass through, and none can inside backward")
            check_apart(parameters)
            self._parameters = parameters
            for parameter in set(self._hooks) - set(parameters):
                self._hooks.pop(parameter).remove()
            for unit in dict.fromkeys(self._unit_of.values()):
                unit.regroup()
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._hooks and not self._reduction.reduces(parameter):
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._ready)

    def _set_apart(self, witness: Tensor) -> None:
        unit = self._unit_of.pop(id(witness))
        unit.leave(witness)
        self._witness = witness

    def _remove_hooks(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
