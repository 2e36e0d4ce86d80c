"""What torch's tests ask of its optimizers, asked of ours: every input of torch's own table, in every implementation.

The checks follow those of torch's test_optim.py, in code of our own. Where torch compares an implementation with its for-loop,
so do we, with its tolerances: those of torch.testing.assert_close for the dtype, after a single step.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt
from cases import Case, draw_gradients, make_parameters
from checkpoints import assert_equal_states, through_a_file
from single_step import checked_step, one_thread
from snapshot import same_bits
from torch_matrix import (
    ENTRIES,
    IMPLEMENTATIONS,
    KERNELS,
    TORCHS,
    Configuration,
    Network,
    Regression,
    accepted,
    assert_same_states,
    each_configuration,
    each_entry,
    each_stepping_configuration,
    states,
    table,
)

FLOATS, HALVES = [torch.float64, torch.float32], [torch.bfloat16, torch.float16]
any_names = pytest.mark.parametrize("names", [True, False], ids=["named", "unnamed"])


@pytest.fixture(autouse=True)
def one_core():
    with one_thread():
        yield


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def test_the_table_holds_every_class_of_ours_that_torch_has_too():
    ours = {name for name in fusedopt.__all__ if inspect.isclass(getattr(fusedopt, name))}
    replaced = {name for name in ours if getattr(torch.optim, name, None) not in (None, getattr(fusedopt, name))}
    assert {"SGD", "Adam", "AdamW"} <= {entry.name for entry in ENTRIES} == replaced


# --- the numbers: ours against torch's for-loop -------------------------------------------------------------------------------


def compare_single_steps(configuration: Configuration, dtype, **tolerances):
    """Seven steps of ours and torch's, each from the same numbers, since later ones would be compared with earlier errors."""
    ours = Network(dtype)
    theirs = ours.copy()
    our_optimizer = configuration.make_ours(ours.params, dtype)
    their_optimizer = configuration.make_torchs(theirs.params, dtype)
    for iteration in range(7):
        ours.draw_gradients(iteration)
        theirs.draw_gradients(iteration)
        our_optimizer.step()
        their_optimizer.step()
        torch.testing.assert_close(ours.params, theirs.params, **tolerances)
        assert_same_states(states(our_optimizer), states(their_optimizer), **tolerances)
        copy_all(ours.params, theirs.params)
        for our_state, their_state in zip(states(our_optimizer), states(their_optimizer), strict=True):
            copy_all([our_state[name] for name in their_state], list(their_state.values()))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@each_configuration(*KERNELS)
def test_a_step_is_that_of_the_loop(configuration, dtype):
    compare_single_steps(configuration, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@each_configuration(*KERNELS, where=lambda entry: "fused" in entry.supported_impls)
def test_a_step_in_16_bits_is_that_of_the_loop_or_nearer_to_the_exact(configuration, dtype):
    """For the classes whose fused implementation torch compares. Its loop rounds after each operation, ours once."""
    networks = Network(dtype), Network(dtype), Network(torch.float64)
    makers = configuration.make_ours, configuration.make_torchs, configuration.make_torchs
    optimizers = [make(network.params, dtype) for make, network in zip(makers, networks, strict=True)]
    for iteration in range(7):
        networks[1].draw_gradients(iteration)
        for network, optimizer in zip(networks, optimizers, strict=True):
            copy_all(network.params, networks[1].params)
            for p, other in zip(network.params, networks[1].params, strict=True):
                p.grad = None if other.grad is None else other.grad.to(p.dtype, copy=True)
            for own, state in zip(states(optimizer), states(optimizers[1]), strict=True):
                copy_all([own[name] for name in state], list(state.values()))
        for optimizer in optimizers:
            optimizer.step()
        assert_as_good([network.params for network in networks])
        for ours, loops, exact in zip(*map(states, optimizers), strict=True):
            assert set(ours) == set(loops) == set(exact)
            assert_as_good([[state[name] for name in exact] for state in (ours, loops, exact)])


def copy_all(targets, sources):
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def assert_as_good(triples):
    for our, loops, exact in zip(*triples, strict=True):
        as_loop = torch.isclose(our.float(), loops.float(), **dict(zip(("rtol", "atol"), tolerances_of(our.dtype), strict=True)))
        assert (as_loop | ((our - exact).abs() <= (loops - exact).abs())).all(), f"{our} instead of {loops}; {exact} is exact"


def tolerances_of(dtype):
    return torch.testing._comparison.get_tolerances(dtype, rtol=None, atol=None)


@each_configuration(*TORCHS)
def test_what_torch_is_asked_for_has_torchs_bits(configuration):
    compare_single_steps(configuration, torch.float32, rtol=0, atol=0, equal_nan=True)


def exact_case(configuration, dtype):
    # torch computes with a tensor lr in the dtype of the tensor: in float64 the reference loses nothing to it.
    exact = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in configuration.kwargs(dtype).items()}
    return Case(str(configuration), configuration.entry.optim_cls, configuration.theirs, exact)


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=dtype_id)
@each_configuration("automatic")
def test_a_step_is_as_exact_as_its_dtype(configuration, dtype):
    """In all dtypes against the float64 loop, with the tolerances of tolerances.py: the loop's own roundings play no part."""
    case = exact_case(configuration, dtype)
    params = make_parameters([(33,), (4, 6), (), (0,)], dtype)
    optimizer = case.make_ours(params)
    if configuration.entry.name == "ASGD" and dtype == torch.float64:
        # Its step size starts in the default dtype, torch's and ours; the reference's would start in float64.
        draw_gradients(params)
        optimizer.step()
    for _ in range(3):
        draw_gradients(params)
        checked_step(case, optimizer)


