"""The executor of PTX: what instructions compute, against NumPy; and the faults that it must find."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux), or fusedopt's extra [triton]")

import ptx_kernels
from fusedopt.kernels.ptx.driver import driver, memory
from fusedopt.kernels.ptx.execute import Kernel, PtxError, Settings, obstacle
from fusedopt.kernels.ptx.parse import UnknownInstructionError

pytestmark = [
    pytest.mark.triton,
    pytest.mark.compiled,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]

#: The others compile to the same instructions, but for packed arithmetic from sm_90 and sm_100 on.
TARGETS = ["sm_90", *(pytest.param(target, marks=pytest.mark.proof) for target in ("sm_75", "sm_80", "sm_100", "sm_120"))]
SPECIAL = [0.0, -0.0, 1.0, -1.5, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-40, 3.4e38, 1.00390625, 65504.0, 6e-8, 1e-3]


@pytest.fixture(autouse=True)
def no_contraction(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")


@pytest.fixture(params=TARGETS)
def session(request):
    with driver(request.param) as session:
        yield session


def numbers(count, dtype=torch.float32):
    special = torch.tensor(SPECIAL)
    return torch.cat([special, torch.randn(count - len(special)) * 10 ** torch.linspace(-6, 6, count - len(special))]).to(dtype)


def assert_equal(found, right):
    assert found.dtype == right.dtype
    wrong = ~((found == right) & (found.signbit() == right.signbit()) | (found.isnan() & right.isnan()))
    assert not wrong.any(), f"{int(wrong.sum())} wrong, as {found[wrong][0]} where {right[wrong][0]} is right"


# --- instructions -------------------------------------------------------------------------------------------------------------

PTX = """
.version 8.7
.target sm_100a
.address_size 64
.visible .entry every_row(.param .u64 .ptr .global .align 8 out)
.reqntid 32
{{
  .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .b64 %out;
  ld.param.b64 %out, [out];
{rows}
  ret;
}}
"""
# What leaves its result in %rd0, and what that is.
ROWS = [
    ("add.s32 %r1, 2147483647, 1; cvt.s64.s32 %rd0, %r1;", -(2**31)),
    ("sub.s64 %rd0, 5, 7;", -2),
    ("mul.hi.u32 %r1, 0xFFFFFFFF, 0xFFFFFFFF; cvt.u64.u32 %rd0, %r1;", 0xFFFFFFFE),
    ("mul.hi.s32 %r1, -2, 3; cvt.u64.u32 %rd0, %r1;", 0xFFFFFFFF),
    ("mul.hi.u64 %rd0, 0xFFFFFFFFFFFFFFFF, 3;", 2),
    ("mul.wide.s32 %rd0, -3, 4;", -12),
    ("mul.wide.u32 %rd0, 0xFFFFFFFF, 2;", 0x1FFFFFFFE),
    ("mad.lo.s32 %r1, 7, -3, 1; cvt.s64.s32 %rd0, %r1;", -20),
    ("mad.wide.s32 %rd0, -3, 4, 100;", 88),
    ("div.s32 %r1, -7, 2; cvt.s64.s32 %rd0, %r1;", -3),
    ("rem.s32 %r1, -7, 2; cvt.s64.s32 %rd0, %r1;", -1),
    ("div.u32 %r1, -7, 2; cvt.u64.u32 %rd0, %r1;", (2**32 - 7) // 2),
    ("shl.b32 %r1, 1, 32; cvt.u64.u32 %rd0, %r1;", 0),
    ("shr.s32 %r1, -8, 40; cvt.s64.s32 %rd0, %r1;", -1),
    ("shr.u32 %r1, -8, 28; cvt.u64.u32 %rd0, %r1;", 15),
    ("shf.l.wrap.b32 %r1, 0x80000000, 1, 33; cvt.u64.u32 %rd0, %r1;", 3),
    ("shf.r.clamp.b32 %r1, 0x12345678, 0x9, 40; cvt.u64.u32 %rd0, %r1;", 9),
    ("lop3.b32 %r1, 12, 10, 6, 0x96; cvt.u64.u32 %rd0, %r1;", 12 ^ 10 ^ 6),
    ("prmt.b32 %r1, 0x44332211, 0x88776655, 0x7610; cvt.u64.u32 %rd0, %r1;", 0x88772211),
    ("prmt.b32 %r1, 0x80000000, 0, 0xb; cvt.u64.u32 %rd0, %r1;", 0xFF),
    ("bfe.u32 %r1, 0xABCD, 4, 8; cvt.u64.u32 %rd0, %r1;", 0xBC),
    ("bfe.s32 %r1, 0xABCD, 4, 8; cvt.s64.s32 %rd0, %r1;", 0xBC - 256),
    ("bfe.s32 %r1, 0x80000000, 28, 10; cvt.s64.s32 %rd0, %r1;", -8),
    ("bfi.b32 %r1, 0xF, 0x1000, 4, 8; cvt.u64.u32 %rd0, %r1;", 0x10F0 & ~0xF00 | 0x00F0),
    ("popc.b32 %r1, 0xF0F0; cvt.u64.u32 %rd0, %r1;", 8),
    ("clz.b32 %r1, 1; cvt.u64.u32 %rd0, %r1;", 31),
    ("brev.b32 %r1, 1; cvt.u64.u32 %rd0, %r1;", 2**31),
    ("cvt.rzi.s32.f32 %r1, 0fCF800000; cvt.s64.s32 %rd0, %r1;", -(2**31)),  # -2**32 saturates
    ("cvt.rzi.u32.f32 %r1, 0fBF800000; cvt.u64.u32 %rd0, %r1;", 0),  # -1
    ("cvt.rni.s32.f32 %r1, 0f40200000; cvt.s64.s32 %rd0, %r1;", 2),  # 2.5, to even
    ("cvt.rn.f32.s32 %r1, 16777217; cvt.u64.u32 %rd0, %r1;", 0x4B800000),
    ("cvt.rn.f16.f32 %h1, 0f477FF000; cvt.u64.u16 %rd0, %h1;", 0x7C00),  # 65520, a tie, to infinity
    ("cvt.rn.bf16.f32 %h1, 0f3F808000; cvt.u64.u16 %rd0, %h1;", 0x3F80),  # a tie, to even
    ("cvt.rn.bf16x2.f32 %r1, 0f40000000, 0f3F800000; cvt.u64.u32 %rd0, %r1;", 0x40003F80),  # the first is the high one
    (
        "mov.b32 %r1, 0x7FC03F80; setp.nan.bf16x2 %p1|%p2, %r1, %r1; selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2;"
        "or.b32 %r4, %r2, %r3; cvt.u64.u32 %rd0, %r4;",
        2,
    ),
    (
        "mov.b32 %r1, 0x3C007E00; setp.nan.f16x2 %p1|%p2, %r1, %r1; selp.b32 %r2, 1, 0, %p1; selp.b32 %r3, 2, 0, %p2;"
        "or.b32 %r4, %r2, %r3; cvt.u64.u32 %rd0, %r4;",
        1,
    ),
    # A short operand beside float32 ones, from sm_100 on.
    ("mov.b16 %h1, 0x4000; add.rn.f32.bf16 %r1, %h1, 0f3F800000; cvt.u64.u32 %rd0, %r1;", 0x40400000),
    ("mov.b16 %h1, 0x4000; sub.rn.f32.f16 %r1, %h1, 0f3F800000; cvt.u64.u32 %rd0, %r1;", 0x3F800000),
    ("mov.b16 %h1, 0x4000; fma.rn.f32.bf16 %r1, %h1, %h1, 0f3F800000; cvt.u64.u32 %rd0, %r1;", 0x40A00000),
    ("mov.b64 %rd1, {0f3F800000, 0f40000000}; add.rn.f32x2 %rd0, %rd1, %rd1;", 0x4080000040000000),
    ("mul.rn.f32x2 %rd0, 0x7FC0000040000000, 0x4000000040000000;", 0x7FFFFFFF40800000),
    ("max.f32 %r1, 0f80000000, 0f00000000; cvt.u64.u32 %rd0, %r1;", 0),  # minus zero is less
    ("min.f32 %r1, 0f7FC00000, 0f3F800000; cvt.u64.u32 %rd0, %r1;", 0x3F800000),
    ("min.NaN.f32 %r1, 0f7FC00000, 0f3F800000; cvt.u64.u32 %rd0, %r1;", 0x7FFFFFFF),
    ("neg.bf16x2 %r1, 0x3F80BF80; cvt.u64.u32 %rd0, %r1;", 0xBF803F80),
    ("abs.f32 %r1, 0fFFC00001; cvt.u64.u32 %rd0, %r1;", 0x7FC00001),
    ("add.ftz.f32 %r1, 0f00000001, 0f00000000; cvt.u64.u32 %rd0, %r1;", 0),
    ("fma.rn.f32 %r1, 0f3F800001, 0f3F800001, 0fBF800002; cvt.u64.u32 %rd0, %r1;", 0x28800000),
    ("setp.lt.and.s32 %p1, -1, 1, 0; selp.b64 %rd0, 1, 2, %p1;", 2),
    ("setp.lo.u32 %p1, -1, 1; selp.b64 %rd0, 1, 2, %p1;", 2),
    ("setp.ltu.f32 %p1, 0f7FC00000, 0f3F800000; selp.b64 %rd0, 1, 2, %p1;", 1),
    ("setp.lt.s32 %p1|%p2, 1, 2; @!%p2 mov.b64 %rd0, 3; @%p2 mov.b64 %rd0, 4;", 3),
    ("{ .reg .b32 %r1; mov.b32 %r1, 9; cvt.u64.u32 %rd0, %r1; }", 9),  # a register of its own scope
    ("shfl.sync.bfly.b32 %r1, %tid.x, 3, 0x1f, 0xffffffff; cvt.u64.u32 %rd0, %r1;", lambda lane: lane ^ 3),
    ("shfl.sync.up.b32 %r1|%p1, %tid.x, 2, 0, -1; cvt.u64.u32 %rd0, %r1;", lambda lane: lane - 2 if lane >= 2 else lane),
    ("shfl.sync.idx.b32 %r1, %tid.x, 5, 0x181f, -1; cvt.u64.u32 %rd0, %r1;", lambda lane: lane // 8 * 8 + 5),
    ("setp.gt.u32 %p1, %tid.x, 29; vote.sync.ballot.b32 %r1, %p1, -1; cvt.u64.u32 %rd0, %r1;", 0xC0000000),
    ("redux.sync.add.s32 %r1, %tid.x, -1; cvt.u64.u32 %rd0, %r1;", 496),
    ("redux.sync.max.s32 %r1, -5, -1; cvt.s64.s32 %rd0, %r1;", -5),
]


def test_every_row_of_instructions():
    stores = [
        f"{{ .reg .b32 %at; mad.lo.s32 %at, {i}, 32, %tid.x; .reg .b64 %to; mad.wide.s32 %to, %at, 8, %out; {row} "
        "st.global.b64 [%to], %rd0; }"
        for i, (row, _) in enumerate(ROWS)
    ]
    out = np.zeros((len(ROWS), 32), np.uint64)
    address = out.ctypes.data
    Kernel(PTX.format(rows="\n".join(stores))).launch((1,), [address], [(address, address + out.nbytes)])
    lanes = np.arange(32)
    for (row, right), found in zip(ROWS, out, strict=True):
        expected = np.array([right(lane) if callable(right) else right for lane in lanes.tolist()], object) % 2**64
        assert (found.astype(object) == expected).all(), f"{row} gave {found[:4]}, not {expected[:4]}"


@pytest.mark.parametrize(
    "statement",
    ["tex.1d.v4.s32.s32 {%r1, %r2, %r3, %r4}, [out, %r5];", "add.rz.f32 %r1, %r2, %r3;", "mov.b32 %r1, %nonsense;", "mov.b32 %r1;"],
)
def test_what_is_unknown_raises_and_names_the_line(statement):
    with pytest.raises(UnknownInstructionError, match=rf"PTX line 10: {re.escape(statement[:-1])}"):
        Kernel(PTX.format(rows=statement))


# --- Triton's kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_conversions_of_floats(session, dtype):
    source, target = numbers(1024), torch.zeros(1024, dtype=dtype)
    ptx_kernels.convert[(1,)](source, target, BLOCK=1024)
    assert_equal(target, source.to(dtype))
    back = torch.zeros(1024)
    ptx_kernels.convert[(1,)](target, back, BLOCK=1024)
    assert_equal(back, target.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64, torch.uint8, torch.float32], ids=str)
def test_conversions_of_integers(session, dtype):
    source = torch.randint(-(2**31), 2**31 - 1, (1024,), dtype=torch.int32)
    target = torch.zeros(1024, dtype=dtype)
    ptx_kernels.convert[(1,)](source, target, BLOCK=1024)
    assert torch.equal(target, source.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_conversions_to_integers(session, dtype):
    source, target = torch.randn(1024) * 40, torch.zeros(1024, dtype=dtype)
    ptx_kernels.convert[(1,)](source, target, BLOCK=1024)
    assert torch.equal(target, source.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_is_rounded_once(session, dtype):
    x, y = numbers(1024, dtype), numbers(1024, dtype).flip(0)
    target = torch.zeros(5, 1024, dtype=dtype)
    ptx_kernels.short_arithmetic[(1,)](x, y, target, BLOCK=1024)
    for found, right in zip(target, (x + y, x - y, x * y, torch.where(x < y, x, y), x.abs()), strict=True):
        assert_equal(found, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes_and_nan(session, dtype):
    x, y = numbers(1024, dtype), numbers(1024, dtype).roll(3)
    target = torch.zeros(4, 1024, dtype=dtype)
    ptx_kernels.extremes[(1,)](x, y, target, BLOCK=1024)
    # NumPy leaves open which zero is larger; the units say plus zero.
    zeros = (x == 0) & (y == 0)
    for found, right in zip(target, (torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y), torch.minimum(x, y)), strict=True):
        assert_equal(found[~zeros], right[~zeros])
    assert not target[0][zeros & (x.signbit() != y.signbit())].signbit().any()


def test_functions(session):
    x = torch.rand(1024) + 0.1
    target = torch.zeros(10, 1024)
    ptx_kernels.functions[(1,)](x, target, BLOCK=1024)
    exact = torch.from_numpy(np.sqrt(x.numpy())), 1 / x, torch.from_numpy((x.double() * x.double() + x.double()).numpy()).float()
    for found, right in zip(target, exact, strict=False):
        assert_equal(found, right)
    d = x.double()
    near = d.sqrt(), 3 / d, d.rsqrt(), (-d).exp(), d.log(), d**0.8, (d * 8).floor()
    for found, right in zip(target[3:], near, strict=True):
        assert ((found.double() - right).abs() <= 6 * 2**-23 * right.abs() + 1e-9).all()


def test_integers(session):
    x, y = (torch.randint(-(2**31), 2**31 - 1, (1024,), dtype=torch.int32) for _ in range(2))
    y[:512] %= 1000
    y[y == 0] = 7
    target = torch.zeros(7, 1024, dtype=torch.int32)
    ptx_kernels.integers[(1,)](x, y, target, BLOCK=1024)
    a, b = x.numpy().astype(np.int64), y.numpy().astype(np.int64)
    quotient = np.sign(a) * np.sign(b) * (abs(a) // abs(b))  # towards zero, as in C
    rights = [
        quotient,
        a - quotient * b,
        (a * b) ^ (a & b) | (a >> 3),
        a << (b & 31),
        (a % 2**32).astype(np.uint64) * (b % 2**32).astype(np.uint64) >> np.uint64(32),
        (a * b) >> 7,
        np.minimum(a, b) - np.maximum(a, -b) + abs(b),
    ]
    for found, right in zip(target.numpy(), rights, strict=True):
        assert (found == right.astype(np.int64).astype(np.int32)).all()


def philox_4x32_10(seed, count):
    """Salmon et al. 2011, on plain integers."""
    found = []
    for number in range(count):
        keys, c = [seed % 2**32, seed >> 32], [number, 0, 0, 0]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ keys[0], b % 2**32, (a >> 32) ^ c[3] ^ keys[1], a % 2**32]
            keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
        found.append(c)
    return np.array(found, np.uint32).T


def test_random_numbers(session):
    target = torch.zeros(4, 256, dtype=torch.int32)
    ptx_kernels.philox[(1,)](target, 12345678901, BLOCK=256)
    assert (target.numpy().view(np.uint32) == philox_4x32_10(12345678901, 256)).all()


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_reductions_and_atomics(session, warps):
    x, target, counts = torch.randn(5000), torch.zeros(16), torch.zeros(2, dtype=torch.int32)
    ptx_kernels.reductions[(5,)](x, target, counts, 5000, BLOCK=1024, num_warps=warps)
    assert target[0].item() == pytest.approx(x.double().sum().item(), abs=1e-3)
    assert target[1] == x.abs().max()
    assert counts.tolist() == [5, 31]
    padded = torch.cat([x, torch.zeros(120)]).view(5, 1024)
    assert torch.equal(target[2:7], padded.min(1).values)


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_layouts_through_shared_memory(session, warps):
    x = torch.randn(32, 64)
    before = x.clone()
    of_rows, of_columns, transposed = torch.zeros(32), torch.zeros(64), torch.zeros(64, 32)
    ptx_kernels.rows_and_columns[(1,)](x, of_rows, of_columns, transposed, ROWS=32, COLUMNS=64, num_warps=warps)
    torch.testing.assert_close(of_rows, before.sum(1), rtol=0, atol=1e-5)
    assert torch.equal(of_columns, before.max(0).values)
    assert torch.equal(transposed, before.T)
    torch.testing.assert_close(x, before.cumsum(1), rtol=0, atol=1e-5)


def test_tables_and_searches(session):
    table, codes = torch.linspace(-1, 1, 256), torch.randint(0, 256, (1000,), dtype=torch.uint8)
    values = torch.zeros(1024)
    values[:1000], values[1000:] = table[codes.long()] * 1.5, table[0] * 1.5
    scale = torch.zeros(4)
    ptx_kernels.quantised[(4,)](codes, table, scale, 1000, BLOCK=256)
    largest = values.view(4, 256).abs().max(1).values
    assert torch.equal(scale, largest)
    right = torch.bucketize(values.view(4, 256) / largest[:, None], table, right=True).sub(1).clamp(0, 255).flatten()[:1000]
    assert torch.equal(codes.long(), right)


def test_loops(session):
    x, target = torch.randn(10_000), torch.zeros(1)
    ptx_kernels.strided_sum[(3,)](x, target, 10_000, BLOCK=256)
    assert target.item() == pytest.approx(x.double().sum().item(), abs=1e-3)


# --- faults -------------------------------------------------------------------------------------------------------------------

# Kernel, what must be found, size, programs, options of the launch.
FAULTS = [
    ("unmasked_load", "out of bounds", 1000, 4, {}),
    ("mask_one_too_long", "out of bounds", 1000, 4, {}),
    ("programs_overlap", "race", 1000, 4, {}),
    ("lost_update", "race", 1000, 4, {}),
    ("reads_what_others_write", "race", 1000, 4, {}),
    ("reads_back_without_a_barrier", "race", 256, 1, {}),
    ("alignment_that_is_not_there", "misaligned", 1008, 4, {}),
    ("assertion", "assertion", 256, 1, {"debug": True}),
    ("index_overflow", "assertion", 1000, 4, {"debug": True}),
]


def launch(name, size, programs, **options):
    # One element behind an aligned address, where that is what the kernel gets wrong.
    values = torch.rand(size + 1)[1:] if name.startswith("alignment") else torch.rand(size)
    x = torch.tensor([values.data_ptr()]) if name.startswith("alignment") else values
    with memory(values):
        getattr(ptx_kernels, name)[(programs,)](x, torch.zeros(size), size, BLOCK=256, **options)


@pytest.mark.parametrize(("name", "message", "size", "programs", "options"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found_in_its_kernel(name, message, size, programs, options):
    source, first = inspect.getsourcelines(getattr(ptx_kernels, name).fn)
    assert any("# fault" in text for text in source)
    with driver("sm_90"), pytest.raises(PtxError, match=message) as found:
        launch(name, size, programs, **options)
    assert "ptx_kernels.py" in str(found.value)
    # Triton 3.9 gives some loads a line that is one or two too high.
    lines = [int(line) for line in re.findall(r"source line (\d+)", str(found.value))]
    assert lines and all(first < line < first + len(source) + 2 for line in lines)


@pytest.mark.parametrize("name", ["sound", "assertion"])
@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
def test_no_fault_is_found_where_none_is(name, order):
    """An assertion is left out unless a kernel is compiled with debug=True."""
    with driver("sm_90", Settings(order=order)):
        launch(name, 256 if name == "assertion" else 1000, 1 if name == "assertion" else 4)


def test_bad_accesses_are_not_made():
    buffer = torch.zeros(1001)
    with driver("sm_90"), pytest.raises(PtxError, match="out of bounds"):
        ptx_kernels.mask_one_too_long[(4,)](torch.ones(1000), buffer[:1000], 1000, BLOCK=256)
    assert buffer[:1000].eq(2).all() and buffer[1000] == 0


def test_threads_that_wait_for_ever_are_found():
    rows = "setp.lt.u32 %p1, %tid.x, 5; @%p1 bra WAIT; ret; WAIT: bar.warp.sync -1; bra AGAIN; AGAIN: bar.sync 0;"
    stuck = "setp.lt.u32 %p1, %tid.x, 5;\n@%p1 bra A;\nshfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;\nbra B;\nA: bar.sync 0;\nB:"
    Kernel(PTX.format(rows=rows)).launch((1,), [0], [])
    with pytest.raises(PtxError, match="deadlock"):
        Kernel(PTX.format(rows=stuck)).launch((1,), [0], [])


def test_accesses_are_counted():
    x, y = torch.rand(1000), torch.zeros(1000)
    with driver("sm_90") as session:
        ptx_kernels.sound[(4,)](x, y, 1000, BLOCK=256)
    counts = session.counts("sound")
    assert (counts.bytes_loaded, counts.bytes_stored, counts.launches) == (4000, 4000, 1)


@pytest.mark.parametrize("errors", ["random", "up", "down"])
def test_approximate_instructions_err_within_their_bounds(errors):
    x, target = torch.rand(1024) + 0.1, torch.zeros(10, 1024)
    with driver("sm_90", Settings(errors=errors)):
        ptx_kernels.functions[(1,)](x, target, BLOCK=1024)
    exact = x.numpy()
    assert (target[0].numpy() == np.sqrt(exact)).all()
    off = target[4].view(torch.int32) - torch.from_numpy(np.float32(3) / exact).view(torch.int32)
    assert off.abs().max() == 2
    assert {"up": (off > 0).all(), "down": (off < 0).all(), "random": (off == 0).any()}[errors]


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CC", "no-compiler-of-this-name")
    assert "install gcc, or set CC" in str(obstacle())
    with pytest.raises(RuntimeError, match="install gcc, or set CC"):
        Kernel(PTX.format(rows="mov.b64 %rd0, 1;"))


def test_interpreter_is_refused(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), driver("sm_90"):
        pass


def test_targets_are_named():
    with pytest.raises(ValueError, match=r"no target 'sm_1'.*sm_90"), driver("sm_1"):
        pass
