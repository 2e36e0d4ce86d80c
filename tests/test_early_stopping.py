"""EarlyStopping: when it stops, and that the weights it puts back are those of the best check, to the last bit."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import fusedopt

NAN, INF = math.nan, math.inf

# Arguments, the values handed in, at which of them it stops (None: not at all), and which of them was the best.
RUNS = {
    "stops after patience checks": ({"patience": 2}, [3, 2, 1, 1.5, 1.2, 0], 5, 3),
    "an improvement starts the count anew": ({"patience": 2}, [3, 4, 2, 4, 1, 4, 4], 7, 5),
    "patience of one": ({"patience": 1}, [3, 2, 2.5], 3, 2),
    "does not stop while improving": ({"patience": 1}, [5, 4, 3, 2], None, 4),
    "an equal value is no improvement": ({"patience": 2}, [1, 1, 1], 3, 1),
    "an improvement too small to count": ({"patience": 2, "least_improvement": 0.5}, [3, 2.75, 2.6, 0], 3, 1),
    "small improvements add up": ({"patience": 3, "least_improvement": 0.5}, [3, 2.75, 2.4, 2.4], None, 3),
    "larger is better": ({"patience": 2, "maximize": True}, [0.1, 0.5, 0.4, 0.3], 4, 2),
    "larger is better, by enough": ({"patience": 1, "maximize": True, "least_improvement": 0.2}, [0.1, 0.5, 0.6], 3, 2),
    "not a number is no improvement": ({"patience": 2}, [2, NAN, NAN], 3, 1),
    "a number after what is none": ({"patience": 3}, [NAN, NAN, 2, 3], None, 3),
    "infinity improves on nothing": ({"patience": 2}, [INF, INF, 1], None, 3),
}


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def scramble(model):
    """Other values in all parameters and buffers, the integer ones included."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(1, 100, value.shape) if not value.dtype.is_floating_point else torch.randn(value.shape))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run(stopping, values):
    """Hand in values, the model changed before each; return at which it stopped, and the weights at each."""
    seen = []
    for check, value in enumerate(values, start=1):
        scramble(stopping.model)
        seen.append(copy.deepcopy(stopping.model.state_dict()))
        if stopping.step(value):
            return check, seen
    return None, seen


@pytest.mark.parametrize(("arguments", "values", "stops_at", "best_check"), RUNS.values(), ids=RUNS)
def test_stops_and_restores(arguments, values, stops_at, best_check):
    model = network()
    stopping = fusedopt.EarlyStopping(model, **arguments)
    stopped_at, seen = run(stopping, values)
    assert stopped_at == stops_at
    assert stopping.stopped == (stops_at is not None)
    assert (stopping.best, stopping.best_check) == (values[best_check - 1], best_check)
    if stops_at is None:
        assert equal(model.state_dict(), seen[-1]), "weights are put back when it stops, not before"
        stopping.restore()
    assert equal(model.state_dict(), seen[best_check - 1])


def test_restores_in_place():
    """A plan of an optimizer, and whoever else holds the parameters, finds them where they were."""
    model = network()
    stopping = fusedopt.EarlyStopping(model, patience=1)
    parameters = {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()}
    run(stopping, [1, 2])
    assert {name: (parameter, parameter.data_ptr()) for name, parameter in model.named_parameters()} == parameters


def test_training_goes_on_after_the_weights_are_put_back():
    """What it keeps is its own: steps taken afterwards do not change it."""
    model = network()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)
    stopping = fusedopt.EarlyStopping(model, patience=1)
    _, seen = run(stopping, [1, 2])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    assert not equal(model.state_dict(), seen[0])
    stopping.restore()
    assert equal(model.state_dict(), seen[0])


def test_takes_a_tensor():
    stopping = fusedopt.EarlyStopping(network())
    loss = torch.tensor([0.5], requires_grad=True)
    assert not stopping.step(loss.sum())
    assert type(stopping.best) is float
    assert stopping.best == 0.5


def test_goes_on_from_a_checkpoint():
    values, stops_at = [3, 1, 2, 2, 2], 5
    first = fusedopt.EarlyStopping(network(), patience=3)
    _, seen = run(first, values[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = fusedopt.EarlyStopping(network(), patience=3)
    second.load_state_dict(torch.load(file, weights_only=True))
    stopped_at, _ = run(second, values[3:])
    assert stopped_at == stops_at - 3
    assert equal(second.model.state_dict(), seen[1])


def test_a_loaded_checkpoint_is_copied():
    first = fusedopt.EarlyStopping(network())
    first.step(1.0)
    state = first.state_dict()
    second = fusedopt.EarlyStopping(network())
    second.load_state_dict(state)
    state["best_weights"]["0.weight"].zero_()
    second.restore()
    assert second.model.state_dict()["0.weight"].any()


class Counter(nn.Linear):
    """Keeps something beside tensors."""

    seen: list[int]

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def test_extra_state_is_kept_and_put_back():
    model = Counter(2, 2)
    model.seen = [1]
    stopping = fusedopt.EarlyStopping(model, patience=1)
    stopping.step(1.0)
    model.seen.append(2)
    stopping.step(2.0)
    assert model.seen == [1]
    model.seen.append(3)
    stopping.restore()
    assert model.seen == [1], "what is kept is not the model's to change"


@pytest.mark.parametrize("values", [[], [NAN], [NAN, NAN, NAN]], ids=["no values", "one", "until it stops"])
def test_nothing_to_restore_is_explained(values):
    model = network()
    stopping = fusedopt.EarlyStopping(model, patience=3)
    assert [stopping.step(value) for value in values] == [check == 3 for check in range(1, len(values) + 1)]
    with pytest.raises(RuntimeError, match=rf"none of {len(values)} values was a number"):
        stopping.restore()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "Invalid patience: 0"),
        ({"least_improvement": -0.1}, "Invalid least_improvement: -0.1"),
        ({"least_improvement": NAN}, "Invalid least_improvement: nan"),
        ({"least_improvement": INF}, "Invalid least_improvement: inf"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedopt.EarlyStopping(network(), **arguments)
