"""Formats of states and parameters that groups ask for, and states taken from one format into another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import word_tables
from fusedopt.kernels import blocks, layout
from fusedopt.kernels.formats import BFLOAT16_BY_CHANCE, CODES, FORMATS, MASTERS, Format, average_dtype
from fusedopt.kernels.rule import Rule, Update
from fusedopt.prepared import as_number, levels_to_caller

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

#: What ``state_format`` may name.
STATE_FORMATS = ("fp32", "bf16", "8bit")
#: Elements; the states of smaller parameters stay float32, as memory is not theirs to save and norms and biases are theirs.
SMALLEST = 4096

_FLOAT32 = FORMATS[torch.float32]


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless the formats among ``options`` are known."""
    asked = options.get("state_format")
    for one in asked.values() if isinstance(asked, Mapping) else (asked,):
        if one is not None and one not in STATE_FORMATS:
            raise ValueError(
                f"Invalid state_format: {asked!r}; it must be None, one of {', '.join(STATE_FORMATS)}, or a mapping from the names "
                "of states to these"
            )
    master = options.get("master_weights")
    if master is not None and master not in MASTERS:
        raise ValueError(f"Invalid master_weights: {master!r}; it must be None or one of {', '.join(MASTERS)}")
    if master is not None and options.get("stochastic_rounding"):
        raise ValueError(
            f"master_weights={master!r} keeps what rounding takes away, and stochastic_rounding=True does without: ask for one"
        )
    seed = options.get("rounding_seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid rounding_seed: {seed!r}; it must be a whole number from 0 to 2^64 - 1")


def check_names(asked: Any, update: Update) -> None:
    """Raise ValueError if ``asked``, a ``state_format``, names states that ``update`` does not have."""
    if not isinstance(asked, Mapping):
        return
    unknown = sorted(set(asked) - set(update.states))
    if unknown:
        raise ValueError(f"state_format names the states {unknown}, but there are {list(update.states)}: correct the names")
    for name in update.average.states:
        if asked.get(name) == "8bit":
            raise ValueError(f"state_format asks for 8 bits for {name!r}, but weights have more digits: ask for 'bf16' or 'fp32'")


def formats(update: Update, group: Mapping[str, Any], parameter: Tensor, index: int) -> dict[str, Format]:
    """Return the formats that ``group`` asks for, where dtypes do not tell: of states by name, of the parameter as "p".

    Raises:
        RuntimeError: if the parameter is none that they serve.
    """
    asked = group.get("state_format")
    found: dict[str, Format] = {}
    for name in update.rule.states:
        given = isinstance(asked, Mapping)
        one = asked.get(name) if isinstance(asked, Mapping) else asked
        if one is None:
            continue
        if one != "fp32" and ((name in update.rule.precise and not given) or parameter.numel() < SMALLEST):
            one = "fp32"
        found[name] = {"fp32": _FLOAT32, "bf16": BFLOAT16_BY_CHANCE, "8bit": CODES["signed"]}[one]
    for name in update.average.states:
        if isinstance(asked, Mapping) and asked.get(name) is not None:
            found[name] = BFLOAT16_BY_CHANCE if asked[name] == "bf16" and parameter.numel() >= SMALLEST else _FLOAT32
    for name, form in found.items():
        if form is CODES["signed"]:
            found[name] = CODES[_code(update.rule, name, {n for n, f in found.items() if f.words})]
    rounds = group.get("stochastic_rounding") and parameter.dtype != torch.float32
    if group.get("master_weights") is not None and parameter.dtype != torch.float32:
        found["p"] = MASTERS[group["master_weights"]]
    elif rounds:
        found["p"] = BFLOAT16_BY_CHANCE
    _check_served(found, parameter, index)
    return found


def _code(rule: Rule, name: str, coded: set[str]) -> str:
    """Return the code of the state ``name`` where those of ``coded`` are kept in 8 bits."""
    if name in rule.squares and any(rule.relative.get(other) == name for other in coded):
        return "root"
    if name in rule.squares or name in rule.nonnegative:
        return "size"
    return "relative" if rule.relative.get(name) in coded else "signed"


def _check_served(found: Mapping[str, Format], parameter: Tensor, index: int) -> None:
    what = f"parameter {index} (shape {tuple(parameter.shape)}, {parameter.dtype})"
    if "p" in found and parameter.dtype != torch.bfloat16:
        raise RuntimeError(
            f"master_weights and stochastic_rounding serve bfloat16 (and leave float32 as it is), but {what} is not: "
            "convert it to bfloat16, or give it a group without these options"
        )
    # Small ones as well, which would not be kept in fewer bits: what holds must not depend on a size.
    if set(found) - {"p"} and parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(
            f"state_format serves parameters of float32, bfloat16 and float16, but {what} is not: give it a group with "
            "state_format=None, where states have the parameter's dtype"
        )
    if found and not layout.is_plain_memory(layout.local(parameter)):
        raise RuntimeError(
            f"state_format, master_weights and stochastic_rounding serve plain memory, but {what} is a {type(parameter).__name__}: "
            "give it a group without these options"
        )