@each_configuration(*KERNELS)
def test_parameters_of_all_dtypes_in_one_optimizer(configuration):
    """Five times the tolerance of one step, as torch takes; where its loop makes no numbers of 16 bits, there are none to meet."""
    ours = [torch.nn.Parameter(torch.rand(2, 3).to(dtype)) for dtype in [*FLOATS, *HALVES]]
    theirs = copy.deepcopy(ours)
    draw_gradients(ours, theirs)
    configuration.make_ours(ours).step()
    configuration.make_torchs(theirs).step()
    for our, their in zip(ours, theirs, strict=True):
        rtol, atol = tolerances_of(our.dtype)
        finite = their.isfinite()
        assert our.isfinite().all()
        assert finite.all() or our.dtype in HALVES
        torch.testing.assert_close(our[finite], their[finite], rtol=5 * rtol, atol=5 * atol)


# --- the direction ------------------------------------------------------------------------------------------------------------


def goes_the_right_way(configuration, optimizer, problem, schedulers=(), steps=20):
    before = problem.loss()
    for _ in range(steps):
        loss = optimizer.step(problem.loss)
        step_all(schedulers, loss)
    after = problem.loss()
    assert after > before if configuration.kwargs().get("maximize") else after < before


def step_all(schedulers, loss):
    for scheduler in schedulers:
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(loss) if plateau else scheduler.step()


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@each_configuration("automatic", "loop")
def test_steps_go_the_right_way(configuration, contiguous):
    problem = Regression(contiguous=contiguous)
    goes_the_right_way(configuration, configuration.make_ours(problem.params), problem)


@each_configuration("automatic", "loop")
def test_steps_under_schedulers_go_the_right_way(configuration):
    for makers in configuration.entry.scheduler_inputs:
        problem = Regression()
        optimizer = configuration.make_ours(problem.params)
        goes_the_right_way(configuration, optimizer, problem, [make(optimizer) for make in makers])


@each_entry
def test_groups_under_schedulers_go_the_right_way(entry):
    for makers in entry.scheduler_inputs:
        problem = Regression()
        optimizer = entry.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
        configuration = Configuration(entry, 0, "default", "automatic")
        goes_the_right_way(configuration, optimizer, problem, [make(optimizer) for make in makers])


# --- kinds of numbers ---------------------------------------------------------------------------------------------------------


@each_stepping_configuration
def test_a_tensor_lr_does_what_a_number_does(configuration):
    by_number, lr = Regression(), 1e-3
    by_tensor = by_number.copy()
    try:
        tensor_optimizer = configuration.make_ours(by_tensor.params, lr=torch.tensor(lr))
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
            configuration.make_torchs(by_tensor.params, lr=torch.tensor(lr))
        return
    number_optimizer = configuration.make_ours(by_number.params, lr=lr)
    for _ in range(5):
        by_number.train(number_optimizer, 1)
        by_tensor.train(tensor_optimizer, 1)
        torch.testing.assert_close(by_tensor.params, by_number.params)


