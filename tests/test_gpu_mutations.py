"""Faults planted in the GPU kernels and in what the host hands them: each is caught by executing, or by the table of costs.

A proof that finds nothing shows little unless it would have found something. `pytest -rA` shows who caught what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

import amp_paths
import fusedopt
import test_gpu_executed as executed
import test_gpu_step_options as options
from cases import named
from fusedopt.kernels import backends, gpu, gpu_kernels, part, source, tables
from fusedopt.kernels.formats import FORMATS
from fusedopt.kernels.ptx import execute, offline, steps, table
from fusedopt.kernels.ptx.execute import PtxError
from fusedopt.kernels.rule import Update
from fusedopt.kernels.rules import adam, decoupled_decay
from fusedopt.kernels.tables import CHUNK, Kind
from single_step import outputs
from test_backends import assert_equal_bits, draw, unaligned

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(execute.obstacle() is not None, reason=str(execute.obstacle())),
]


# --- what is asked of the kernels ---------------------------------------------------------------------------------------------


def ragged_ends():
    executed.check(named("adamw"), draw([1, 17, 1023, 1025, 2053], torch.float32), [draw([1, 17, 1023, 1025, 2053], torch.float32)])


def whole_blocks():
    executed.check(named("adamw"), draw([2048, 1024], torch.float32), [draw([2048, 1024], torch.float32) for _ in range(2)])


def unaligned_tensors():
    case, sizes = named("adamw"), [2048, 1030]
    executed.check(case, draw(sizes, torch.float32), [draw(sizes, torch.float32)], lay_out=lambda values: unaligned(values, 1))


def beyond_32_bits():
    executed.far_block(2**31 + 5 * gpu_kernels.BLOCK, torch.float32)


def climbing():
    executed.check(named("adam-maximize"), draw([5, 1030], torch.float32), [draw([5, 1030], torch.float32)])


def two_groups():
    made = []
    for context in (backends.use("numba"), steps.executing()):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(values) for values in draw([5, 70, 1030], torch.float32)]
        groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "lr": 0.01}]
        optimizer = named("adamw").make_ours(groups)
        with context:
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape)
                optimizer.step()
        made.append([outputs(optimizer, p) for p in params])
    assert_equal_bits(made[1], made[0])


def moving_gradients():
    executed.check(named("adamw"), draw([5, 1030], torch.float32), [draw([5, 1030], torch.float32) for _ in range(4)])


def moving_parameters():
    """As `parameter.data = ...` moves them."""
    made = []
    for context in (backends.use("numba"), steps.executing()):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(values) for values in draw([5, 1030], torch.float32)]
        optimizer = named("adamw").make_ours(params)
        with context:
            for _ in range(4):
                for p in params:
                    p.data, p.grad = p.data.clone(), torch.randn(p.shape)
                optimizer.step()
        made.append([outputs(optimizer, p) for p in params])
    assert_equal_bits(made[1], made[0])


def missing_gradients():
    executed.test_gradients_that_are_missing(named("adamw"), executed.EXECUTED)


def counting_on_the_device():
    start, gradients = draw([3] * 40, torch.float64), [draw([3] * 40, torch.float64) for _ in range(3)]
    executed.check(named("nadam-decoupled"), start, gradients, own={"capturable": True})


def scaling(found_inf: float, grad_scale: float = 3.0):
    case, start, gradients = named("adamw"), draw([5, 1030], torch.float32), draw([5, 1030], torch.float32)
    made = []
    for context in (backends.use("numba"), steps.executing()):
        params = [torch.nn.Parameter(values.clone()) for values in start]
        optimizer = case.make_ours(params)
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        with context, amp_paths.scaling(optimizer, found_inf, grad_scale):
            optimizer.step()
        made.append([{**outputs(optimizer, p), **({} if found_inf else {"gradient": p.grad})} for p in params])
    assert_equal_bits(made[1], made[0])


def unscaled():
    scaling(0.0)


def left_out():
    scaling(1.0)


def short_format():
    executed.check(named("adamw"), draw([2048], torch.bfloat16), [draw([2048], torch.bfloat16)])


def in_halves():
    executed.check(named("adam-amsgrad"), draw([2048], torch.bfloat16), [draw([2048], torch.bfloat16)])


def special_numbers():
    special = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-45, 3e38]).repeat(3)
    executed.check(named("adam-amsgrad"), [torch.randn(18)], [[special], [special.roll(1)]])


def clipping(values=None):
    start, gradients = draw([5, CHUNK + 9], torch.float32), values or [draw([5, CHUNK + 9], torch.float32) for _ in range(2)]
    options.check(named("adamw"), start, gradients, **options.OPTIONS["all"])


def not_finite():
    gradients = [draw([5, CHUNK + 9], torch.float32) for _ in range(2)]
    gradients[1][0][3] = torch.inf
    clipping(gradients)


def costs():
    for dtypes in ((torch.float32,) * 4, (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)):
        kind = Kind(Update(adam, decoupled_decay), tuple(FORMATS[dtype] for dtype in dtypes))
        assert table.violations(kind, table.cost(offline.compile_update(kind, "sm_90"), "sm_90")) == []


def codes(found_inf: float | None = None):
    """AdamW in 8 bits: whole blocks, the end of one, and a step that a scaler leaves out."""
    made = []
    for context in (backends.use("numba"), steps.executing()):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(4096 + 700))
        optimizer = fusedopt.AdamW([param], state_format="8bit")
        with context:
            for step in range(3):
                param.grad = torch.randn(param.shape) * torch.exp(2 * torch.randn(param.shape))
                if step == 1 and found_inf is not None:
                    with amp_paths.scaling(optimizer, found_inf, 1.0):
                        optimizer.step()
                else:
                    optimizer.step()
        made.append([outputs(optimizer, param)])
    assert_equal_bits(made[1], made[0])


def codes_not_finite():
    """Zeros are stored where the device itself leaves a step out."""
    start, gradients = draw([5000], torch.float32), [draw([5000], torch.float32) for _ in range(2)]
    gradients[1][0][3] = torch.inf
    options.check(named("adamw"), start, gradients, **options.OPTIONS["all"], state_format="8bit")


def codes_left_out():
    codes(1.0)


# --- what is planted ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A fault.

    Args:
        name: what is wrong.
        before: a part of a generated kernel.
        after: what is planted in its place.
        asked: by which of the above it is caught.
    """

    name: str
    before: str
    after: str
    asked: Callable[[], None]


