"""What all fused optimizers share: from parameter groups to plans, and whatever torch's optimizers promise around a step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _use_grad_for_differentiable

from fusedopt import checkpoints, paths
from fusedopt.kernels import backends
from fusedopt.kernels.members import check_member, waves
from fusedopt.kernels.plan import Plan
from fusedopt.kernels.rule import Update
from fusedopt.kernels.tables import Hyperparameters, LossScale, Member
from fusedopt.prepared import Prepared, TorchView, levels_to_caller, new_state, same_objects
from fusedopt.settings import IMPLEMENTATION_OPTIONS, Settings, as_number


class FusedOptimizer(torch.optim.Optimizer):
    """The part of an optimizer that runs fused kernels; stands before torch's class among the bases.

    A subclass names its update for a group in :meth:`_update`; everything else follows from the update's rule.
    """

    # Declared by the class: as an attribute of the instance, deepcopy and pickle would lose it.
    _step_supports_amp_scaling = True
    #: torch's class of the same optimizer, whose step serves fused=False, foreach=True and differentiable=True.
    _torch_class: ClassVar[type[torch.optim.Optimizer] | None] = None
    #: Whether ``state["step"]`` counts a parameter's steps.
    _counts_steps: ClassVar[bool] = True
    #: Options that torch's class does not have, with what they are in its checkpoints.
    _own_options: ClassVar[tuple[tuple[str, Any], ...]] = ()
    #: What to say of sparse gradients; None if torch's own implementation takes them.
    _sparse_message: ClassVar[str | None] = None

    _settings: Settings | None = None
    _prepared: Prepared | None = None
    _warned: frozenset[str] = frozenset()
    #: Plans whose tables CUDA graphs read when they are replayed; they must live as long.
    _captured: Sequence[Plan] = ()

    def _update(self, group: dict[str, Any], decays: bool) -> Update:
        """Return the update of ``group``; ``decays`` tells whether any group has a weight decay."""
        raise NotImplementedError

    def _set_options(self, **options: Any) -> None:
        """Add options that torch's constructor does not take to all groups."""
        if options.get("fused"):
            if self.defaults["differentiable"]:
                raise RuntimeError("`fused` does not support `differentiable`")
            if self.defaults.get("foreach"):
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)

    def _initial(self, group: dict[str, Any], name: str) -> Any:  # noqa: ARG002  # for subclasses
        """Return the number that the state or scalar ``name`` of a parameter of ``group`` starts from."""
        return 0.0

    def _torch_lacks(self, group: dict[str, Any]) -> str | None:  # noqa: ARG002  # for subclasses
        """Return which option of ``group`` torch's own implementation does not know, or None."""
        return None

    # --- what torch.optim.Optimizer promises ---

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients, in place; wholly, or not at all if an error is raised.

        Args:
            closure: reevaluates the model and returns the loss (default: None).

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: if ``fused=True`` and a kernel cannot serve a parameter; or a parameter is on the meta device,
                overlaps itself, or differs from its gradient in shape or device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            # Dynamo compiles what its own code calls, frame by frame, unless told not to.
            if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:
                self._step_uncompiled()
            else:  # without the wrapper, which costs as much as a small kernel
                self._step()
        except BaseException:
            # A gradient scaler takes these back after a good step alone; the next step may be none of its.
            vars(self).pop("found_inf", None)
            vars(self).pop("grad_scale", None)
            raise
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch.optim does; step counts are copies."""
        return checkpoints.without_defaults(checkpoints.without_shared_scalars(super().state_dict()), self._own_options)

    def __getstate__(self) -> dict[str, Any]:
        return checkpoints.without_shared_scalars(super().__getstate__())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that this class or torch's has written, by copy.

        States keep their dtype, as torch's do not. Options that the checkpoint lacks, and those that choose an
        implementation, stay what they are; a checkpoint lacks those of our own that were at their defaults, so that it is
        as torch's.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ValueError: if its groups are not this optimizer's in number or size.
        """
        before = [dict(group) for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: checkpoints.shield(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, own in zip(self.param_groups, before, strict=True):
            group.update({name: own[name] for name in IMPLEMENTATION_OPTIONS if name in own})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._prepared = None
        if "state" in state:
            checkpoints.unshield(state["state"])
        for group, own in zip(state.get("param_groups", ()), getattr(self, "param_groups", ()), strict=False):
            for name, value in own.items():
                group.setdefault(name, value)
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self._own_options:
                group.setdefault(name, value)

    # --- the step ---------------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def _step_uncompiled(self) -> None:
        self._step()

    def _step(self) -> None:
        loss_scale = self._loss_scale()
        groups = self.param_groups
        parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        if loss_scale is not None and not any(map(backends.decides_on_device, parameters)) and loss_scale.skips():
            return
        settings = self._settings
        if settings is None or not settings.hold(groups):
            settings = self._settings = Settings(self)
        updates, hyperparameters = settings.updates, settings.hyperparameters
        key = (updates, settings.switches, [len(group["params"]) for group in groups], backends.state())
        prepared = self._prepared
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._check_capture()
        plan = None
        # The plans of waves are made, and so checked, anew.
        if prepared is not None and not prepared.waves and prepared.holds(parameters, key, self.state):
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
            prepared = self._prepare(parameters, gradients, updates, hyperparameters, key)
            assert prepared.plan is not None
            by_part = prepared.plan.gradients(gradients)
            assert by_part is not None
        assert prepared.plan is not None
        if capturing and prepared.plan not in self._captured:
            self._captured = [*self._captured, prepared.plan]
        launches = prepared.plan.launches(by_part, hyperparameters, loss_scale)
        if prepared.torch_indices:  # before the kernels, for it checks while it goes
            self._torch_step([parameters[i] for i in sorted(prepared.torch_indices)], loss_scale)
            prepared.watch(self.state)
        prepared.plan.run(launches)
        for wave in prepared.waves:
            self._run_wave(wave, prepared, gradients, updates, hyperparameters, loss_scale)

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
        members = [self._member(parameters[i], i, gradients[i], group_of[i], updates[group_of[i]]) for i in wave]
        plan = Plan(members, updates, [prepared.backends[i] for i in wave])
        self._attach(plan, members)
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

    # --- planning ---------------------------------------------------------------------------------------------------------

    def _member(self, parameter: Tensor, index: int, gradient: Tensor | None, group: int, update: Update) -> Member:
        """Return ``parameter`` with its state, missing parts made anew but not yet put into ``self.state``."""
        state: dict[str, Any] = self.state.get(parameter) or {}
        missing = [name for name in update.states if not isinstance(state.get(name), Tensor)]
        # A rule that keeps no count has but one question: whether this is its first step.
        taken = state.get("step", 0.0) if self._counts_steps else bool(update.states) and not missing
        # A state made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            new = {name: new_state(parameter, self._initial(self.param_groups[group], name)) for name in missing}
        scalars = tuple(
            as_number(state[name] if name in state else self._initial(self.param_groups[group], name)) for name in update.scalars
        )
        capturable = bool(self.param_groups[group].get("capturable"))
        return Member(parameter, index, gradient, group, as_number(taken), scalars, self._counts_steps, capturable, state, new)

    def _attach(self, plan: Plan, members: Sequence[Member]) -> None:
        for member in members:
            if member.counted or member.new:
                self.state[member.parameter] = member.state
        plan.attach()

    def _prepare(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        updates: list[Update],
        hyperparameters: list[Hyperparameters],
        key: object,
    ) -> Prepared:
        prepared = Prepared(parameters, key)
        known = self._known(parameters, updates)
        members, index = [], 0
        for number, (group, update) in enumerate(zip(self.param_groups, updates, strict=True)):
            for parameter in group["params"]:
                gradient = gradients[index]
                if gradient is not None or index in known:
                    path, reason = paths.choose(self, parameter, gradient, group)
                    member = None
                    try:
                        paths.check(index, parameter, gradient, group, path)
                        if path != "torch":
                            member = self._member(parameter, index, gradient, number, update)
                            check_member(member, update, path)
                    except RuntimeError:
                        if gradient is not None:
                            raise
                        index += 1  # it rests, and may be as it likes until it has a gradient again
                        continue
                    prepared.indices.add(index)
                    if member is None:
                        prepared.torch_indices.add(index)
                        if gradient is not None and gradient.layout != torch.strided:
                            prepared.sparse_indices.add(index)
                    else:
                        if path == "tensor" and group["fused"] is None and group.get("foreach") is None:
                            self._warn(reason)
                        members.append(member)
                        prepared.backends[index] = path
                index += 1
        first, *later = waves(members)
        # Everything that can be refused is refused while planning, before a state is attached or a parameter changes.
        plan = Plan(first, updates, [prepared.backends[member.index] for member in first])
        for wave in later:
            Plan(wave, updates, [prepared.backends[member.index] for member in wave])
        for owner, step, scalars in {(member.group, member.step, member.scalars) for member in members}:
            own = hyperparameters[owner]
            if not any(isinstance(value, Tensor) for value in own.values):
                updates[owner].coefficients(step + 1.0, scalars, own.maximize, [float(value) for value in own.values])
        self._attach(plan, first)
        prepared.plan = plan
        prepared.waves = [[member.index for member in wave] for wave in later]
        prepared.watch(self.state)
        self._prepared = prepared
        return prepared

    def _known(self, parameters: list[Tensor], updates: list[Update]) -> set[int]:
        """Return the indices of parameters that rest at present, but have stepped before."""
        before = self._prepared
        stepped: set[int] = set()
        if before is not None and same_objects(before.parameters, parameters):
            stepped = before.indices - before.torch_indices
        known, index = set(), 0
        for group, update in zip(self.param_groups, updates, strict=True):
            for parameter in group["params"]:
                state = self.state.get(parameter) or {}
                # Where a state belongs to the rule, only one that is whole tells; without, only the last plan does.
                stateful = self._counts_steps or update.states
                if bool(state) and all(isinstance(state.get(n), Tensor) for n in update.states) if stateful else index in stepped:
                    known.add(index)
                index += 1
        return known

    def _warn(self, reason: str) -> None:
        if reason not in self._warned and backends.state() == (None, False):
            self._warned = self._warned | {reason}
            warnings.warn(
                f"{type(self).__name__} runs by operations of torch, unfused, where {reason}; explain() tells for which "
                "parameters, fused=False asks for torch's own implementation",
                UserWarning,
                stacklevel=levels_to_caller(),
            )

    def explain(self) -> str:
        """Return for each parameter, a line each, who updates it and why.

        A path is "numba" or "triton" (a fused kernel), "tensor" (the rule by operations of torch) or "torch" (torch's own
        implementation). A parameter without a gradient is explained as if it had a dense one.
        """
        return paths.explain(self)