def held_codes(rule: Rule, state: Mapping[str, Any]) -> dict[str, Format]:
    """Return the formats of the states that ``state`` holds in codes."""
    coded = {name for name in rule.states if isinstance(state.get(f"{name}_words"), Tensor)}
    return {name: CODES[_code(rule, name, coded)] for name in rule.states if name in coded}


def keeps_master(rule: Rule, state: Mapping[str, Any]) -> bool:
    """Whether ``state`` holds a parameter's master, which is no state of ``rule``."""
    return "master" not in rule.states and isinstance(state.get("master"), Tensor)


def leave(optimizer: FusedOptimizer, loaded: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Take states that a checkpoint holds in bf16 into the parameters' dtypes, where ``own`` asks for no format.

    Args:
        optimizer: that has loaded them; its states are replaced.
        loaded: a group as the checkpoint has it.
        own: the same group before.
    """
    asked = loaded.get("state_format")
    if asked is None or own.get("state_format") is not None:
        return
    changed = set()
    for parameter in loaded["params"]:
        state = optimizer.state.get(parameter) or {}
        for name, value in state.items():
            named = isinstance(asked, Mapping) and name in asked
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16 and (named or not isinstance(asked, Mapping)):
                dtype = average_dtype(parameter.dtype) if name == "ema" else parameter.dtype
                if name != "master" and dtype != value.dtype:
                    state[name] = value.to(dtype)
                    changed.add(name)
    if changed:
        _say(f"the states {', '.join(sorted(changed))}", "state_format")


def complete(
    update: Update, wanted: Mapping[str, Format], parameter: Tensor, state: Mapping[str, Any], initial: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return what ``state`` lacks for ``wanted``, made anew or out of what it holds, and the names of what it no longer needs.

    Args:
        update: of the parameter's group.
        wanted: formats by name.
        parameter: whose state it is.
        state: as it stands; not written.
        initial: what new states start from, by name.
    """
    held = held_codes(update.rule, state)
    loaded = _unpacked(update.rule, parameter, state)
    state = _with(state, loaded)
    new: dict[str, Tensor] = {}
    kept = {name: loaded[name] for name in ("master",) if name in loaded}
    changed = []
    numbers: dict[str, Tensor] = {}
    for name in update.states:
        form, before = wanted.get(name), state.get(name)
        if isinstance(before, Tensor) and _is_as(form, before, held.get(name), parameter):
            kept |= {key: loaded[key] for key in (name, f"{name}_words") if key in loaded}
            continue
        if form is None and name not in held:
            continue  # made by the caller
        if name in update.average.states:
            start = (before if isinstance(before, Tensor) else parameter.detach()).to(torch.float32)
        elif not isinstance(before, Tensor):
            start = torch.full_like(parameter, initial[name], dtype=torch.float32, requires_grad=False)
        else:
            numbers = numbers or floats(update.rule, parameter, state)
            start = numbers[name]
            changed.append(name)
        if form is None or not form.words:
            new[name] = start.to(parameter.dtype if form is None else form.dtype)
        else:
            new[name] = start
    _encode(update.rule, wanted, parameter, state, new)
    # Adagrad of torch makes its states before the first step.
    moved = [name for name in changed if held.get(name) is wanted.get(name)]
    changed = [name for name in changed if name not in moved]
    if changed and as_number(state.get("step", 1.0)):
        _say(f"the states {', '.join(changed)}", "state_format")
    dropped = [f"{name}_words" for name in held if not wanted.get(name, _FLOAT32).words]
    if "p" not in wanted and keeps_master(update.rule, state):
        _say("the master of a parameter", "master_weights")
        dropped.append("master")
    return {**kept, **new, **_master(wanted.get("p"), parameter, state)}, dropped


def _encode(rule: Rule, wanted: Mapping[str, Format], parameter: Tensor, state: Mapping[str, Any], new: dict[str, Tensor]) -> None:
    """Put codes and words in the place of the float32 tensors of ``new`` whose format has codes."""
    names = [name for name in new if name in wanted and wanted[name].words]
    part = layout.local(parameter)
    for name in sorted(names, key=lambda name: wanted[name].name == "relative"):
        form = wanted[name]
        elements = blocks.flat(layout.local(new[name]).to(torch.float32), part)
        if not elements.any():
            new[name] = _as_codes(elements.to(torch.uint8), parameter)
            new[f"{name}_words"] = blocks.words_of(form, parameter, None)
            continue
        partner = rule.relative.get(name, "")
        of = None
        if form.name == "relative":
            codes = {key: new.get(key, state.get(key)) for key in (partner, f"{partner}_words")}
            flat = blocks.flat(layout.local(codes[partner]), part)  # type: ignore[arg-type]
            of = blocks.decode(wanted[partner], flat, codes[f"{partner}_words"], None)[1]  # type: ignore[arg-type]
            # Beside zero nothing is kept.
            elements, of = torch.where(of == 0, 0.0, elements), torch.where(of == 0, 1.0, of)
        # To nearest: what is encoded once need not be unbiased.
        middle = torch.full((elements.numel(),), 1 << 15, dtype=torch.int64, device=elements.device)
        code, words, _ = blocks.encode(form, elements, middle, of)
        new[name], new[f"{name}_words"] = _as_codes(code, parameter), blocks.words_of(form, parameter, words)


def _is_as(form: Format | None, state: Tensor, held: Format | None, parameter: Tensor) -> bool:
    """Whether ``state``, held in codes of the format ``held`` or in none, is as ``form`` wants it; None wants no codes."""
    if form is not None and form.words:
        return held is form and state.dtype == form.dtype and _in_order(state, parameter)
    return held is None and (form is None or state.dtype == form.dtype)


def _in_order(codes: Tensor, parameter: Tensor) -> bool:
    """Whether the blocks of ``codes`` are those of ``parameter`` as it lies in memory now."""
    dense = torch.empty_like(layout.local(parameter), device="meta")
    return layout.same_layout(layout.local(codes), dense)


def _as_codes(elements: Tensor, parameter: Tensor) -> Tensor:
    return layout.as_part(blocks.unflat(elements, layout.local(parameter)), parameter)


def floats(rule: Rule, parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the states of ``rule`` that ``state`` holds as plain tensors: codes decoded to float32, others as they are."""
    state = _with(state, _unpacked(rule, parameter, state))
    held = held_codes(rule, state)
    # Blocks follow the memory of the codes themselves, whatever the parameter's layout has become since.
    flat = {name: blocks.flat(layout.local(state[name])) for name in held}
    flat |= {f"{name}_words": state[f"{name}_words"] for name in held}
    values = blocks.decoded_states(held, rule.relative, flat)
    found = {name: state[name] for name in rule.states if isinstance(state.get(name), Tensor)}
    return found | {
        name: layout.as_part(blocks.unflat(value, layout.local(state[name])), parameter) for name, value in values.items()
    }


def packed(rule: Rule, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` as checkpoints hold it: see :mod:`fusedopt.word_tables`; and 16 bits of a master as two bytes.

    The backends of torch.distributed move bytes from rank to rank, but no integers of 16 bits.
    """
    found = word_tables.packed(held_codes(rule, state), state)
    if keeps_master(rule, state) and state["master"].dtype == torch.int16:
        master = state["master"]
        part = layout.local(master).clone().unsqueeze(-1).view(torch.uint8)
        found["master"] = layout.as_part(part, master, (*master.shape, 2))
    return found


def _unpacked(rule: Rule, parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what of ``state`` a checkpoint has brought as :func:`packed` made it, as steps take it.

    Raises:
        RuntimeError: if the parameter's shards cannot read it.
    """
    found = word_tables.unpacked(held_codes(rule, state), rule.relative, state, parameter)
    if keeps_master(rule, state) and state["master"].dtype == torch.uint8:
        part = layout.local(state["master"]).contiguous().view(torch.int16).squeeze(-1)
        like = torch.empty_like(layout.local(parameter), dtype=torch.int16, requires_grad=False)
        found["master"] = layout.as_part(like.copy_(part), parameter)
    return found


def _with(state: Mapping[str, Any], loaded: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return ``state`` with ``loaded`` in the place of what a checkpoint has brought: numbers have no words beside them."""
    read = {f"{name}_words" for name in loaded}
    return {**{name: value for name, value in state.items() if name not in read}, **loaded}


def _master(form: Format | None, parameter: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the master that ``form`` asks for, where ``state`` does not hold it."""
    held = state.get("master")
    if form is None or form.master is None:
        return {}
    if isinstance(held, Tensor) and held.dtype == form.master and held.shape == parameter.shape:
        return {}
    part = layout.local(parameter.detach())
    whole = part.float()
    if isinstance(held, Tensor) and held.shape == parameter.shape:
        whole = layout.local(resolved(parameter, held))
        _say("the master of a parameter", "master_weights")
    return {"master": _as_codes(blocks.split(form, blocks.flat(whole, part), _none(whole))[1], parameter)}


def _none(like: Tensor) -> Tensor:
    # Half of the last bit that is kept: to nearest.
    return torch.full((like.numel(),), 128, dtype=torch.int64, device=like.device)


def resolved(parameter: Tensor, master: Tensor) -> Tensor:
    """Return the float32 numbers of ``parameter``, bfloat16, and its ``master``."""
    form = next(form for form in MASTERS.values() if form.master == master.dtype)
    part = layout.local(parameter.detach())
    joined = blocks.join(form, blocks.flat(part), blocks.flat(layout.local(master), part))
    return _as_codes(joined, parameter)


def _say(what: str, option: str) -> None:
    warnings.warn(
        f"{what}, of a checkpoint or of an earlier step, had another format than {option} asks for, and was converted",
        UserWarning,
        stacklevel=levels_to_caller(),
    )