KERNEL = [
    Mutation("mask one element too long", "offsets < remaining", "offsets <= remaining", ragged_ends),
    Mutation("mask one element too short", "offsets < remaining", "offsets < remaining - 1", ragged_ends),
    Mutation(
        "ragged blocks unmasked",
        "row, remaining.to(tl.int32) - start, end - start, True, BLOCK",
        "row, 0, 0, False, BLOCK",
        ragged_ends,
    ),
    Mutation("last element of a full block ragged", "remaining >= BLOCK", "remaining >= BLOCK - 1", ragged_ends),
    Mutation("blocks that overlap", ".to(tl.int64) * BLOCK\n", ".to(tl.int64) * (BLOCK - 4)\n", whole_blocks),
    Mutation("offsets of 32 bits", "+ 1).to(tl.int64) * BLOCK", "+ 1) * BLOCK", beyond_32_bits),
    Mutation("alignment promised to all", "if ALIGNED:", "if True:", unaligned_tensors),
    Mutation("alignment promised to none", "if ALIGNED:", "if False:", costs),
    Mutation("wider alignment than the layout has", "tl.multiple_of(p_at, 8)", "tl.multiple_of(p_at, 16)", costs),
    Mutation("all blocks masked", "if remaining >= BLOCK:", "if remaining >= BLOCK and remaining < 0:", costs),
    Mutation("plain division", "divide_float32 as divide", "divide_float64 as divide", costs),
    Mutation("plain root", "sqrt_float32 as sqrt", "sqrt_float64 as sqrt", costs),
    Mutation("arithmetic in float64", "g = c_sign * g", "g = (c_sign.to(tl.float64) * c_sign * c_sign * g).to(tl.float32)", costs),
    Mutation("sign of the gradient left out", "g = c_sign * g", "g = g", climbing),
    Mutation("row one coefficient too short", "row_of_tensor + tensor) * 9", "row_of_tensor + tensor) * 8", two_groups),
    Mutation("row of the first group for all", "tl.load(row_of_tensor + tensor) * 9", "0 * 9", two_groups),
    Mutation("coefficients exchanged", "tl.load(row + 4)", "tl.load(row + 5)", whole_blocks),
    Mutation("states exchanged", "s_exp_avg_at = tl.load(addresses + 2", "s_exp_avg_at = tl.load(addresses + 3", whole_blocks),
    Mutation("gradient read for the parameter", "p_at = tl.load(addresses + 0", "p_at = tl.load(addresses + 1", whole_blocks),
    Mutation(
        "state not stored",
        "tl.store(s_exp_avg_at + offsets, new_s_exp_avg",
        "tl.store(s_exp_avg_at + offsets, s_exp_avg",
        whole_blocks,
    ),
    Mutation("part of a ragged block left out", "range(0, end,", "range(0, end - BLOCK // 4,", ragged_ends),
    Mutation("parts of a ragged block in one place", "p_at + start", "p_at", ragged_ends),
    Mutation("part beyond the end", "row, remaining.to(tl.int32) - start", "row, remaining.to(tl.int32)", ragged_ends),
    Mutation(
        "halves of a thread exchanged",
        "new_p = thread_whole(new_p_0, new_p_1)",
        "new_p = thread_whole(new_p_1, new_p_0)",
        in_halves,
    ),
    Mutation("parameter stored over the gradient", "tl.store(p_at", "tl.store(g_at", whole_blocks),
    Mutation("chunks of the neighbour", "chunks + 2 * chunk)", "chunks + 2 * chunk + 2)", whole_blocks),
    Mutation("found_inf not asked", "if GUARDED:", "if False:", left_out),
    Mutation("found_inf the wrong way round", "tl.load(found_inf) == 0", "tl.load(found_inf) != 0", left_out),
    Mutation(
        "unscaled gradient stored before it is",
        "new_g = g",
        "new_g = g / c_inverse_scale",
        unscaled,
    ),
    Mutation("gradient not unscaled", "g = c_inverse_scale * g", "g = g", unscaled),
    Mutation(
        "bfloat16 truncated",
        "new_p.to(stored_p.dtype)",
        "new_p.to(stored_p.dtype, fp_downcast_rounding='rtz')",
        short_format,
    ),
    Mutation(
        "NaN lost in a maximum", "maximum(max_exp_avg_sq, exp_avg_sq)", "tl.maximum(max_exp_avg_sq, exp_avg_sq)", special_numbers
    ),
    Mutation("step not counted", "+ 1.0\n", "+ 0.0\n", counting_on_the_device),
    Mutation("literal rounded to float32", "number(0.96)", "tl.full((), 0.96, tl.float32)", counting_on_the_device),
    Mutation("coefficients of the wrong group", "hyperparameters + group *", "hyperparameters + 1 *", counting_on_the_device),
    Mutation("clipping left out", "c_sign = c_sign * tl.load(factors + group)", "c_sign = c_sign * 1.0", clipping),
    Mutation(
        "infinities left where a step is left out",
        "g_at.dtype.element_ty), mask=exists",
        "g_at.dtype.element_ty), mask=mask",
        not_finite,
    ),
    Mutation("average of the old parameter", "_weight_average(new_p", "_weight_average(p", clipping),
    Mutation("tensors that do not exist", "exists = tensor < tensors", "exists = tensor <= tensors", counting_on_the_device),
    Mutation("new scalars not stored", "tl.store(scalars + 1 * tensors", "tl.store(scalars + 0 * tensors", counting_on_the_device),
    Mutation(
        "reciprocal of the scale in float32",
        "c_inverse_scale / tl.load(grad_scale).to(tl.float64)",
        "c_inverse_scale * 0.333",
        unscaled,
    ),
]


