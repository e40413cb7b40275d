"""Samples of several sizes run together where their shapes are equal, as if each ran alone."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

import osscar
from osscar.data.batches import as_inputs
from osscar.data.loaders import load_batches
from osscar.data.samples import alike
from osscar.preparation.failures import together
from osscar.preparation.prepare import prepare
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.samples import Setup
from osscar.recovery.training import Training
from tests.osscar.programs import far_apart


@given(st.lists(st.sampled_from("abcd")), st.integers(1, 5))
def test_batches_are_of_equal_shapes_and_full_but_for_the_last_of_each(shapes, size):
    batches = alike(shapes, size)
    assert sorted(at for batch in batches for at in batch) == [*range(len(shapes))]
    assert [batch[0] for batch in batches] == sorted(batch[0] for batch in batches)
    short = Counter[str]()
    for batch in batches:
        (shape,) = {shapes[at] for at in batch}
        assert batch == sorted(batch)
        short[shape] += len(batch) < size
        assert len(batch) <= size
    assert all(count <= 1 for count in short.values())


# ---- nets --------------------------------------------------------------------------------


def encoder():
    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=50,
                   num_attention_heads=4)
    ).eval()  # fmt: skip


def sentences():
    """Return padded sentences of five lengths."""
    draw = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(50, (48, 9), generator=draw), torch.ones(48, 9, dtype=torch.int64)
    for row in range(48):
        mask[row, 5 + row % 5 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Sizes(nn.Module):
    """A convolutional net on images of any size; of its samples by themselves, unless `mixes`."""

    def __init__(self, mixes=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2)
        self.head, self.mixes = nn.Linear(12, 4), mixes

    def forward(self, image):
        x = torch.relu(self.second(torch.relu(self.first(image)))).mean((2, 3))
        return self.head(x - x.mean(0) if self.mixes else x)


class Graph(nn.Module):
    """A score for a graph: of its nodes, each of which reads the mean of all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, nodes):
        x = torch.relu(self.enter(nodes))
        return self.leave(x + x.mean(0)).mean(0)


def images(count=48):
    draw = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (8, 11), (11, 8), (9, 10)]
    every = (torch.randn(1, 3, *sizes[i % 4], generator=draw) for i in range(count))
    return osscar.SampleList("images", [{"image": one} for one in every])


def graphs():
    draw = torch.Generator().manual_seed(0)
    every = (torch.randn(1 + i % 4, 5, generator=draw) for i in range(48))
    return osscar.SampleList("graphs", [{"nodes": one} for one in every])


TOGETHER = {
    "sentences": lambda: (encoder(), load_batches(sentences(), encoder())),
    "images": lambda: (Sizes(), images()),
}


@pytest.mark.parametrize(
    ("net", "data"),
    [
        (Sizes(mixes=True), images()),
        (Graph(), graphs()),
        (Graph(), osscar.SampleList("nodes", [{"nodes": torch.randn(1, 5)} for _ in range(8)])),
    ],
    ids=["samples that are compared", "graphs", "graphs of one node"],
)
def test_samples_run_alone_where_a_model_computes_something_else_of_them_together(net, data):
    inputs = together(net, as_inputs(net, data))
    assert inputs.alone
    assert inputs.batch_size == 1
    with prepare(net, data) as prepared:
        assert len(prepared.batches()) == len(data)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_pruned_is_what_would_be_one_by_one(name):
    model, data = TOGETHER[name]()
    with prepare(model, data) as prepared:
        assert len(prepared.batches()) <= 5
        counts = [prepared.inputs.count(batch) for batch in prepared.batches()]
        assert sum(counts) == len(data)
    asked = {"neurons": 0.5} if name == "sentences" else {"channels": 0.5}
    one, many = (
        osscar.prune(model, data, **asked, device="cpu", batch_size=size) for size in (1, None)
    )
    assert one.plan == many.plan
    assert one.distance.value == pytest.approx(many.distance.value, rel=1e-3)
    some = data.samples[0]
    outputs = [next(iter(p.model(**some).values())) if name == "sentences" else p.model(**some)
               for p in (one, many)]  # fmt: skip
    assert far_apart(*outputs) < 1e-3


@pytest.mark.parametrize("name", TOGETHER)
def test_a_step_of_a_recovery_is_that_of_samples_one_by_one(name):
    model, data = TOGETHER[name]()
    dense, _ = TOGETHER[name]()
    with torch.no_grad():
        for weight in dense.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    weights = []
    for at_once in (1, 8):
        request = RecoveryRequest(
            batch_size=16, micro_batch_size=at_once, mixed_precision="no", device="cpu"
        )
        setup = Setup(model, dense, data, request)
        training = Training(setup, request)
        passes = [setup.order(at_once, torch.Generator().manual_seed(0)) for _ in range(2)]
        assert passes[0] == passes[1]
        assert sorted(passes[0]) == [*range(len(setup.samples))]
        assert passes[0] != sorted(passes[0])
        loss = training.step(setup.samples[:16], 1e-3, training.ranks)
        weights.append([loss, *(w.detach().clone() for w in training.weights.values())])
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    for one, other in zip(weights[0][1:], weights[1][1:], strict=True):
        assert torch.allclose(one, other, atol=1e-4)
