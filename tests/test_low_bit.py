"""What states in 8 bits and in bf16 must hold: measured on the kernels, against float32 on the same gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt.kernels import blocks, codes
from fusedopt.kernels.formats import CODES
from gradient_streams import STREAMS, distance, updates

NUMPY = codes.bound(codes.ARRAYS)
TORCH = codes.bound(codes.TENSORS)


def parameter(count=8192, dtype=torch.float32):
    return torch.nn.Parameter(torch.zeros(count, dtype=dtype))


def adamw(eps, **options):
    return fusedopt.AdamW([parameter()], lr=1.0, eps=eps, weight_decay=0, **options)


# --- updates -----------------------------------------------------------------------------------------------------------------

#: The relative L2 error of the updates that is allowed.
LIMITS = {
    "gauss": 0.015,
    "lognormal 1": 0.065,
    "lognormal 2": 0.11,
    "sparse": 0.025,
    "tiny 2e-8": 0.015,
    "tiny 1e-12": 0.015,
    "huge": 0.015,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STREAMS)
def test_updates_are_close_to_those_of_float32(name, seed):
    eps = STREAMS[name][1]
    error, largest = distance(adamw(eps, state_format="8bit"), adamw(eps), name, 300, seed)
    assert error <= LIMITS[name]
    assert largest <= 2.2


@pytest.mark.parametrize("name", STREAMS)
def test_updates_of_bf16_states_are_close(name):
    eps = STREAMS[name][1]
    error, largest = distance(adamw(eps, state_format="bf16"), adamw(eps), name, 300, 0)
    assert error <= 0.015
    assert largest <= 2.2


@pytest.mark.parametrize("state_format", ["8bit", "bf16"])
def test_second_moment_follows_gradients_that_fall_tenfold(state_format):
    """Rounded to nearest, an average that loses a thousandth at each step would stay where it is."""
    ours, truth = (adamw(1e-8, state_format=each) for each in (state_format, None))
    generator = np.random.default_rng(0)
    for step in range(1, 3301):
        gradient = torch.from_numpy((generator.standard_normal(8192) * (1e-3 if step <= 300 else 1e-4)).astype(np.float32))
        for optimizer in (ours, truth):
            optimizer.param_groups[0]["params"][0].grad = gradient
            optimizer.step()
        if step in (300, 600, 1000, 2000, 3300):
            moments = [decoded(optimizer)["exp_avg_sq"] for optimizer in (ours, truth)]
            assert float((moments[0].double().mean() / moments[1].double().mean()).sqrt()) == pytest.approx(1, abs=0.01)


def decoded(optimizer):
    """The states of the only parameter as float32."""
    return optimizer.state_dict(format="torch")["state"][0]


OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "Momentum": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0},
    "RMSprop": {"momentum": 0.9},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Lion": {},
    "Rprop": {},
}


@pytest.mark.parametrize("state_format", ["8bit", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_coordinates_without_gradients_do_not_move(name, state_format):
    start = torch.randn(8192)
    param = torch.nn.Parameter(start.clone())
    optimizer = getattr(fusedopt, name)([param], lr=1e-2, state_format=state_format, **OPTIMIZERS[name])
    still = torch.rand(8192) < 0.5
    still[512:1500] = True  # and whole blocks
    for _ in range(20):
        param.grad = torch.randn(8192).masked_fill(still, 0)
        optimizer.step()
    assert torch.equal(param.detach()[still], start[still])
    assert not torch.equal(param.detach()[~still], start[~still])


@pytest.mark.parametrize("scale", [1e-20, 1e-15, 1e-7, 1e3, 1e12, 1e18])
def test_gradients_of_any_size(scale):
    options = {"eps": 1e-30, "weight_decay": 0}
    pair = [fusedopt.AdamW([parameter()], lr=1.0, state_format=each, **options) for each in ("8bit", None)]
    gradients = [torch.randn(8192) * scale for _ in range(30)]
    for step, (update, true) in enumerate(zip(*(updates(optimizer, gradients) for optimizer in pair), strict=True)):
        # In the first steps of the smallest, float32 itself has squares of one or two digits.
        if step >= 4:
            assert float((update - true).norm() / true.norm()) < 0.03
            assert float(update.abs().max()) < 2.2


@pytest.mark.parametrize(("small", "large"), [(1e-20, 1.0), (1e-19, 1e-3), (1e-18, 1e12), (1e-12, 1e18)])
def test_gradients_of_any_size_in_a_block(small, large):
    """Squares of the smallest are denormal, where bit patterns are no logarithm."""
    sizes = torch.where(torch.arange(8192) % 2 == 0, small, large)
    pair = [fusedopt.AdamW([parameter()], lr=1.0, eps=1e-30, weight_decay=0, state_format=each) for each in ("8bit", None)]
    gradients = [torch.randn(8192) * sizes for _ in range(60)]
    for step, (update, true) in enumerate(zip(*(updates(optimizer, gradients) for optimizer in pair), strict=True)):
        # As far as float32 itself has digits of the smallest, and in steps of up to a sixth of a binade.
        if step >= 30:
            assert float((update - true).norm() / true.norm()) < 0.35
            assert float(update.abs().max()) < 2.2


def test_what_is_finite_stays_so():
    """Sums of squares up to the largest float32, beside small ones: no code is above the largest."""
    param = parameter()
    optimizer = fusedopt.Adagrad([param], state_format="8bit")
    large = 1.3e19 + 0.5e19 * torch.rand(8192)
    for step in range(3):
        param.grad = torch.where(torch.arange(8192) % 2 == 0, large, 1e5) if step == 0 else torch.zeros(8192)
        optimizer.step()
        assert decoded(optimizer)["sum"].isfinite().all()
    assert param.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_no_number_shows_in_its_block_alone(bad):
    ours, truth = adamw(1e-8, state_format="8bit"), adamw(1e-8)
    for step in range(3):
        gradient = torch.randn(8192)
        if step == 1:
            gradient[1000] = bad
        for optimizer in (ours, truth):
            optimizer.param_groups[0]["params"][0].grad = gradient
            optimizer.step()
    own, true = (optimizer.param_groups[0]["params"][0].detach() for optimizer in (ours, truth))
    assert true.isnan().nonzero().tolist() == [[1000]]
    assert own[1000].isnan()
    others = torch.ones(8192, dtype=torch.bool)
    others[1000 // 256 * 256 : 1000 // 256 * 256 + 256] = False
    assert own[others].isfinite().all()


def test_a_rare_gradient_fades_as_in_float32():
    """An embedding row that is hit once: rounded to nearest, its first moment would stay at a few codes and go on for ever."""
    ours, truth = adamw(1e-8, state_format="8bit"), adamw(1e-8)
    moved = [torch.zeros(8192), torch.zeros(8192)]
    for step in range(400):
        gradient = torch.randn(8192) * 1e-3
        if step:
            gradient[::8] = 0
        for total, optimizer in zip(moved, (ours, truth), strict=True):
            (param,) = optimizer.param_groups[0]["params"]
            with torch.no_grad():
                param.zero_()
            param.grad = gradient
            optimizer.step()
            total += param.detach()
    rare = [total[::8].double().abs().mean() for total in moved]
    assert float(rare[0] / rare[1]) == pytest.approx(1, abs=0.02)


# --- the codes by themselves -------------------------------------------------------------------------------------------------


def encoded(name, x, random, sizes=None):
    code, words, _ = blocks.encode(CODES[name], x, random, sizes)
    return blocks.decode(CODES[name], code, words, sizes)[0]


@pytest.mark.parametrize("name", ["size", "root", "signed"])
def test_codes_are_unbiased(name):
    """The mean over all random bits is the number itself."""
    x = torch.exp(2 * torch.randn(256)) * 1e-3
    x[7] = 0
    total = torch.zeros(256, dtype=torch.float64)
    draws = torch.arange(0, 1 << 16, 64) + 32
    for draw in draws:
        total += encoded(name, x, torch.full((256,), int(draw))).double()
    mean = total / len(draws)
    ends = [encoded(name, x, torch.full((256,), end)).double() for end in (0, 65535)]
    spacing = (ends[0] - ends[1]).abs()
    assert ((mean - x.double()).abs() <= spacing / 500 + 1e-6 * x.double()).all()
    assert mean[7] == 0


@pytest.mark.parametrize("ratio", [1e-30, 1e-10, 1e-3])
def test_nothing_beside_something_large_becomes_zero(ratio):
    x = torch.full((256,), 1.0)
    x[5] = ratio
    # Codes of what spans a hundred binades are half a binade from each other.
    for name, random in itertools.product(("size", "root"), (0, 65535)):
        assert ratio / 1.5 < encoded(name, x, torch.full((256,), random))[5] < 1.5 * ratio


@pytest.mark.parametrize("least", [1e-45, 6e-39, 4.4e-39, 1e-38, 1e-20])
def test_codes_are_unbiased_beside_the_least(least):
    x = torch.exp(torch.linspace(np.log(max(least, 1e-44)), np.log(1e12), 256))
    x[0] = least
    total = torch.zeros(256, dtype=torch.float64)
    draws = torch.arange(0, 1 << 16, 64) + 32
    for draw in draws:
        total += encoded("size", x, torch.full((256,), int(draw))).double()
    # Denormals are decoded to themselves, which have few digits.
    assert ((total / len(draws) - x.double()).abs() <= 0.004 * x.double() + 1e-45).all()


@pytest.mark.parametrize(
    ("lowest", "highest"), [(0x4B000000, 0x4CF9FFFF), (0x11000000, 0x503FFFF6), (0x01000000, 0x7F7FFFD3), (1, 0x7F7FFFFF)]
)
def test_no_code_is_beyond_a_byte(lowest, highest):
    x = torch.tensor([lowest, highest] * 128, dtype=torch.int32).view(torch.float32)
    for random in (0, 32768, 65535):
        code, _, _ = blocks.encode(CODES["size"], x, torch.full((256,), random), None)
        assert (code > 0).all()
        assert (encoded("size", x, torch.full((256,), random)) > 0).all()


def test_zero_has_its_own_code():
    for name in ("size", "root", "signed"):
        for x in (torch.zeros(300), torch.cat([torch.zeros(100), torch.ones(200)])):
            assert torch.equal(encoded(name, x, torch.full((300,), 65535)) == 0, x == 0)


def test_bfloat16_by_chance_is_unbiased_and_keeps_what_is_no_number():
    x = torch.randn(256)
    total = torch.zeros(256, dtype=torch.float64)
    for draw in range(0, 1 << 16, 256):
        total += blocks.to_bfloat16(x, torch.full((256,), draw)).double()
    assert ((total / 256 - x.double()).abs() <= x.abs().double() * 2**-14).all()
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0])
    rounded = blocks.to_bfloat16(special, torch.full((6,), 65535))
    assert torch.equal(rounded.float()[1:], special[1:])
    assert rounded[0].isnan()


# --- chance ------------------------------------------------------------------------------------------------------------------


def test_random_words_look_random():
    """Each bit is set half of the time, and neighbours in the element, the step, the parameter and the slot are unrelated.

    Of the upper 20, which decide the first digits of every chance: the hash lacks the fold that would serve the others.
    """
    count = 1 << 16
    keys = [blocks.key_of(0, index) for index in range(2)]
    device = torch.device("cpu")

    def draw(key=keys[0], step=1, first=0, number=0):
        return blocks.random_words(key, step, first, count, number, device)

    def signs(words):
        return ((words[:, None] >> torch.arange(12, 32)) & 1).double() * 2 - 1

    base = signs(draw())
    limit = 5 / count**0.5
    assert (base.mean(0).abs() < limit).all()
    for other in (draw(step=2), draw(key=keys[1]), draw(first=1), draw(first=1 << 32), draw(number=1), draw(first=256)):
        assert ((base.T @ signs(other) / count).abs() < limit * 1.2).all()
    neighbours = base.T @ base / count - torch.eye(20, dtype=torch.float64)
    assert (neighbours.abs() < limit).all()


def test_numpy_and_torch_mean_the_same_by_the_functions():
    index = np.arange(1000, dtype=np.uint32)
    words = NUMPY.scramble(index)
    assert words.tolist() == TORCH.scramble(torch.arange(1000)).tolist()