CODES = [
    Mutation(
        "what does not exist in a block's range", "tl.where(mask, s_exp_avg_bits, 0)", "s_exp_avg_bits + lanes.to(tl.uint32)", codes
    ),
    Mutation("words of the neighbour", "(start // 256), of_zero", "(start // 256 + 2), of_zero", codes),
    Mutation("the same chance in all blocks", "first + part, index + first + part, 0,", "first + part, index, 0,", codes),
    Mutation("end of a tensor left out", "if (remaining > full)", "if (remaining < full)", codes),
    Mutation(
        "end of a tensor one element too short",
        "rest = remaining.to(tl.int32) - full",
        "rest = remaining.to(tl.int32) - full - 1",
        codes,
    ),
    Mutation(
        "infinities left where a coded step is left out", "if remaining < present:", "if remaining > present:", codes_not_finite
    ),
    Mutation("the same chance in all steps", "word(tl.load(row + 9))", "word(tl.load(row + 9) * 0)", codes),
    Mutation("one chance for both moments", "word((random_0 >> 7) & 65535)", "word(random_0 >> 15)", codes),
    Mutation(
        "moment relative to the root before rounding",
        "quotient(new_s_exp_avg, s_exp_avg_sq_meant,",
        "quotient(new_s_exp_avg, sqrt(new_s_exp_avg_sq),",
        codes,
    ),
    Mutation(
        "moment relative to a root of another kind",
        "near_root(s_exp_avg_sq_code, of_zero, distance)",
        "sqrt(s_exp_avg_sq)",
        codes,
    ),
    Mutation("words stored by a step that is left out", "if (remaining > full)", "if (remaining >= full)", codes_left_out),
    Mutation("rounded down alone", "word(random << 7 | ", "word(random * 0 | ", codes),
    Mutation("powers of two between the patterns", "(below < fixed)", "(below > fixed)", codes),
]


