"""warmup() compiles what the first step needs, and does nothing else."""

import pytest
import torch

import fusedopt
from cases import draw_gradients, each_case, make_parameters
from compilations import compilations
from single_step import checked_step
from snapshot import same_bits


@each_case
def test_the_first_step_after_it_compiles_nothing(case):
    params = [*make_parameters([(), (33,), (4, 6)]), *make_parameters([(5,)], torch.bfloat16)]
    optimizer = case.make_ours(params)
    fusedopt.warmup(optimizer)
    before = compilations()
    draw_gradients(params)
    optimizer.step()
    assert compilations() == before
    kinds = {part.bucket.kind.name for part in optimizer._prepared.plan.parts}
    assert all(any(kind in name for name in before) for kind in kinds)


@each_case
def test_it_leaves_everything_as_it_was(case):
    params = make_parameters([(), (33,), (4, 6)])
    right = [p.detach().clone() for p in params]
    optimizer = case.make_ours(params)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    keys = vars(optimizer).keys()
    state = {p: dict(values) for p, values in optimizer.state.items()}  # Adagrad's is there from the beginning
    random = torch.get_rng_state()
    fusedopt.warmup(optimizer, unscale=True)
    assert all(map(same_bits, params, right))
    assert all(p.grad is None for p in params)
    assert {p: dict(values) for p, values in optimizer.state.items()} == state
    assert vars(optimizer).keys() == keys
    assert torch.equal(torch.get_rng_state(), random)
    assert not calls
    draw_gradients(params)
    checked_step(case, optimizer)


def test_scaled_steps_compile_nothing_after_it():
    params = make_parameters([(33,)])
    optimizer = fusedopt.AdamW(params)
    fusedopt.warmup(optimizer, unscale=True)
    before = compilations()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((params[0] ** 2).sum()).backward()
    scaler.step(optimizer)
    assert compilations() == before
    assert any("unscale" in name for name in before)


def test_it_knows_the_dtypes_of_states_that_are_there():
    """float32 states of a bfloat16 parameter, as a checkpoint may bring them, take another kernel."""
    params = make_parameters([(33,)], torch.bfloat16)
    optimizer = fusedopt.AdamW(params)
    draw_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {name: value.float() for name, value in saved["state"][0].items()}
    optimizer = fusedopt.AdamW(params)
    optimizer.load_state_dict(saved)
    fusedopt.warmup(optimizer)
    before = compilations()
    optimizer.step()
    assert compilations() == before


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}], ids=str)
def test_what_takes_no_kernel_needs_none(options):
    optimizer = fusedopt.Adam(make_parameters([(3,)]), **options)
    before = compilations()
    fusedopt.warmup(optimizer)
    assert compilations() == before


def test_optimizers_of_torch_are_refused():
    with pytest.raises(TypeError, match="takes an optimizer of fusedopt, not Adam"):
        fusedopt.warmup(torch.optim.Adam(make_parameters([(3,)])))