def of_complex(configuration):
    """Kernels give equal bits; torch's own operations add and multiply in one rounding or two, depending on an element's place."""
    return {"rtol": 0, "atol": 0} if configuration.implementation in KERNELS else {}


@each_configuration(*KERNELS, *TORCHS, where=lambda entry: entry.supports_complex)
def test_complex_parameters_are_pairs_of_real_ones(configuration):
    as_complex = [torch.randn(10, 5, dtype=torch.complex64), torch.randn(10, dtype=torch.complex64), torch.randn(10, 5)]
    as_real = [torch.view_as_real(p).clone() if p.is_complex() else p.clone() for p in as_complex]
    complex_optimizer, real_optimizer = configuration.make_ours(as_complex), configuration.make_ours(as_real)
    for _ in range(3):
        draw_gradients(as_real)
        for pair, p in zip(as_real, as_complex, strict=True):
            p.grad = torch.view_as_complex(pair.grad.clone()) if p.is_complex() else pair.grad.clone()
        complex_optimizer.step()
        real_optimizer.step()
        viewed = [torch.view_as_real(p) if p.is_complex() else p for p in as_complex]
        torch.testing.assert_close(viewed, as_real, **of_complex(configuration))


def rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rosenbrock_gradient(point):
    x, y = point
    return torch.stack((-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)))


@each_configuration(*KERNELS, *TORCHS, where=lambda entry: entry.supports_complex)
def test_a_complex_parameter_is_its_two_parts(configuration):
    point = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    parts = [part.detach().clone().requires_grad_() for part in (point.real, point.imag)]
    whole_optimizer, part_optimizer = configuration.make_ours([point]), configuration.make_ours(parts)
    for _ in range(3):
        whole_optimizer.zero_grad()
        part_optimizer.zero_grad()
        rosenbrock(point).abs().backward()
        rosenbrock(torch.complex(*parts)).abs().backward()
        gradients = [point.grad.real, point.grad.imag]
        torch.testing.assert_close([part.grad for part in parts], gradients)
        for part, gradient in zip(parts, gradients, strict=True):  # the two graphs may round in another order
            part.grad.copy_(gradient)
        whole_optimizer.step()
        part_optimizer.step()
        torch.testing.assert_close([point.real, point.imag], parts, **of_complex(configuration))


def sparse_inputs():
    """Each entry's inputs as torch's table tunes them for sparse gradients; many become the same."""
    for entry in ENTRIES:
        if entry.supports_sparse:
            tuned, makers = entry.metadata_for_sparse
            seen = []
            for number, given in enumerate(entry.optim_inputs_func(device="cpu")):
                kwargs = {**given.kwargs, **tuned}
                if kwargs not in seen:
                    seen.append(kwargs)
                    for implementation in ("automatic", "loop", "foreach"):
                        configuration = Configuration(entry, number, given.desc, implementation)
                        for scheduled in (False, True) if makers else (False,):
                            id_ = f"{configuration}-{'scheduled' if scheduled else 'constant'}"
                            yield pytest.param(configuration, tuned, makers if scheduled else [], id=id_)


@pytest.fixture
def checked_sparse_tensors():
    """torch warns where nobody has said whether to check them."""
    with torch.sparse.check_sparse_tensor_invariants(enable=True):
        yield


@pytest.mark.usefixtures("checked_sparse_tensors")
@pytest.mark.parametrize(("configuration", "tuned", "schedulers"), list(sparse_inputs()))
def test_sparse_gradients_do_what_dense_ones_do(configuration, tuned, schedulers):
    """Coordinate descent on Rosenbrock's function by uncoalesced gradients of one coordinate."""
    sparse, dense = points = [torch.nn.Parameter(torch.tensor([1.5, 1.5])) for _ in range(2)]
    optimizers = [configuration.make_ours([point], **tuned) for point in points]
    steering = [make(optimizer) for optimizer in optimizers for make in schedulers]
    before = rosenbrock(dense.detach())
    for step in range(100):
        coordinate = step % 2
        value = rosenbrock_gradient(dense.detach())[coordinate]
        dense.grad = torch.zeros(2).index_fill_(0, torch.tensor([coordinate]), float(value))
        parts = torch.stack([value / 4, value - value / 4])
        sparse.grad = torch.sparse_coo_tensor([[coordinate] * 2], parts, (2,))
        for optimizer in optimizers:
            optimizer.step()
        step_all(steering, rosenbrock(dense.detach()))
        # torch's tolerance: the sum of the parts is not exactly the value.
        torch.testing.assert_close(sparse, dense, rtol=5e-6, atol=5e-6)
        with torch.no_grad():
            sparse.copy_(dense)
    after = rosenbrock(dense.detach())
    assert after > before if configuration.kwargs().get("maximize") and "maximize" not in tuned else after < before


