"""Every kernel compiled for every target, and its machine code held to limits; and that the reading of machine code is right."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

import ptx_kernels
from fusedopt.kernels import gpu_kernels
from fusedopt.kernels.ptx import offline, table
from fusedopt.kernels.ptx.driver import TARGETS, driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import gpu_proof

pytestmark = [pytest.mark.triton, pytest.mark.compiled]

QUICK = {("adam", "float32", "sm_90"), ("adam", "bfloat16, float32 states", "sm_90"), ("momentum", "float32", "gfx942")}


def matrix():
    names = itertools.product(gpu_proof.RULES, gpu_proof.STORED, TARGETS)
    return [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.proof, id="-".join(each)) for each in names]


@pytest.mark.parametrize(("name", "stored", "target"), matrix())
def test_limits(name, stored, target):
    kind = gpu_proof.kind(gpu_proof.RULES[name], stored)
    assert table.violations(kind, table.cost(offline.compile_update(kind, target), target)) == []


@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=[] if target == "sm_90" else pytest.mark.proof) for target in TARGETS]
)
@pytest.mark.parametrize("name", [pytest.param("momentum", marks=pytest.mark.proof), "adam"])
def test_limits_of_other_variants(name, target):
    """Unaligned memory takes narrower accesses; no variant spills, converts layouts or approximates."""
    kind = gpu_proof.kind(gpu_proof.RULES[name], "float32")
    unscaling = dataclasses.replace(kind, unscale=True)
    for each, aligned, guarded in ((kind, False, False), (unscaling, True, True), (unscaling, False, True)):
        found = table.cost(offline.compile_update(each, target, aligned, guarded), target)
        assert (found.spilled, found.shared, found.float64, found.approximate) == (0, 0, 0, 0)
        assert aligned == (found.stores.get(128, 0) > 0)


@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=[] if target == "sm_90" else pytest.mark.proof) for target in TARGETS]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "adam" else pytest.mark.proof) for name in gpu_proof.RULES]
)
def test_coefficients_compile(name, target):
    """In float64, and correctly rounded as on the host."""
    kind = gpu_proof.kind(gpu_proof.RULES[name], "float32")
    for guarded, scaled in ((False, False), (True, True)):
        found = table.cost(offline.compile_prepare(kind, target, guarded, scaled), target)
        assert (found.spilled, found.approximate) == (0, 0)


# --- that the table would tell ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sm_90", "gfx942"])
def reading(request, monkeypatch):
    """Compile a small kernel, and read its cost."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")

    def cost(kernel, *arguments, **options):
        with driver(request.param):
            return table.cost(kernel.warmup(*arguments, **options, grid=(1,)), request.param)

    return cost


def test_approximations_are_counted(reading):
    assert reading(ptx_kernels.functions, torch.float32, torch.float32, BLOCK=1024).approximate > 0


def test_float64_is_counted(reading):
    assert reading(ptx_kernels.short_arithmetic, *[torch.float64] * 3, BLOCK=1024).float64 > 0
    assert reading(ptx_kernels.short_arithmetic, *[torch.float32] * 3, BLOCK=1024).float64 == 0


def test_shared_memory_is_counted(reading):
    assert reading(ptx_kernels.rows_and_columns, *[torch.float32] * 4, ROWS=32, COLUMNS=64).shared > 0


def test_spills_are_counted(reading):
    for few in ({"maxnreg": 24}, {"waves_per_eu": 8}):  # registers, as NVIDIA's and AMD's compilers are told
        with contextlib.suppress(KeyError):  # of an option that is the other's
            found = reading(ptx_kernels.short_arithmetic, *[torch.float32] * 3, BLOCK=8192, **few)
    assert found.spilled > 0


def test_widths_of_accesses_are_counted(reading):
    wide = reading(ptx_kernels.sound, torch.float32, torch.float32, 1024, BLOCK=1024)
    assert wide.loads.get(128, 0) > 0 and wide.stores.get(128, 0) > 0
    narrow = reading(ptx_kernels.sound, torch.float32, torch.float32, 1023, BLOCK=1024)
    assert narrow.loads.get(128, 0) == 0 and narrow.stores.keys() == {32}


def test_occupancy_of_known_kernels():
    """As NVIDIA's and AMD's calculators have it for 128 threads."""
    assert [table._occupancy("sm_90", registers, 0, 4) for registers in (32, 64, 65, 128, 255)] == [1, 0.5, 0.4375, 0.25, 0.125]
    assert table._occupancy("sm_90", 32, 65_536, 4) == 3 * 4 / 64
    assert [table._occupancy("gfx90a", registers, 0, 4) for registers in (64, 65, 128, 256)] == [1, 0.875, 0.5, 0.25]


def test_each_limit_is_checked():
    kind = gpu_proof.kind(gpu_proof.RULES["adam"], "float32")
    good = table.Cost("sm_90", 64, 0, 0, 0.5, {128: 8}, {128: 6}, 100, 0, 0, 128)
    assert table.violations(kind, good) == []
    for change in (
        {"registers": 65},
        {"spilled": 4},
        {"shared": 16},
        {"float64": 1},
        {"approximate": 1},
        {"loads": {128: 7, 32: 4}},
        {"stores": {128: 5, 64: 2}},
    ):
        assert len(table.violations(kind, dataclasses.replace(good, **change))) == 1
    assert len(table.violations(kind, dataclasses.replace(good, threads=gpu_kernels.BLOCK))) == 1
