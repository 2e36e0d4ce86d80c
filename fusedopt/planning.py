"""From the parameters of an optimizer to a plan: who is there, who updates it, what must not be lost on an error."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import low_bit, paths
from fusedopt.kernels import backends, blocks, layout
from fusedopt.kernels.formats import average_dtype
from fusedopt.kernels.members import check_member, waves
from fusedopt.kernels.plan import Plan
from fusedopt.kernels.rule import Update
from fusedopt.kernels.tables import Hyperparameters, Member
from fusedopt.prepared import Prepared, as_number, levels_to_caller, new_state, same_objects

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer


def not_begun(optimizer: FusedOptimizer) -> set[int]:
    """Return the ids of parameters whose states were made for a first step that was left out; waits for devices.

    Of rules that keep no count in the state: there a state is taken for that of a parameter that has stepped.
    """
    if optimizer._counts_steps:
        return set()
    plans = [] if optimizer._prepared is None else [optimizer._prepared.plan]
    plans += [] if optimizer._in_backward is None else optimizer._in_backward.plans
    return {
        id(member.parameter)
        for plan in plans
        for part in (plan.parts if plan is not None else ())
        if part.bucket.kind.update.rule.states and not part.bucket.members[0].counted
        for member, steps in zip(part.bucket.members, part.bucket.scalars[0].tolist(), strict=True)
        if steps == 0
    }


def member_of(
    optimizer: FusedOptimizer,
    parameter: Tensor,
    index: int,
    gradient: Tensor | None,
    group: int,
    update: Update,
    not_begun: Container[int] = (),
) -> Member:
    """Return ``parameter`` with its state, missing parts made anew but not yet put into ``optimizer.state``.

    Args:
        not_begun: ids of parameters that have a state and have not stepped (default: none).
    """
    state: dict[str, Any] = optimizer.state.get(parameter) or {}
    options = optimizer.param_groups[group]
    forms = low_bit.formats(update, options, parameter, index)
    chance = any(form.chance for form in forms.values())
    missing = [name for name in update.states if not isinstance(state.get(name), Tensor)]
    # A rule that keeps no count has but one question: whether this is its first step.
    kept = update.rule.states or update.states
    whole = bool(kept) and not set(kept) & set(missing)
    began = whole and id(parameter) not in not_begun and not optimizer._begins(parameter)
    counted = optimizer._counts_steps or chance
    taken = state.get("step", 0.0 if optimizer._counts_steps else began) if counted else began
    # A state made in inference mode could not be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        new = {
            # What is kept of the parameter starts as it is, in the precision of the arithmetic.
            name: parameter.detach().to(average_dtype(parameter.dtype), copy=True)
            if name in update.average.states
            else new_state(parameter, optimizer._initial(options, name))
            for name in missing
            if name not in forms
        }
        dropped: list[str] = []
        if forms or low_bit.held_codes(update.rule, state) or low_bit.keeps_master(update.rule, state):
            initial = {name: as_number(optimizer._initial(options, name)) for name in forms if name in missing}
            made, dropped = low_bit.complete(update, forms, parameter, state, initial)
            new |= made
    scalars = tuple(as_number(state[name] if name in state else optimizer._initial(options, name)) for name in update.scalars)
    capturable = bool(options.get("capturable"))
    key = blocks.key_of(options.get("rounding_seed", 0), optimizer._number_of(parameter, index)) if chance else 0
    return Member(
        parameter,
        index,
        gradient,
        group,
        as_number(taken),
        scalars,
        counted,
        capturable,
        state,
        new,
        dropped,
        forms,
        key,
        layout.first_index(parameter) if chance else 0,
    )


def attach(optimizer: FusedOptimizer, plan: Plan, members: Sequence[Member]) -> None:
    """Complete the states of ``members``, which ``plan`` updates."""
    for member in members:
        if member.counted or member.new or member.dropped:
            optimizer.state[member.parameter] = member.state
    plan.attach()


def prepare(
    optimizer: FusedOptimizer,
    parameters: list[Tensor],
    gradients: list[Tensor | None],
    updates: list[Update],
    hyperparameters: list[Hyperparameters],
    key: object,
) -> Prepared:
    """Plan for ``parameters`` that have gradients or have had some, attach their states, and remember the plan.

    Raises:
        RuntimeError: if one of them cannot be updated; nothing has been written then.
    """
    prepared = Prepared(parameters, key)
    known, waiting = _known(optimizer, parameters, updates), not_begun(optimizer)
    members, index = [], 0
    for number, (group, update) in enumerate(zip(optimizer.param_groups, updates, strict=True)):
        for parameter in group["params"]:
            gradient = gradients[index]
            if gradient is not None or index in known:
                path, reason = paths.choose(optimizer, parameter, gradient, group)
                member = None
                try:
                    paths.check(index, parameter, gradient, group, path)
                    if path != "torch":
                        member = member_of(optimizer, parameter, index, gradient, number, update, waiting)
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
                    if path == "tensor" and group.get("fused") is None and group.get("foreach") is None:
                        warn_unfused(optimizer, reason)
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
    attach(optimizer, plan, first)
    prepared.plan = plan
    prepared.waves = [[member.index for member in wave] for wave in later]
    prepared.watch(optimizer.state)
    optimizer._prepared = prepared
    return prepared


def _known(optimizer: FusedOptimizer, parameters: list[Tensor], updates: list[Update]) -> set[int]:
    """Return the indices of parameters that rest at present, but have stepped before."""
    before = optimizer._prepared
    stepped: set[int] = set()
    if before is not None and same_objects(before.parameters, parameters):
        stepped = before.indices - before.torch_indices
    known, index = set(), 0
    for group, update in zip(optimizer.param_groups, updates, strict=True):
        for parameter in group["params"]:
            state = optimizer.state.get(parameter) or {}
            # Where a state belongs to the rule, only one that is whole tells; without, only the last plan does.
            stateful = optimizer._counts_steps or update.states
            if bool(state) and all(isinstance(state.get(n), Tensor) for n in update.states) if stateful else index in stepped:
                known.add(index)
            index += 1
    return known


def warn_unfused(optimizer: FusedOptimizer, reason: str) -> None:
    """Warn, once for each ``reason``, that parameters of ``optimizer`` have no kernel."""
    if reason not in optimizer._warned and backends.state() == (None, False):
        optimizer._warned = optimizer._warned | {reason}
        warnings.warn(
            f"{type(optimizer).__name__} runs by operations of torch, unfused, where {reason}; explain() tells for which "
            "parameters, fused=False asks for torch's own implementation",
            UserWarning,
            stacklevel=levels_to_caller(),
        )