@pytest.mark.usefixtures("checked_sparse_tensors")
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.supports_sparse], ids=lambda entry: entry.name)
def test_sparse_gradients_are_refused_where_torch_refuses_them(entry):
    messages = []
    for cls in (entry.optim_cls, getattr(torch.optim, entry.name)):
        param = torch.nn.Parameter(torch.ones(2))
        param.grad = torch.sparse_coo_tensor([[0]], [1.0], (2,))
        with pytest.raises(RuntimeError) as raised:
            cls([param]).step()
        messages.append(str(raised.value))
        assert torch.equal(param, torch.ones(2))
    assert messages[0] == messages[1]


@each_configuration("differentiable")
def test_gradients_pass_through_a_step(configuration):
    """To the parameter, its gradient and its states."""
    trained = torch.randn(5, dtype=torch.float64)
    trained.grad = torch.randn_like(trained)
    first = configuration.make_torchs([trained])
    first.step()
    known = states(first)[0]
    gradient = torch.randn_like(trained)
    results = []
    for make in (configuration.make_ours, configuration.make_torchs):
        leaves = {name: v.clone().requires_grad_() for name, v in known.items() if v.shape == trained.shape}
        leaves |= {"parameter": trained.clone().requires_grad_(), "gradient": gradient.clone().requires_grad_()}
        param = leaves["parameter"].clone()
        optimizer = make([param])
        optimizer.state[param] = {name: leaves.get(name, value).clone() for name, value in known.items()}
        param.grad = leaves["gradient"].clone()
        optimizer.step()
        param.square().sum().backward()
        results.append({"result": param.detach(), **{f"to {name}": leaf.grad for name, leaf in leaves.items()}})
    ours, theirs = results
    assert ours["to parameter"].count_nonzero() == 5
    assert {name for name, v in ours.items() if v is None} == {name for name, v in theirs.items() if v is None}
    assert all(same_bits(ours[name], v) for name, v in theirs.items() if v is not None)


# --- what a step leaves alone -------------------------------------------------------------------------------------------------


@each_configuration()
def test_without_gradients_a_step_does_nothing(configuration):
    params = [torch.randn(2, 3) for _ in range(2)]
    before = copy.deepcopy(params)
    optimizer = configuration.make_ours(params)
    known = copy.deepcopy(states(optimizer))
    assert optimizer.step(lambda: torch.tensor(1.0)) == 1
    assert all(map(same_bits, params, before))
    assert_same_states(states(optimizer), known, rtol=0, atol=0)


@each_configuration()
def test_zero_gradients_move_nothing_but_by_a_decay(configuration):
    leaf = torch.randn(5, 1, requires_grad=True)
    results = []
    for make in (configuration.make_ours, configuration.make_torchs):
        # A step through which autograd can pass cannot write to a leaf.
        param = leaf.clone() if configuration.implementation == "differentiable" else leaf.detach().clone().requires_grad_()
        optimizer = make([param])
        param.grad = torch.zeros_like(param)
        optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)
    decays = optimizer.defaults.get("weight_decay") or configuration.entry.name == "ASGD"  # which decays by its lambd
    assert same_bits(results[0], leaf.detach()) or decays


@each_stepping_configuration
def test_gradients_are_never_written_to(configuration):
    problem = Regression()
    optimizer = configuration.make_ours(problem.params)
    for _ in range(3):
        problem.loss()
        before = [(p.grad, p.grad._version, p.grad.clone()) for p in problem.params]
        optimizer.step()
        for p, (gradient, version, values) in zip(problem.params, before, strict=True):
            assert p.grad is gradient
            assert gradient._version == version
            assert same_bits(gradient, values)


