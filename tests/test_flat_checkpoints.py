"""Flat distributed checkpoints, whose readers ask for the keys of their own groups: from torch's optimizers to ours, and back."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import fusedopt
from training import MAKERS, NAMES, assert_same_weights, backward, make_batches, make_model

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")


def flat(model, optimizer):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("writer", "reader"), [("truth", "ours"), ("ours", "truth")], ids=["from torch's", "into torch's"])
@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(torch.optim, name)])
def test_flat_checkpoints_are_exchanged(tmp_path, name, writer, reader):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    first, second, right = (make_model() for _ in range(3))
    optimizer, expected = MAKERS[writer](name, first.parameters()), MAKERS["truth"](name, right.parameters())
    batches = make_batches(6)
    for batch in batches[:3]:
        backward(first, batch)
        optimizer.step()
    dcp.save(flat(first, optimizer), checkpoint_id=tmp_path)
    second.load_state_dict(first.state_dict())
    again = MAKERS[reader](name, second.parameters())
    template = flat(second, again)
    dcp.load(template, checkpoint_id=tmp_path)
    second.load_state_dict(first.state_dict())  # the template's step has decayed what it was made of
    set_optimizer_state_dict(second, again, template, options=StateDictOptions(flatten_optimizer_state_dict=True))
    for batch in batches[3:]:
        backward(second, batch)
        again.step()
    for batch in batches:
        backward(right, batch)
        expected.step()
    assert_same_weights(name, second, right)


def test_options_that_were_asked_for_are_kept():
    optimizer = fusedopt.SGD(make_model().parameters(), decoupled_weight_decay=True)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    other = fusedopt.SGD(make_model().parameters())
    assert "decoupled_weight_decay" not in other.param_groups[0]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["decoupled_weight_decay"] is True
    asked = fusedopt.RMSprop(make_model().parameters(), fused=True)
    plain = fusedopt.RMSprop(make_model().parameters())
    plain.load_state_dict(asked.state_dict())
    assert "fused" not in plain.param_groups[0], "who steps is this optimizer's own"
    asked.load_state_dict(plain.state_dict())
    assert asked.param_groups[0]["fused"] is True
