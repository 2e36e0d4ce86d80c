"""`python -m fusedopt check FILE`: rules of one's own, compiled for GPUs that are not here, and their PTX executed on a CPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusedopt.custom import Rule, RuleError, RuleOptimizer
from fusedopt.kernels import backends
from fusedopt.kernels.rule import Update

DTYPES = (torch.float32, torch.bfloat16)
DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_120")
#: What optimizers are tried on; the last two blocks are ragged and the last tensor empty.
SIZES = (1, 1024, 2053, 77, 0)
STEPS = 3
_TITLES = ("format", "target", "registers", "spilled", "shared", "occupancy", "128-bit loads, stores", "instructions/element")


class CheckError(Exception):
    """What stands in the way of a check, and what to do."""


def main(arguments: Sequence[str]) -> int:
    """Check the file that ``arguments`` name; return 0 if all is well, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt check",
        description="Compile the rules of a file for GPUs, read the machine code, and execute the PTX on a CPU.",
    )
    parser.add_argument("file", type=Path, help="a Python file with Rule objects or RuleOptimizer classes")
    parser.add_argument("--target", nargs="+", default=DEFAULT_TARGETS, metavar="GPU", help=f"default: {' '.join(DEFAULT_TARGETS)}")
    chosen = parser.parse_args(arguments)
    try:
        return _check(chosen.file, chosen.target)
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _check(file: Path, targets: Sequence[str]) -> int:
    obstacle = backends.triton_obstacle()
    if importlib.util.find_spec("triton") is None:
        raise CheckError(str(obstacle))
    from fusedopt.kernels.ptx import driver, execute

    unknown = [target for target in targets if target not in driver.TARGETS]
    if unknown:
        raise CheckError(f"--target {' '.join(unknown)} is not known; there are {', '.join(driver.TARGETS)}")
    found = find(_imported(file))
    if not found:
        raise CheckError(f"{file} defines no Rule and no RuleOptimizer class: see fusedopt.custom for how to write one")
    executes_on = next((target for target in targets if target.startswith("sm_")), "sm_90")
    failures = 0
    for name, subject in found.items():
        update = Update(subject if isinstance(subject, Rule) else subject.rule)
        print(f"{name}: states {', '.join(update.states) or 'none'}; hyperparameters {', '.join(update.hyperparameters) or 'none'}")
        try:
            exceeded = _print_costs(update, targets)
            for message in exceeded:
                print(f"  exceeded: {message}")
            reason = execute.obstacle()
            problem = f"not executed: {reason}" if reason else _execute(subject, executes_on)
        except (RuntimeError, NotImplementedError) as error:
            # From Triton, or of what the executor found: both say what and where.
            exceeded, problem = [], str(error)
        print(f"  {problem}" if problem else f"  executed: the PTX for {executes_on} on a CPU; bits equal to NumPy's and Numba's")
        failures += bool(exceeded) + bool(problem)
    return int(failures > 0)


def _imported(file: Path) -> types.ModuleType:
    if not file.is_file():
        raise CheckError(f"{file} is not a file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise CheckError(f"{file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    try:
        spec.loader.exec_module(module)
    except RuleError as error:
        raise CheckError(str(error)) from error
    except Exception as error:  # the user's code may fail in any way
        raise CheckError(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def find(module: types.ModuleType) -> dict[str, Rule | type[RuleOptimizer]]:
    """Return the optimizers that ``module`` defines, and its rules that belong to none of them, by name."""
    optimizers = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, RuleOptimizer) and value.__module__ == module.__name__
    }
    taken = {optimizer.rule for optimizer in optimizers.values()}
    rules = {name: value for name, value in vars(module).items() if isinstance(value, Rule) and value not in taken}
    return {**optimizers, **rules}


def _print_costs(update: Update, targets: Sequence[str]) -> list[str]:
    """Print the table of costs; return the limits that are exceeded, in words."""
    from fusedopt.kernels.ptx import rule_check

    rows, exceeded = [list(_TITLES)], []
    for dtype in DTYPES:
        stored = str(dtype).removeprefix("torch.")
        for target in targets:
            cost, messages = rule_check.compiled_cost(update, dtype, target)
            wide = f"{cost.loads.get(128, 0)}, {cost.stores.get(128, 0)}"
            numbers = (
                cost.registers,
                cost.spilled,
                cost.shared,
                f"{cost.occupancy:.0%}",
                wide,
                f"{cost.instructions_per_element():.0f}",
            )
            rows.append([stored, target, *map(str, numbers)])
            exceeded += [f"{stored} on {target}: {message}" for message in messages]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return exceeded


def _execute(subject: Rule | type[RuleOptimizer], target: str) -> str | None:
    """Execute what was found; return in words what is wrong, or None."""
    from fusedopt.kernels.ptx import rule_check

    if isinstance(subject, Rule):
        different = {name: count for name, count in rule_check.execute_rule(subject, target).items() if count}
        return f"different from NumPy: {_counted(different)}" if different else None
    from fusedopt.kernels.ptx import steps

    for dtype in DTYPES:
        executed = []
        for options in ({}, {"capturable": True}):  # coefficients from the host, and from the device
            with steps.executing(target):
                executed.append(_stepped(subject, dtype, **options))
        for backend in ("numpy", "numba"):
            with backends.use(backend):
                right = _stepped(subject, dtype)
            for found, where in zip(executed, ("host", "device"), strict=True):
                different = {
                    name: count for name, value in found.items() if (count := rule_check.differing_elements(value, right[name]))
                }
                if different:
                    return f"{dtype}, coefficients from the {where}: different from {backend}: {_counted(different)}"
    return None


def _counted(different: dict[str, int]) -> str:
    return ", ".join(f"{count} elements of {name}" for name, count in different.items())


def _stepped(optimizer_class: type[RuleOptimizer], dtype: torch.dtype, **options: Any) -> dict[str, torch.Tensor]:
    """Return all parameters, and all states, after some steps from the same start."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    optimizer = optimizer_class(params, weight_decay=0.125, **options)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
    found = {"p": torch.cat([p.detach() for p in params])}
    for name in optimizer.state[params[0]]:
        found[name] = torch.cat([optimizer.state[p][name].reshape(-1) for p in params])
    return found