@each_stepping_configuration
def test_a_closure_is_called_once_with_gradients_enabled(configuration):
    problem, calls = Regression(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        return problem.loss()

    optimizer = configuration.make_ours(problem.params)
    before = problem.loss()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss, before)
    assert optimizer.step() is None


@pytest.mark.parametrize("scale", [None, 1.0], ids=["no scale", "scale"])
@each_configuration(*KERNELS)
def test_infinities_found_skip_the_step(configuration, scale):
    params = [torch.ones(1) for _ in range(5)]
    for p in params:
        p.grad = torch.ones(1)
    optimizer = configuration.make_ours(params)
    optimizer.grad_scale = None if scale is None else torch.full((1,), scale)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, torch.ones(1)) for p in params)
    assert all(float(state.get("step", 0)) == 0 for state in states(optimizer))


@each_entry
def test_fused_on_the_meta_device_is_refused_until_there_is_memory(entry):
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = entry.optim_cls(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # has nothing to do
    optimizer = entry.optim_cls(model.to_empty(device="cpu").parameters(), fused=True)
    for p in model.parameters():
        torch.nn.init.ones_(p)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p != 1).all() for p in model.parameters())


# --- states -------------------------------------------------------------------------------------------------------------------


@each_stepping_configuration
def test_a_parameter_that_has_a_state_has_torchs(configuration):
    ours = Regression()
    theirs = ours.copy()
    our_optimizer, their_optimizer = configuration.make_ours(ours.params), configuration.make_torchs(theirs.params)
    ours.train(our_optimizer, 1)
    theirs.train(their_optimizer, 1)
    assert_same_states(states(our_optimizer), states(their_optimizer))
    assert all(len(state) > 0 for state in our_optimizer.state.values())


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=dtype_id)
@each_configuration("automatic")
def test_step_counts_follow_the_default_dtype_as_torchs_do(configuration, default):
    """And nothing else does: with a default of 16 bits torch's ASGD rounds its step sizes to it."""
    ours = Regression(torch.float64)
    theirs, plain = ours.copy(), ours.copy()
    before, kwargs = torch.get_default_dtype(), configuration.kwargs()  # a tensor lr would follow the default, too
    torch.set_default_dtype(default)
    try:
        optimizer = configuration.make_ours(ours.params, **kwargs)
        their_optimizer = configuration.make_torchs(theirs.params, **kwargs)
        ours.train(optimizer, 3)
        theirs.train(their_optimizer, 3)
    finally:
        torch.set_default_dtype(before)
    plain.train(configuration.make_ours(plain.params, **kwargs), 3)
    for our_state, their_state in zip(states(optimizer), states(their_optimizer), strict=True):
        assert set(our_state) == set(their_state)
        if "step" in our_state:
            torch.testing.assert_close(our_state["step"], their_state["step"], rtol=0, atol=0)
    torch.testing.assert_close(ours.params, plain.params)


# --- groups -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["lr", "weight_decay"])
@each_configuration("automatic", "loop")
def test_groups_are_as_good_as_optimizers(configuration, option):
    """Groups with options of their own do, bit for bit, what optimizers with these options do."""
    if option not in inspect.signature(configuration.entry.optim_cls).parameters:
        pytest.skip(f"the class has no option {option}")
    together = Regression()
    apart = together.copy()
    values = {"lr": (1e-3, 1e-28), "weight_decay": (0.1, 0.0)}[option]
    groups = [{"params": [p], option: value} for p, value in zip(together.params, values, strict=True)]
    optimizer = configuration.make_ours(groups)
    optimizers = [configuration.make_ours([p], **{option: value}) for p, value in zip(apart.params, values, strict=True)]
    for _ in range(5):
        together.loss()
        apart.loss()
        optimizer.step()
        for each in optimizers:
            each.step()
        torch.testing.assert_close(together.params, apart.params, rtol=0, atol=0)


