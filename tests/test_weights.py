"""Weight updates: everything arrives, and nothing damaged is used."""

import gc
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from winnow.rollout.weights import Staged, WeightError, copy_into, pack, state_of, unpack, untied


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


TENSORS = {
    "a": torch.arange(7, dtype=torch.float32),
    "b": torch.randn(3, 5).to(torch.bfloat16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 2),
    "turned": torch.randn(4, 6).T,
    "whole": torch.arange(5),
}


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_round_trip(bucket_bytes):
    update = pickle.loads(pickle.dumps(pack(TENSORS, 4, bucket_bytes), protocol=5))
    assert update.version == 4 and len(update.buckets) == (1 if bucket_bytes > 100 else len(update.buckets))
    for bucket in update.buckets:
        bucket.flags.writeable = False  # as from the object store
    arrived = dict(unpack(update))
    assert list(arrived) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor), name


def test_a_changed_byte_is_refused_by_name():
    update = pack(TENSORS, 4)
    entry = next(e for e in update.entries if e.name == "turned")
    update.buckets[entry.bucket][entry.offset + 5] ^= 1
    with pytest.raises(WeightError, match=r"version 4: tensor 'turned' arrived with checksum"):
        dict(unpack(update))
    cut = type(update)(version=4, entries=update.entries, buckets=(update.buckets[0][:40],))
    with pytest.raises(WeightError, match="lies outside"):
        dict(unpack(cut))


def test_a_tied_tensor_travels_once_and_arrives_twice():
    source, target = Tied(), Tied()
    update = pack(source.state_dict(), 1)
    assert [entry.name for entry in update.entries] == ["embed.weight", "norm.weight", "norm.bias"]
    copy_into(target, dict(unpack(update)), 1)
    assert torch.equal(target.head.weight, source.embed.weight)
    other = {("head.weight" if n == "embed.weight" else n): t for n, t in unpack(pack(Tied().state_dict(), 2))}
    copy_into(target, other, 2)  # under its other name
    assert torch.equal(target.embed.weight, other["head.weight"])


def test_dtypes_are_cast_and_alignment_holds():
    target = Tied()
    half = {name: tensor.to(torch.bfloat16) for name, tensor in Tied().state_dict().items()}
    copy_into(target, half, 1)
    assert target.norm.weight.dtype == torch.float32
    assert all(entry.offset % 16 == 0 for entry in pack(TENSORS, 0).entries)
    assert pack(TENSORS, 0).nbytes == sum(b.nbytes for b in pack(TENSORS, 0).buckets)
    assert isinstance(pack({}, 0).buckets[0], np.ndarray)


def test_a_part_does_not_stand_for_the_whole():
    """A view at the beginning of another tensor lies at the same address."""
    target = Tied()
    target.register_buffer("first", target.embed.weight.detach()[:2])
    target.register_buffer("turned", target.embed.weight.detach().T)
    sent = {name: torch.zeros_like(tensor) for name, tensor in target.state_dict().items() if "weight" not in name}
    with pytest.raises(WeightError, match=r"no tensor for 'embed.weight' arrived \(3 missing in all\)"):
        copy_into(target, sent, 1)
    square = torch.randn(3, 3)
    assert list(untied({"a": square, "b": square.T, "c": square})) == ["a", "b"]


def test_the_quick_state_is_the_state_dict_and_sees_replaced_tensors():
    model = nn.Sequential(Tied(), nn.BatchNorm1d(3))
    model[1].register_buffer("scratch", torch.ones(2), persistent=False)

    def same():
        found, wanted = state_of(model), model.state_dict()
        assert list(found) == list(wanted) and not any(tensor.requires_grad for tensor in found.values())
        return all(found[n].data_ptr() == t.data_ptr() and torch.equal(found[n], t) for n, t in wanted.items())

    assert same() and len(untied(state_of(model))) == len(state_of(model)) - 1
    model[0].norm.weight = nn.Parameter(torch.full((4,), 7.0))
    model[1].running_mean = torch.full((3,), 2.0)
    assert same(), "a tensor that was replaced is not written to any more"


def test_the_quick_state_sees_modules_and_tensors_that_come_and_go():
    """A conversion attaches and strips indexers on one model: its weights must not be those of before."""
    model = nn.Sequential(Tied(), nn.Linear(2, 2, bias=False))

    def same():
        found, wanted = state_of(model), model.state_dict()
        return list(found) == list(wanted) and all(found[n].data_ptr() == t.data_ptr() for n, t in wanted.items())

    assert same()
    model[0].indexer = nn.Linear(3, 3)  # a module more
    assert same() and "0.indexer.weight" in state_of(model)
    model[0].indexer = nn.Linear(3, 3)  # another in its place
    assert same()
    del model[0].indexer
    assert same() and "0.indexer.weight" not in state_of(model)
    model[1].bias = nn.Parameter(torch.zeros(2))  # a tensor where there was None
    assert same() and "1.bias" in state_of(model)
    model[1].bias = None
    assert same()
    model[1].register_buffer("late", torch.ones(1))
    assert same() and "1.late" in state_of(model)
    with pytest.raises(WeightError, match=r"no tensor for '1\.late' arrived"):
        copy_into(model, {n: t.clone() for n, t in model.state_dict().items() if n != "1.late"}, 3)


def test_the_quick_state_keeps_no_weights_in_memory():
    """Those of a model that was laid out anew, or moved, would be there twice."""
    model = nn.Linear(40, 40)
    old = state_of(model)["weight"].data_ptr()
    kept = model.weight.data  # so that nothing else comes to lie there
    model.weight.data = torch.ones(40, 40)
    gc.collect()
    there = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o is not kept and o.data_ptr() == old]
    assert there == [] and state_of(model)["weight"].data_ptr() == model.weight.data_ptr() != old


def test_tensors_staged_for_other_weights_are_staged_again():
    """Between the arrival of an update and its turn a model may change: nothing may be written where weights were, or be left out."""
    model = nn.Sequential(Tied(), nn.Linear(2, 2, bias=False))
    sent = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    staged = Staged(model, sent, 1)
    before = model[1].weight
    model[1].weight = nn.Parameter(torch.zeros(2, 2))
    left = before.detach().clone()
    copy_into(model, staged, 1)
    assert torch.equal(model[1].weight, sent["1.weight"]) and torch.equal(before, left)
    model[1].bias = nn.Parameter(torch.zeros(2))  # a tensor more, which the update does not have
    with pytest.raises(WeightError, match=r"no tensor for '1\.bias' arrived"):
        copy_into(model, staged, 1)
    other = nn.Sequential(Tied(), nn.Linear(2, 2, bias=False))
    copy_into(other, staged, 1)
    assert all(torch.equal(tensor, sent[name]) for name, tensor in other.state_dict().items())


def test_a_model_that_makes_its_state_itself_is_asked_for_it():
    class Halved(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[f"{prefix}half"] = self.weight.detach()[:1]

    model = nn.Sequential(Halved(2, 2))
    assert list(state_of(model)) == ["0.half"] and torch.equal(state_of(model)["0.half"], model[0].weight[:1])
