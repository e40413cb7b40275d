"""Which output holds scores of classes, by labels, names, values and layers; and padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

import osscar
from osscar.base.errors import OptionError
from osscar.base.inputs import read_distance
from osscar.data.batches import as_inputs
from osscar.data.samples import TensorSet
from osscar.distance.distance import Distance, Reference
from tests.osscar.recovery.perturbed import perturbed


def compared(model, data, distance=None, batch_size=4):
    inputs = as_inputs(model.eval(), data)
    asked = None if distance is None else read_distance(distance)
    return Distance.from_outputs(model, inputs, inputs.batches(batch_size)[0], asked)


def reference(model, data, distance=None, batch_size=4):
    inputs = as_inputs(model, data)
    found = compared(model, data, distance, batch_size)
    return Reference.from_run(found, model, inputs.batches(batch_size))


class Puts(nn.Module):
    """Puts out what a function makes of features."""

    def __init__(self, answer=lambda y: y, classes=5, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.middle = nn.Conv2d(3, classes, 3)
        self.answer = answer
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        y = self.middle(x)
        for name, layer in self.named_children():
            y = layer(y.mean((2, 3)) if y.ndim == 4 else y) if name != "middle" else y
        return self.answer(y.mean((2, 3)) if y.ndim == 4 else y)


class Known(Puts):
    """Stands for a classifier of torchvision."""


Known.__module__ = "torchvision.models.known"

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def labels(*shape):
    return torch.zeros(8, *shape, dtype=torch.int64)


class Counts(Puts):
    num_classes = 5


@pytest.mark.parametrize(
    ("model", "given", "measure", "words"),
    [
        (Puts(), None, "relative", "output, since nothing says that"),  # an embedder of images
        (Puts(), labels(), "nats", "'output', 5 classes, since calibration data have its labels"),
        (Puts(lambda y: (y, y[:, :2], 1.0)), labels(), "relative", "0, 1, since nothing"),
        (Puts(lambda y: {"a": y[:, :1], "b": y}), labels(), "nats", "'b', 5 classes"),
        (Puts(lambda y: (y, y.square().mean())), None, "relative", "0, 1, since nothing"),
        (Puts(lambda y: {"logits": y, "features": y}), None, "nats", "the output has this name"),
        (Puts(lambda y: {"logits": y[:, :1]}), None, "relative", "logits"),
        (Puts(lambda y: y.softmax(-1)), None, "nats", "its rows are probabilities"),
        (Puts(lambda y: y.log_softmax(-1)), None, "nats", "or their logarithms"),
        (Puts(lambda y: (y, y.softmax(-1))), None, "relative", ""),  # such as attention
        (Counts(), None, "nats", "since Counts.num_classes is 5"),
        (Puts(classifier=nn.Linear(5, 4)), None, "nats", "the last layer is called classifier"),
        (Puts(fc=nn.Linear(5, 4)), None, "relative", ""),  # a regression, for all that is known
        (Known(fc=nn.Linear(5, 4)), None, "nats", "of a known classifier is called fc"),
        (Known(fc=nn.Identity()), None, "relative", ""),
        (Known(embed=nn.Linear(5, 4)), None, "relative", ""),
        (Known(classifier=nn.Linear(5, 1)), None, "relative", ""),
        (nn.Sequential(Known(fc=nn.Linear(5, 4)), nn.ReLU()), None, "relative", ""),
    ],
)
def test_what_is_taken_for_scores(model, given, measure, words):
    data = IMAGES if given is None else TensorSet("made", {"x": IMAGES}, given)
    if isinstance(model, nn.Sequential):
        data = IMAGES
    found = compared(model, data).compared
    assert found.measure == measure
    assert words in str(found)


def test_what_is_asked_for_is_measured():
    for distance, measure in (("nats", "nats"), ("relative", "relative")):
        found = compared(Puts(), IMAGES, distance).compared
        assert (found.measure, "given" in found.why) == (measure, True)
    assert compared(Counts(), IMAGES, "relative").measure == "relative"
    segmentation = nn.Conv2d(3, 7, 1)
    table = compared(segmentation, IMAGES, "nats").scores.table(segmentation(IMAGES), {})
    torch.testing.assert_close(table, segmentation(IMAGES).permute(0, 2, 3, 1))
    with pytest.raises(OptionError, match=r"no output of Puts .*\('0' \(4, 5\), '1' \(4, 2\)\)"):
        compared(Puts(lambda y: (y, y[:, :2])), IMAGES, "nats")


class Own(nn.Module):
    """A language model of one's own, with learned positions as wide as its states."""

    def __init__(self, answer=lambda logits, states: (logits, None), words=11):
        super().__init__()
        torch.manual_seed(1)
        self.words, self.places = nn.Embedding(words, 12), nn.Embedding(12, 12)
        self.mix, self.out = nn.Linear(12, 12), nn.Linear(12, words)
        self.answer = answer

    def forward(self, idx):
        states = self.words(idx) + self.places(torch.arange(idx.shape[1]))
        states = self.mix(states.cumsum(1).tanh())
        return self.answer(self.out(states), states)