@each_stepping_configuration
def test_a_group_of_hardly_any_lr_stands_still(configuration):
    problem, still = Regression(), torch.nn.Parameter(torch.randn(2))
    before, kwargs = still.detach().clone(), {"lr": 1e-3, **configuration.kwargs()}
    outer = {"lr": 1e-28, **({"step_sizes": (0, 50)} if configuration.entry.name == "Rprop" else {})}
    options = accepted(configuration.entry.optim_cls, IMPLEMENTATIONS[configuration.implementation])
    optimizer = configuration.entry.optim_cls([{"params": problem.params, **kwargs}, {"params": [still]}], **outer, **options)
    first = problem.loss()
    for _ in range(20):
        problem.loss()
        still.grad = torch.rand(2)
        optimizer.step()
    last = problem.loss()
    assert last > first if kwargs.get("maximize") else last < first
    assert same_bits(still, before)


# --- what is refused ----------------------------------------------------------------------------------------------------------

ERRORS = [
    pytest.param(entry, number, id=f"{entry.name}-{error.optimizer_error_input.desc}")
    for entry in ENTRIES
    for number, error in enumerate(entry.optim_error_inputs_func(device="cpu", dtype=torch.float32))
]


def complaint(cls, error):
    """Return what is raised or warned of, as type and text."""
    given = error.optimizer_error_input
    on_step = error.error_on == table.OptimizerErrorEnum.STEP_ERROR
    optimizer = cls(given.params, **given.kwargs) if on_step else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error.error_type, match=error.error_regex) as raised:
            optimizer.step() if on_step else cls(given.params, **given.kwargs)
    return raised.type, str(raised.value)


@pytest.mark.parametrize(("entry", "number"), ERRORS)
def test_errors_are_torchs_word_for_word(entry, number):
    error = entry.optim_error_inputs_func(device="cpu", dtype=torch.float32)[number]
    assert complaint(entry.optim_cls, error) == complaint(getattr(torch.optim, entry.name), error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
    ],
    ids=["fused and foreach", "fused and differentiable"],
)
@each_entry
def test_options_that_exclude_each_other(entry, options, message):
    lacking = options.keys() - inspect.signature(entry.optim_cls).parameters.keys()
    if lacking:
        pytest.skip(f"{entry.name} has no option {', '.join(lacking)}")
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        entry.optim_cls([torch.ones(1)], **options)


# --- hooks --------------------------------------------------------------------------------------------------------------------


@each_configuration()
def test_step_hooks_run_in_order_and_once(configuration):
    """The hooks of all optimizers stand outside of an optimizer's own; removed ones run no more."""
    seen = []
    optimizer = configuration.make_ours([torch.ones(2)])
    other = torch.optim.SGD([torch.ones(2)])

    def note(what, caller, args, kwargs):
        assert caller in (optimizer, other)
        seen.append(what)

    handles = [
        register_optimizer_step_pre_hook(partial(note, "all before")),
        register_optimizer_step_post_hook(partial(note, "all after")),
    ]
    for each in (optimizer, other):
        handles.append(each.register_step_pre_hook(partial(note, "before")))
        handles.append(each.register_step_post_hook(partial(note, "after")))
    expected = ["all before", "before", "after", "all after"]
    try:
        for count, each in enumerate((optimizer, other, optimizer), 1):
            each.step()
            assert seen == count * expected
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step()
    assert seen == 3 * expected


@each_configuration()
def test_hooks_of_saving(configuration):
    optimizer = configuration.make_ours([torch.rand(2, 3, requires_grad=True)])

    def before(saving):
        saving.state["test"] = 1

    def after(_, saved):
        saved["found"] = saved["state"].pop("test", None)
        return saved

    optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["found"] is None
    handle = optimizer.register_state_dict_pre_hook(before)
    saved = optimizer.state_dict()
    assert saved["found"] == 1
    assert "test" not in saved["state"]
    handle.remove()
    del optimizer.state["test"]
    assert optimizer.state_dict()["found"] is None


@each_configuration()
def test_hooks_of_loading(configuration):
    optimizer, seen = configuration.make_ours([torch.rand(2, 3, requires_grad=True)]), []

    def in_place(_, loaded):
        seen.append("in place")
        loaded["param_groups"][0]["lr"] = 0.002

    def by_a_copy(_, loaded):
        seen.append("by a copy")
        mine = copy.deepcopy(loaded)
        mine["param_groups"][0]["lr"] = 0.003
        return mine

    def afterwards(loading):
        seen.append(float(loading.param_groups[0]["lr"]))

    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_post_hook(afterwards)
    handle = optimizer.register_load_state_dict_pre_hook(by_a_copy)
    optimizer.load_state_dict(saved)
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(saved)
    optimizer.register_load_state_dict_pre_hook(by_a_copy, prepend=True)
    optimizer.load_state_dict(saved)
    assert seen == ["by a copy", 0.003, "in place", 0.002, "by a copy", "in place", 0.002]


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def go_on_alike(first, first_optimizer, second, second_optimizer, steps=3, **tolerances):
    for _ in range(steps):
        first.train(first_optimizer, 1)
        second.train(second_optimizer, 1)
        torch.testing.assert_close(first.params, second.params, **tolerances)


