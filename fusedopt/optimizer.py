"""What all fused optimizers share: from parameter groups to plans, and whatever torch's optimizers promise around a step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._profiler import _RecordFunctionFast
from torch._compile import _disable_dynamo
from torch.autograd import profiler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks, _use_grad_for_differentiable

from fusedopt import checkpoints, low_bit, masters, paths, planning
from fusedopt.accumulation import Accumulating
from fusedopt.averages import Averaging
from fusedopt.kernels import backends, layout
from fusedopt.kernels.norms import Clipping
from fusedopt.kernels.plan import Plan
from fusedopt.kernels.rule import Update
from fusedopt.kernels.tables import Hyperparameters, Launch, LossScale
from fusedopt.options import TakingOptions
from fusedopt.prepared import Prepared, TorchView
from fusedopt.settings import FORMAT_OPTIONS, IMPLEMENTATION_OPTIONS, Settings

if TYPE_CHECKING:
    from fusedopt.backward import StepInBackward


class FusedOptimizer(TakingOptions, Accumulating, Averaging):
    """The part of an optimizer that runs fused kernels; stands before torch's class among the bases.

    A subclass names its update for a group in :meth:`_update`; everything else follows from the update's rule.
    """

    # Declared by the class: as an attribute of the instance, deepcopy and pickle would lose it.
    _step_supports_amp_scaling = True
    #: torch's class of the same optimizer, whose step serves fused=False, foreach=True and differentiable=True.
    _torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    #: Whether ``state["step"]`` counts a parameter's steps.
    _counts_steps: ClassVar[bool] = True
    #: What to say of sparse gradients; None if torch's own implementation takes them.
    _sparse_message: ClassVar[str | None] = None

    _settings: Settings | None = None
    _prepared: Prepared | None = None
    _warned: frozenset[str] = frozenset()
    #: The versions of parameters that have masters, after the last step.
    _versions: dict[Tensor, int] | None = None
    _grad_norm: Tensor | None = None
    _skipped_steps: Tensor | None = None
    #: What updates parameters inside backward; see fusedopt.step_in_backward.
    _in_backward: StepInBackward | None = None
    #: Plans whose tables CUDA graphs read when they are replayed; they must live as long.
    _captured: Sequence[Plan] = ()

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        """Return the update of ``group``; ``decays`` tells whether any group has a weight decay."""
        raise NotImplementedError

    def _initial(self, group: dict[str, Any], name: str) -> Any:  # noqa: ARG002  # for subclasses
        """Return the number that the state or scalar ``name`` of a parameter of ``group`` starts from."""
        return 0.0

    def _number_of(self, parameter: Tensor, index: int) -> int:  # noqa: ARG002  # for optimizers of some parameters
        """Return the number of ``parameter``, at ``index`` in the groups, from which what it is rounded by follows."""
        return index

    def _lacking(self, group: dict[str, Any]) -> str | None:
        """Return which option of ``group`` torch's own implementation does not know, or None."""
        for name in ("max_grad_norm", "skip_nonfinite", "ema_decay", *FORMAT_OPTIONS):
            if group.get(name) not in (None, False):
                return f"{name}={group[name]}"
        return self._torch_lacks(group)

    def _torch_lacks(self, group: dict[str, Any]) -> str | None:  # noqa: ARG002  # for subclasses
        """Return which option of this class torch's own implementation does not know, or None."""
        return None

    def _obstacle(self, parameter: Tensor, name: str, reason: str) -> str | None:  # noqa: ARG002  # for subclasses
        """Return why ``parameter`` goes to torch's own implementation and not to the backend ``name``, or None."""
        return None

    # --- what torch.optim.Optimizer promises ---

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``func`` between the hooks of steps and with a name for profilers, as torch wraps the step of each class.

        Where there are neither hooks nor profilers, it leaves out what serves them: 20 of the 60 microseconds of a small step.
        """
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def wrapper(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                torch.compiler.is_compiling()
                or profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            ):
                return hooked(self, *args, **kwargs)
            # For observers that are not torch's profiler.
            with _RecordFunctionFast(f"Optimizer.step#{type(self).__name__}.step"):
                result = func(self, *args, **kwargs)
                # A closure may have added some.
                for hook in (*self._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):
                    hook(self, args, kwargs)
                return result

        return wrapper

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Update all parameters that have gradients, in place; wholly, or not at all if an error is raised.

        Args:
            closure: reevaluates the model and returns the loss (default: None).
            zero_grad: whether to leave all gradients zero, in the same pass; also where the step itself is left out
                (default: False).

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: if ``fused=True`` and a kernel cannot serve a parameter; or a parameter is on the meta device,
                overlaps itself, or differs from its gradient in shape or device.
        """
        if self._swapped:
            raise RuntimeError("the parameters hold their averages: step after the block of swap_ema()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._check_accumulated()
            if self._in_backward is None:
                self._complete_gradients()
            # Dynamo compiles what its own code calls, frame by frame, unless told not to.
            if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
                self._step_uncompiled(zero_grad)
            else:  # without the wrapper, which costs as much as a small kernel
                self._step_or_close(zero_grad)
            self._accumulated = None
        except BaseException:
            # A gradient scaler takes these back after a good step alone; the next step may be none of its.
            vars(self).pop("found_inf", None)
            vars(self).pop("grad_scale", None)
            raise
        return loss

    def state_dict(self, *, format: str | None = None) -> dict[str, Any]:  # noqa: A002  # as numpy and torch call it
        """Return the state as torch.optim does; step counts and codes are copies.

        Args:
            format: "torch" for one that torch's optimizer of the same name loads: states in short formats as float32, without
                masters, averages and options that it does not have (default: None, everything as it is kept).

        Raises:
            ValueError: for another ``format``.
        """
        if format not in (None, "torch"):
            raise ValueError(f"Invalid format: {format!r}; it must be None or 'torch'")
        not_begun = planning.not_begun(self)
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        left_out = {index for index, parameter in enumerate(parameters) if id(parameter) in not_begun}
        state_dict = checkpoints.without(checkpoints.without_shared_scalars(super().state_dict()), left_out)
        if format == "torch":
            return checkpoints.as_torchs(self, state_dict)
        return checkpoints.with_codes(self, checkpoints.without_defaults(state_dict, self.own_options()))

    def __getstate__(self) -> dict[str, Any]:
        not_begun = planning.not_begun(self)
        left_out = {parameter for parameter in self.state if id(parameter) in not_begun}
        return checkpoints.without(checkpoints.without_shared_scalars(super().__getstate__()), left_out)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class or torch's has written, by copy.

        States keep their dtype, as torch's do not; those that ``state_format`` wants in another format are converted by the next
        step, with a warning. Options that the checkpoint lacks, and those that choose an
        implementation, stay what they are; a checkpoint lacks those of our own that were at their defaults, so that it is
        as torch's.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: if its groups are not this optimizer's in number or size, or its codes are of another version.
        """
        checkpoints.check_version(state_dict)
        before = [dict(group) for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: checkpoints.shield(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, own in zip(self.param_groups, before, strict=True):
            low_bit.leave(self, group, own)
            for name in (*IMPLEMENTATION_OPTIONS, *FORMAT_OPTIONS):
                group.pop(name, None)
                group.update({name: own[name]} if name in own else {})
            group.pop(checkpoints.VERSION_KEY, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._prepared = self._versions = self._accumulated = None
        if "state" in state:
            checkpoints.unshield(state["state"])
        for group, own in zip(state.get("param_groups", ()), getattr(self, "param_groups", ()), strict=False):
            for name, value in own.items():
                group.setdefault(name, value)
        super().__setstate__(state)

    # --- the step ---------------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def _step_uncompiled(self, zero_grad: bool) -> None:
        self._step_or_close(zero_grad)

    def _step_or_close(self, zero_grad: bool) -> None:
        if self._in_backward is None:
            self._step(zero_grad)
        else:
            self._in_backward.close()

    def _step(self, zero_grad: bool = False) -> None:
        loss_scale = self._loss_scale()
        groups, parameters = self.param_groups, self._parameters()
        settings = self._settings
        if settings is None or not settings.hold(groups):
            settings = self._settings = Settings(self)
        zero_grad |= settings.zero_grad
        if loss_scale is not None and not any(map(backends.decides_on_device, parameters)) and loss_scale.skips():
            if zero_grad:
                layout.zero_gradients(parameters)
            return
        updates, hyperparameters = settings.updates, settings.hyperparameters
        key = (updates, settings.switches, [len(group["params"]) for group in groups], backends.state())
        prepared = self._prepared
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._check_capture()
        plan = None
        # The plans of waves are made, and so checked, anew.
        if prepared is not None and not prepared.waves and prepared.holds(parameters, key, groups, self.state):
            plan = prepared.plan
        gradients: list[Tensor | None] = []
        by_part: Sequence[list[Tensor | None] | None] | None = None
        if plan is not None and prepared is not None and prepared.covers_all and plan.unchanged():
            by_part = [None] * len(plan.parts)  # thousands of gradients are not even listed
        else:
            gradients = [p.grad for p in parameters]
            if plan is not None and prepared is not None and prepared.covers(gradients):
                by_part = plan.gradients(gradients)
        if by_part is None or prepared is None:
            if capturing:
                raise RuntimeError(
                    f"a CUDA graph captures a step of {type(self).__name__} that has not been planned: take a step outside of the "
                    "capture first, with the same parameters, groups and kinds of gradients"
                )
            prepared = planning.prepare(self, parameters, gradients, updates, hyperparameters, key)
            assert prepared.plan is not None
            by_part = prepared.plan.gradients(gradients)
            assert by_part is not None
        assert prepared.plan is not None
        if capturing and prepared.plan not in self._captured:
            self._captured = [*self._captured, prepared.plan]
        clipping = settings.clipping
        if clipping is not None and prepared.waves:
            raise RuntimeError(
                "max_grad_norm and skip_nonfinite measure each gradient once, but parameters share memory or are listed twice: "
                "leave the doubles out, or clip by fusedopt.clip_grad_norm_"
            )
        masters.rebuild(self, prepared)
        # What waves have yet to read must not be zero before.
        launches = prepared.plan.launches(
            by_part, hyperparameters, loss_scale, zero_grad and not prepared.waves, clipping is not None
        )
        if clipping is not None and not self._clip(prepared.plan, launches, clipping):
            launches = [None] * len(launches)
        if prepared.torch_indices:  # before the kernels, for it checks while it goes
            self._torch_step([parameters[i] for i in sorted(prepared.torch_indices)], loss_scale)
            prepared.watch(self.state)
        prepared.plan.run(launches)
        for wave in prepared.waves:
            self._run_wave(wave, prepared, gradients, updates, hyperparameters, loss_scale)
        masters.remember(self, prepared)
        if zero_grad and (prepared.waves or prepared.torch_indices or not any(launches)):
            layout.zero_gradients(parameters)

    def _parameters(self) -> list[Tensor]:
        """Return all parameters: the very list that was planned for, where none of thousands need be touched to see that."""
        known = None if self._prepared is None else self._prepared.listed(self.param_groups, self.state)
        return [p for group in self.param_groups for p in group["params"]] if known is None else known

    def _clip(self, plan: Plan, launches: Sequence[Launch | None], clipping: Clipping) -> bool:
        """Have ``launches`` clip gradients; return False where the host leaves the step out."""
        outcome = plan.clip(launches, clipping)
        self._grad_norm = outcome.norms
        if not clipping.skip_nonfinite:
            return True
        finite = outcome.finite
        if self._skipped_steps is None or self._skipped_steps.device != finite.device:
            before = 0 if self._skipped_steps is None else int(self._skipped_steps)
            with torch.inference_mode(False):  # it outlives the mode
                self._skipped_steps = torch.full((), before, dtype=torch.int64, device=finite.device)
        self._skipped_steps += ~finite
        return plan.decides_on_device or bool(finite)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients in the last step, in float64, before it was clipped; by group where a group clips alone.

        None before the first step with ``max_grad_norm`` or ``skip_nonfinite``. On a GPU it is a tensor of its own memory
        that the device may still be about to write.
        """
        norms = self._grad_norm
        return norms if norms is None or len(norms) > 1 else norms[0]

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps ``skip_nonfinite`` has left out since this optimizer was made: one whole number, on its device."""
        return torch.zeros((), dtype=torch.int64, device="cpu") if self._skipped_steps is None else self._skipped_steps

    def _parameters_are_back(self) -> None:
        if self._versions is not None:
            self._versions.update({parameter: parameter._version for parameter in self._versions})

    def _check_capture(self) -> None:
        # A rule that counts steps would have its bias corrections frozen in the graph.
        if self._counts_steps and not all(group.get("capturable") for group in self.param_groups):
            raise RuntimeError(
                f"Attempting CUDA graph capture of step() for an instance of {type(self).__name__} but param_groups' capturable "
                "is False: construct the optimizer with capturable=True"
            )

    def _loss_scale(self) -> LossScale | None:
        # torch.amp.GradScaler sets both for the time of the step.
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        return None if found_inf is None and grad_scale is None else LossScale(found_inf, grad_scale)

    def _hyperparameter(self, group: dict[str, Any], name: str) -> Any:
        if name in ("beta1", "beta2") and "betas" in group:
            return group["betas"][int(name[-1]) - 1]
        return group[name]

    def _run_wave(
        self,
        wave: list[int],
        prepared: Prepared,
        gradients: list[Tensor | None],
        updates: list[Update],
        hyperparameters: list[Hyperparameters],
        loss_scale: LossScale | None,
    ) -> None:
        parameters = prepared.parameters
        if loss_scale is not None:
            # The gradient of a parameter that is listed twice has been unscaled by its first step.
            earlier = {id(gradients[i]) for i in range(len(gradients)) if i not in wave}
            if not loss_scale.skips():
                loss_scale.unscale([parameters[i] for i in wave if id(gradients[i]) not in earlier])
                gradients = [p.grad for p in parameters]
            loss_scale = LossScale(loss_scale.found_inf, None)
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        members = [planning.member_of(self, parameters[i], i, gradients[i], group_of[i], updates[group_of[i]]) for i in wave]
        plan = Plan(members, updates, [prepared.backends[i] for i in wave])
        planning.attach(self, plan, members)
        by_part = plan.gradients(gradients)
        assert by_part is not None
        plan.run(plan.launches(by_part, hyperparameters, loss_scale))

    def _torch_step(self, parameters: list[Tensor], loss_scale: LossScale | None) -> None:
        assert self._torch_class is not None
        if loss_scale is not None:
            if loss_scale.skips():
                return
            loss_scale.unscale(parameters)
        chosen = set(map(id, parameters))
        # foreach and fused cannot take what they are not asked for, such as sparse gradients.
        groups = [
            {**group, "params": [p for p in group["params"] if id(p) in chosen], "fused": False} for group in self.param_groups
        ]
        # Without the wrapper that runs hooks, which torch puts around the step of each class it has built.
        inspect.unwrap(self._torch_class.step)(TorchView(self, groups))

    def explain(self) -> str:
        """Return for each parameter, a line each, who updates it and why.

        A path is "numba" or "triton" (a fused kernel), "tensor" (the rule by operations of torch) or "torch" (torch's own
        implementation). A parameter without a gradient is explained as if it had a dense one.
        """
        return paths.explain(self)