def loss(logits, states):
    return logits, logits.logsumexp(-1).mean()


@pytest.mark.parametrize(
    ("answer", "measure"),
    [
        (loss, "nats"),
        (lambda logits, states: logits, "nats"),
        (lambda logits, states: {"scores": logits, "states": states}, "nats"),
        (lambda logits, states: logits[:, [-1]], "nats"),
        (lambda logits, states: states, "relative"),  # as wide as there are positions
        (lambda logits, states: (logits, logits), "relative"),
    ],
)
def test_what_has_a_column_for_each_row_of_the_only_embedding_is_logits(answer, measure):
    model, data = Own(answer), {"idx": torch.randint(11, (8, 12))}
    found = compared(model, data)
    assert found.measure == measure
    if measure == "nats":
        assert "11 columns are the rows of the model's only embedding" in found.compared.why


@pytest.mark.parametrize("given", [None, labels(12)])
def test_all_positions_of_a_model_of_ones_own_count(given):
    idx = torch.randint(11, (8, 12), generator=torch.Generator().manual_seed(0))
    data = {"idx": idx} if given is None else TensorSet("made", {"idx": idx}, given)
    model, smaller = Own(loss), perturbed(Own(loss))
    with torch.no_grad():
        p, q = (each(idx)[0].log_softmax(-1) for each in (model, smaller))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert reference(model, data).divergence(smaller) == pytest.approx(expected, rel=1e-4)


# ---- padding ---------------------------------------------------------------------------------

_SMALL = {
    **{"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 16, "attn_implementation": "eager"},
}
MASK = (torch.arange(9) < torch.tensor([9, 4, 7, 2, 9, 5])[:, None]).long()


def padded(fill):
    ids = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.where(MASK == 1, ids, fill), "attention_mask": MASK}


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        (BertForTokenClassification, "nats"),
        (BertForQuestionAnswering, "relative"),
        (BertModel, "relative"),
        (BertForSequenceClassification, "nats"),
    ],
)
def test_padded_positions_never_count(kind, measure):
    torch.manual_seed(0)
    model = kind(BertConfig(**_SMALL, num_labels=2 if "Question" in kind.__name__ else 3)).eval()
    smaller = perturbed(model)
    found = [reference(model, padded(fill), batch_size=size) for fill, size in ((0, 4), (7, 3))]
    assert {one.distance.measure for one in found} == {measure}
    whole = kind is BertForSequenceClassification
    assert ("that is not padded" in str(found[0].distance.compared)) == (not whole)
    first, other = (one.divergence(smaller) for one in found)
    assert first == pytest.approx(other, rel=1e-4)  # whatever stands at positions that are masked
    if kind is BertForTokenClassification:
        with torch.no_grad():
            p, q = (each(**padded(0)).logits.log_softmax(-1) for each in (model, smaller))
        assert first == pytest.approx(
            float((p.exp() * (p - q)).sum(-1)[MASK == 1].mean()), rel=1e-4
        )
    if kind is BertForQuestionAnswering:
        with torch.no_grad():
            pairs = zip(model(**padded(0)).values(), smaller(**padded(0)).values(), strict=True)
            kept = [(a[MASK == 1], b[MASK == 1]) for a, b in pairs]
        due = [float((b - a).square().sum() / a.square().sum()) for a, b in kept]
        assert first == pytest.approx(sum(due) / 2, rel=1e-4)


# ---- runs ------------------------------------------------------------------------------------


def angle(outputs, dense, batch):
    return 1 - torch.cosine_similarity(outputs, dense)


def embedder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5)).eval()


def test_a_distance_of_ones_own_is_what_a_target_limits_and_a_recovery_lowers():
    model, data = embedder(), torch.randn(96, 6)
    found = osscar.prune(model, data, max_divergence=0.05, distance=angle, round_to=1)
    assert found.target.measure == "own"
    assert found.distance.value == pytest.approx(found.target.reported.value, rel=1e-4)
    assert "by the given distance" in found.summary()
    recovery = osscar.recover(found, model, data, steps=24, distance=angle, mixed_precision="no")
    assert recovery.document()["distance"]["measure"] == "own"
    assert recovery.after < 0.9 * recovery.before