def without_names(groups):
    return [{name: value for name, value in group.items() if name != "param_names"} for group in groups]


@pytest.mark.parametrize("into_names", [True, False], ids=["into named", "into unnamed"])
@any_names
@each_configuration("automatic")
def test_a_checkpoint_goes_on_bit_for_bit_with_names_or_without(configuration, names, into_names):
    resume(configuration, names, into_names)


@each_stepping_configuration
def test_a_checkpoint_goes_on_bit_for_bit(configuration):
    resume(configuration, names=False, into_names=False)


def resume(configuration, names, into_names):
    """Train, save, load, train on, and be at one in everything but the names."""
    first = Regression()
    optimizer = configuration.make_ours(first.named(names))
    first.train(optimizer, 5)
    second = first.copy()
    loaded = configuration.make_ours(second.named(into_names))
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    if names or into_names:
        assert loaded.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    go_on_alike(first, optimizer, second, loaded, rtol=0, atol=0)
    ours, theirs = optimizer.state_dict(), loaded.state_dict()
    assert_equal_states(theirs, ours)
    assert without_names(theirs["param_groups"]) == without_names(ours["param_groups"])
    # A parameter that is listed once more is saved under the number that it has.
    loaded.param_groups.extend(loaded.param_groups)
    assert without_names(loaded.state_dict()["param_groups"])[-1] == without_names(ours["param_groups"])[-1]


@pytest.mark.parametrize("direction", ["ours to torch's", "torch's to ours"])
@any_names
@each_configuration("automatic")
def test_a_checkpoint_goes_on_in_the_other_library(configuration, names, direction):
    make_first, make_second = configuration.make_ours, configuration.make_torchs
    if direction == "torch's to ours":
        make_first, make_second = make_second, make_first
    first = Regression()
    optimizer = make_first(first.named(names))
    first.train(optimizer, 3)
    second = first.copy()
    loaded = make_second(second.named(names))
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal_states(loaded.state_dict(), optimizer.state_dict())
    go_on_alike(first, optimizer, second, loaded, steps=1)
    assert_same_states(states(loaded), states(optimizer))


@each_stepping_configuration
def test_a_checkpoint_without_newer_options_goes_on(configuration):
    first = Regression()
    optimizer = configuration.make_ours(first.params)
    first.train(optimizer, 3)
    second = first.copy()
    loaded = configuration.make_ours(second.params)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for option in configuration.entry.not_og_supported_flags:
            group.pop(option, None)
    loaded.load_state_dict(old)
    assert loaded.param_groups[0].keys() == optimizer.param_groups[0].keys()
    go_on_alike(first, optimizer, second, loaded, rtol=0, atol=0)


@each_stepping_configuration
def test_a_checkpoint_whose_step_counts_are_numbers_goes_on(configuration):
    first = Regression()
    optimizer = configuration.make_ours(first.params)
    first.train(optimizer, 3)
    second = first.copy()
    loaded = configuration.make_ours(second.params)
    old = copy.deepcopy(optimizer.state_dict())
    for state in old["state"].values():
        if "step" in state:
            state["step"] = float(state["step"])
    loaded.load_state_dict(old)
    go_on_alike(first, optimizer, second, loaded, rtol=0, atol=0)


@any_names
@each_configuration(*KERNELS)
def test_a_checkpoint_is_of_plain_types(configuration, names):
    """``torch.load`` takes nothing else with ``weights_only=True``."""
    problem = Regression()
    optimizer = configuration.make_ours(problem.named(names))
    problem.train(optimizer, 3)
    saved = optimizer.state_dict()
    loaded = through_a_file(saved)
    assert_equal_states(loaded, saved)
    assert loaded["param_groups"] == saved["param_groups"]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert_equal_states(torch.load(file, weights_only=False), saved)