@contextlib.contextmanager
def planted(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Have kernels generated with the fault; yield the names of those that have it."""
    changed = []
    load = source.load

    def mutated(name: str, content: str):
        if not name.startswith("gpu_") or mutation.before not in content:
            return load(name, content)
        changed.append(name)
        return load(name, content.replace(mutation.before, mutation.after))

    caches = (gpu_kernels.kernel, gpu_kernels.prepare_kernel)
    monkeypatch.setattr(source, "load", mutated)
    for cache in caches:
        cache.cache_clear()
    try:
        yield changed
    finally:
        for cache in caches:
            cache.cache_clear()


def caught_by(asked: Callable[[], None]) -> str | None:
    """Return what was raised, or None."""
    torch.manual_seed(1)
    try:
        asked()
    except (PtxError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


#: Fast enough for every run; the others are in the whole proof.
QUICK = (
    "mask one element too long",
    "offsets of 32 bits",
    "alignment promised to all",
    "plain division",
    "row one coefficient too short",
    "words of the neighbour",
)
QUICKLY_ASKED = {mutation.asked for mutation in (*KERNEL, *CODES) if mutation.name in QUICK}
ASKED = sorted({mutation.asked for mutation in (*KERNEL, *CODES)}, key=lambda asked: asked.__name__)


@pytest.mark.parametrize(
    "asked",
    [pytest.param(asked, marks=[] if asked in QUICKLY_ASKED else pytest.mark.proof, id=asked.__name__) for asked in ASKED],
)
def test_nothing_is_caught_where_nothing_is_planted(asked):
    assert caught_by(asked) is None


@pytest.mark.parametrize(
    "mutation", [pytest.param(m, marks=[] if m.name in QUICK else pytest.mark.proof, id=m.name) for m in (*KERNEL, *CODES)]
)
def test_a_fault_in_a_kernel_is_caught(mutation, monkeypatch):
    with planted(mutation, monkeypatch) as changed:
        caught = caught_by(mutation.asked)
    assert changed, f"no kernel holds {mutation.before!r}: it was written anew, and so must the fault be"
    assert caught is not None
    print(f"{mutation.name}: {caught}")


# --- in the host's tables: of the executed kernels alone, as Numba's would do harm --------------------------------------------


def stale_gradient_addresses(monkeypatch):
    kept = {}

    def run(bucket, launch):
        first = kept.setdefault(id(bucket), launch.addresses[1].copy())
        launch.addresses[1] = first
        inner(bucket, launch)

    inner = gpu.run
    monkeypatch.setattr(gpu, "run", run)


def stale_parameter_addresses(monkeypatch):
    hold = tables.Bucket.addresses_hold
    monkeypatch.setattr(tables.Bucket, "addresses_hold", lambda bucket: bucket.backend == "triton" or hold(bucket))


def alignment_not_checked(monkeypatch):
    class Aligned:
        def __init__(self, launch):
            self.addresses, self.active = launch.addresses // 16 * 16, launch.active

    chunks = gpu._Tables.chunks
    monkeypatch.setattr(gpu._Tables, "chunks", lambda self, bucket, launch: chunks(self, bucket, Aligned(launch)))


def chunks_of_a_tensor_that_rests(monkeypatch):
    chunks = gpu._Tables.chunks

    def all_of_them(self, bucket, launch):
        launch.active = bucket.everyone
        return chunks(self, bucket, launch)

    monkeypatch.setattr(gpu._Tables, "chunks", all_of_them)


def with_chunks(monkeypatch, change):
    chunk_table = gpu.chunk_table

    def changed(sizes, length):
        table = chunk_table(sizes, length)
        return change(table) if length == gpu_kernels.BLOCK else table

    monkeypatch.setattr(gpu, "chunk_table", changed)


def one_chunk_missing(monkeypatch):
    with_chunks(monkeypatch, lambda table: table[:-1])


def one_chunk_twice(monkeypatch):
    with_chunks(monkeypatch, lambda table: table.repeat(2, axis=0))


def one_piece_missing(monkeypatch):
    pieces = gpu._Tables.pieces
    monkeypatch.setattr(gpu._Tables, "pieces", lambda self, bucket, launch: pieces(self, bucket, launch)[:-1])


def norm_counted_twice(monkeypatch):
    add = gpu.add_sums_of_squares

    def twice(*arguments):
        add(*arguments)
        add(*arguments)

    monkeypatch.setattr(gpu, "add_sums_of_squares", twice)


def coefficients_of_the_step_before(monkeypatch):
    rows, kept = part.coefficient_rows, []

    def late(bucket, *arguments):
        if bucket.backend != "triton":
            return rows(bucket, *arguments)
        kept.append(rows(bucket, *arguments))
        return kept[max(0, len(kept) - 2)]

    monkeypatch.setattr(part, "coefficient_rows", late)


def contraction(monkeypatch):
    monkeypatch.setattr(gpu_kernels, "OPTIONS", {**gpu_kernels.OPTIONS, "enable_fp_fusion": True})


HOST = [
    (stale_gradient_addresses, moving_gradients),
    (stale_parameter_addresses, moving_parameters),
    (alignment_not_checked, unaligned_tensors),
    (chunks_of_a_tensor_that_rests, missing_gradients),
    (one_chunk_missing, whole_blocks),
    (one_chunk_twice, whole_blocks),
    (one_piece_missing, clipping),
    (norm_counted_twice, clipping),
    (coefficients_of_the_step_before, moving_gradients),
    (contraction, whole_blocks),
]


@pytest.mark.parametrize(
    ("plant", "asked"),
    [
        pytest.param(plant, asked, marks=[] if plant is stale_parameter_addresses else pytest.mark.proof, id=plant.__name__)
        for plant, asked in HOST
    ],
)
def test_a_fault_of_the_host_is_caught(plant, asked, monkeypatch):
    assert caught_by(asked) is None
    plant(monkeypatch)
    caught = caught_by(asked)
    assert caught is not None
    print(f"{plant.__name__}: {caught}")
