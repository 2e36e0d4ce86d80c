"""Adafactor, as torch.optim has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedopt import paths
from fusedopt.kernels import backends, layout
from fusedopt.kernels.adafactor import Options, Plan, kind_of, state_shapes
from fusedopt.kernels.members import waves
from fusedopt.kernels.tables import LossScale, Member
from fusedopt.optimizer import FusedOptimizer
from fusedopt.planning import warn_unfused
from fusedopt.prepared import Prepared, as_number


class Adafactor(FusedOptimizer, torch.optim.Adafactor):
    r"""Adafactor, fused; in place of torch.optim.Adafactor.

    .. math::
        w &= t^{\tau}, \quad
        \alpha_t = \max(\epsilon_2, \text{RMS}(\theta)) \min(\alpha, 1 / \sqrt{t}), \quad
        \theta \leftarrow \theta - \alpha \lambda \theta, \\
        R_i &\leftarrow (1 - w) R_i + w \, \text{mean}_j \, g_{ij}^2, \quad
        C_j \leftarrow (1 - w) C_j + w \, \text{mean}_i \, g_{ij}^2, \quad
        V_{ij} = \frac{R_i C_j}{\max(\text{mean}_i R_i, \epsilon_1)}, \\
        u &= \frac{g}{\max(\sqrt{V}, \epsilon_1)}, \quad
        \theta \leftarrow \theta - \alpha_t \frac{u}{\max(1, \text{RMS}(u) / d)}

    Parameters, ``step`` (t, of the parameter's own), ``row_var`` (R) and ``col_var`` (C), or the ``variance`` (V) of a parameter
    of less than two dimensions, :math:`V \leftarrow (1 - w) V + w g^2`, are written in place, of any floating point dtype and
    any shape and layout. Of a parameter of more than two dimensions the last two are those of matrices.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: alpha, >= 0, the largest relative step; a number or a tensor of one element (default: 1e-2).
        beta2_decay: tau, <= 0 (default: -0.8).
        eps: epsilon_1 and epsilon_2, >= 0; None stands for the machine epsilon of a parameter's dtype (default: (None, 1e-3)).
        d: the largest root mean square of an update, >= 1 (default: 1.0).
        weight_decay: lambda, >= 0 (default: 0.0).
        foreach: True asks for torch's own implementation by lists (default: None).
        maximize: climb instead of descending (default: False).
        fused: None takes a kernel where one serves, True insists on it, False asks for torch's own (default: None).

    Raises:
        ValueError: for a hyperparameter out of range, with torch's message.
        RuntimeError: if options exclude each other; from a step, for complex parameters and sparse gradients.

    Differences from torch:
        - ``fused`` is added: torch 2.13 has no fused Adafactor.
        - Kernels run on CPUs; parameters elsewhere, and DTensors, whose sums are those of all ranks, go through torch's own (which
          torch 2.13 refuses for rows that are sharded).
        - Sums are taken in float64, and the factors of rows and columns rounded once; torch's norms are of the parameter's dtype,
          so that those of float16 overflow at 65,504. bfloat16 and float16 are computed in float32.
        - An ``eps`` whose square is zero in float32, as the 1e-30 of the paper's, keeps what it says: torch's makes NaN of a row
          of zero gradients.
        - Where ``eps`` holds None, each parameter has the machine epsilon of its own dtype; torch takes that of the first of its
          group for all.
        - A parameter without elements is passed over, where torch divides by zero.
        - States keep their dtype through a checkpoint; torch casts them to the parameter's.
        - Kernels keep the factors of rows and columns, as many numbers as the states.

    Source: Shazeer and Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost", Algorithms 4 and 5; ``eps``
    and ``lr`` as torch has them.
    """

    _torch_class = torch.optim.Adafactor
    _own_options = (("fused", None),)
    _step_defaults: ClassVar[Mapping[str, Any]] = {}
    _sparse_message = "Adafactor does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, lr, beta2_decay, eps, d, weight_decay, foreach=foreach, maximize=maximize)
        self._set_options({}, fused=fused)

    def _obstacle(self, parameter: Tensor, name: str, reason: str) -> str | None:
        if parameter.is_complex():
            raise RuntimeError("Adafactor does not support complex parameters")
        if layout.is_sharded(parameter):
            return "its sums are those of all ranks"
        if name == "triton":
            return "Adafactor has no kernel for GPUs"
        return None if name == "numba" else reason

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """Update all parameters that have gradients, as :meth:`FusedOptimizer.step`; there is no differentiable step."""
        return inspect.unwrap(FusedOptimizer.step)(self, closure, zero_grad=zero_grad)

    # --- the step is its own, for it needs sums over whole tensors -------------------------------------------------------

    def _step(self, zero_grad: bool = False) -> None:
        loss_scale = self._loss_scale()
        if loss_scale is None or not loss_scale.skips():
            self._update_all(loss_scale)
        if zero_grad:
            layout.zero_gradients([p for group in self.param_groups for p in group["params"]])

    def _update_all(self, loss_scale: LossScale | None) -> None:
        groups, parameters = self.param_groups, self._parameters()
        gradients = [p.grad for p in parameters]
        prepared, by_bucket = self._planned(parameters, gradients)
        if loss_scale is not None and loss_scale.grad_scale is not None:
            loss_scale.unscale(list(dict.fromkeys(parameters)))
            gradients = [p.grad for p in parameters]
            prepared, by_bucket = self._planned(parameters, gradients)
        plan: Any = prepared.plan
        options = [_options(group) for group in groups]
        launches = plan.launches(by_bucket, options)
        if prepared.torch_indices:  # before the kernels, for it checks while it goes
            self._torch_step([parameters[i] for i in sorted(prepared.torch_indices)], None)
            prepared.watch(self.state)
        plan.run(launches)
        group_of = [number for number, group in enumerate(groups) for _ in group["params"]]
        for wave in prepared.waves:
            members = [self._state_of(parameters[i], i, gradients[i], group_of[i]) for i in wave]
            again = Plan(members)
            self._attach_states(again, members)
            later = again.gradients(gradients)
            assert later is not None
            again.run(again.launches(later, options))

    def _planned(self, parameters: list[Tensor], gradients: list[Tensor | None]) -> tuple[Prepared, list[list[Tensor | None]]]:
        """Return a plan that holds for these, and the gradients by its buckets."""
        switches = [(group.get("fused"), group["foreach"], len(group["params"])) for group in self.param_groups]
        key = (switches, backends.state())
        prepared = self._prepared
        # The plans of waves are made, and so checked, anew.
        if prepared is None or prepared.waves or not prepared.holds(parameters, key, self.param_groups, self.state):
            prepared = self._plan(parameters, gradients, key)
        by_bucket: Any = prepared.plan.gradients(gradients) if prepared.plan and prepared.covers(gradients) else None
        if by_bucket is None:
            prepared = self._plan(parameters, gradients, key)
            assert prepared.plan is not None
            by_bucket = prepared.plan.gradients(gradients)
        return prepared, by_bucket

    def _plan(self, parameters: list[Tensor], gradients: list[Tensor | None], key: object) -> Prepared:
        prepared = Prepared(parameters, key)
        members: list[Member] = []
        group_of = [(number, group) for number, group in enumerate(self.param_groups) for _ in group["params"]]
        for index, (parameter, gradient, (number, group)) in enumerate(zip(parameters, gradients, group_of, strict=True)):
            # One that rests is planned for if it has stepped before.
            if gradient is None and not state_shapes(parameter.shape).keys() <= (self.state.get(parameter) or {}).keys():
                continue
            path, reason = paths.choose(self, parameter, gradient, group)
            member = None
            try:
                paths.check(index, parameter, gradient, group, path)
                if path != "torch":
                    member = self._state_of(parameter, index, gradient, number)
                    kind_of(member)
            except RuntimeError:
                if gradient is not None:
                    raise
                continue  # it rests, and may be as it likes until it has a gradient again
            prepared.indices.add(index)
            if member is not None:
                members.append(member)
            else:
                prepared.torch_indices.add(index)
                if group.get("fused") is None and group["foreach"] is None:
                    warn_unfused(self, reason)
        first, *later = waves(members)
        # Everything that can be refused is refused while planning, before a state is attached or a parameter changes.
        plan: Any = Plan(first)
        for wave in later:
            Plan(wave)
        self._attach_states(plan, first)
        prepared.plan = plan
        prepared.waves = [[member.index for member in wave] for wave in later]
        prepared.watch(self.state)
        self._prepared = prepared
        return prepared

    def _attach_states(self, plan: Plan, members: list[Member]) -> None:
        for member in members:
            self.state[member.parameter] = member.state
        plan.attach()

    def _state_of(self, parameter: Tensor, index: int, gradient: Tensor | None, group: int) -> Member:
        """Return ``parameter`` with its state, missing parts made anew but not yet put into ``self.state``."""
        state: dict[str, Any] = self.state.get(parameter) or {}
        like = parameter if gradient is None else gradient
        # A state made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            new = {
                name: torch.zeros_like(like) if shape == like.shape else torch.zeros(shape, dtype=like.dtype, device=like.device)
                for name, shape in state_shapes(parameter.shape).items()
                if not isinstance(state.get(name), Tensor)
            }
        return Member(
            parameter=parameter,
            index=index,
            gradient=gradient,
            group=group,
            step=as_number(state.get("step", 0.0)),
            scalars=(),
            counted=True,
            capturable=False,
            state=state,
            new=new,
        )


def _options(group: dict[str, Any]) -> Options:
    eps1, eps2 = group["eps"]
    return Options(
        as_number(group["lr"]),
        as_number(group["beta2_decay"]),
        None if eps1 is None else as_number(eps1),
        as_number(eps2),
        as_number(group["d"]),
        as_number(group["weight_decay"]),
        bool(group["maximize"]),
    )