@each_stepping_configuration
def test_a_hook_may_load_by_name(configuration):
    """torch's recipe for parameters in another order than that of the checkpoint."""
    first = Regression()
    optimizer = configuration.make_ours(first.named(True))
    first.train(optimizer, 3)
    second = first.copy()
    loaded = configuration.make_ours(list(reversed(second.named(True))))

    def by_name(loading, given):
        (old,), (own,) = given["param_groups"], loading.param_groups
        number = dict(zip(old["param_names"], old["params"], strict=True))
        state = {i: given["state"][number[name]] for i, name in enumerate(own["param_names"]) if number[name] in given["state"]}
        group = {**old, "params": list(range(len(number))), "param_names": own["param_names"]}
        return {"state": state, "param_groups": [group]}

    loaded.register_load_state_dict_pre_hook(by_name)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["param_names"] == ["bias", "weight"]
    go_on_alike(first, optimizer, second, loaded, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@each_configuration("automatic")
def test_a_checkpoint_of_float32_loads_into_16_bits(configuration, dtype):
    """Its states stay float32, as the library promises, and the next step takes them."""
    first = Regression()
    optimizer = configuration.make_ours(first.params, dtype)
    first.train(optimizer, 3)
    params = [torch.nn.Parameter(p.detach().to(dtype)) for p in first.params]
    loaded = configuration.make_ours(params, dtype)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_equal_states(loaded.state_dict(), optimizer.state_dict())
    draw_gradients(params)
    checked_step(exact_case(configuration, dtype), loaded)
    assert all(p.dtype == dtype for p in params)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@each_configuration("automatic", "loop")
def test_copies_go_on_bit_for_bit(configuration, copied):
    first = Regression()
    optimizer = configuration.make_ours(first.params)
    first.train(optimizer, 3)
    second, other = copied((first, optimizer))
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(other) if not name.startswith("_")} == public
    go_on_alike(first, optimizer, second, other, rtol=0, atol=0)


# --- schedulers ---------------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, threshold=10.0, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=cycles_momentum(o)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10, cycle_momentum=cycles_momentum(o)),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=4),
}


def cycles_momentum(optimizer):
    """Whether there is a momentum that a scheduler can write to."""
    return bool(optimizer.defaults.get("momentum", optimizer.defaults.get("betas")))


def test_the_schedulers_are_all_of_torchs():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} | {"SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_configuration("automatic", inputs=("default", "momentum"))
def test_schedulers_steer_ours_as_they_do_torchs(configuration, scheduler):
    """The groups are equal after each step of a scheduler, and so are parameters, which start from the same numbers."""
    ours = Regression(torch.float64)
    theirs = ours.copy()
    optimizers = configuration.make_ours(ours.params), configuration.make_torchs(theirs.params)
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in optimizers]
    for _ in range(8):
        loss = torch.tensor(1.0)  # the same for both, whatever theirs have rounded to
        ours.train(optimizers[0], 1)
        theirs.train(optimizers[1], 1)
        # Eight steps, each of which may differ by some roundings in float64.
        torch.testing.assert_close(ours.params, theirs.params, rtol=1e-7, atol=1e-7)
        for each in schedulers:
            step_all([each], loss)
        for own, their in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
            names = ("lr", "initial_lr", "momentum", "betas", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr")
            assert {name: own.get(name) for name in names} == {name: their.get(name) for name in names}
    assert [each.state_dict().get("last_epoch") for each in schedulers] == [schedulers[0].state_dict().get("last_epoch")] * 2


# --- printing and profiling ---------------------------------------------------------------------------------------------------


@each_configuration()
def test_printing_names_the_class_and_all_options(configuration):
    optimizer = configuration.make_ours([torch.nn.Parameter(torch.randn(2, 3))])
    text = repr(optimizer)
    assert text.startswith(f"{configuration.entry.name} (\nParameter Group 0\n")
    for name in configuration.kwargs():
        assert f"    {name}: {optimizer.param_groups[0][name]}\n" in text


@each_entry
def test_the_profiler_names_the_step(entry):
    problem = Regression()
    optimizer = entry.optim_cls(problem.params)
    problem.loss()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.")]
    assert sorted(names) == [f"Optimizer.{what}#{entry.name}.{what}" for what in ("step", "zero_grad")]
