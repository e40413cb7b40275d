"""Data as people have them: loaders, data sets, and lists of batches with labels and masks."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import osscar
from osscar.base.errors import DataError
from osscar.data.batches import as_inputs
from osscar.data.loaders import load_batches, read_once
from osscar.models.loaded import LoadedModel
from tests.osscar.families import VOCABULARY, tiny, tokens
from tests.osscar.gpts import nano
from tests.osscar.networks import plain, small_net

MAGNITUDE = {"neurons": 0.5, "backend": "magnitude", "device": "cpu"}
HALVED = {"neurons": 0.5, "device": "cpu", "distance": "relative"}
X, Y = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 3


def rows_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def by_name(x=X, y=Y):
    return {"input": x, "labels": y, "idx": torch.arange(len(x)), "names": ["a"] * len(x)}


def hub():
    """Return the package of which data sets of the hub are."""
    return pytest.importorskip("datasets")


def table():
    return hub().Dataset.from_dict({"input": X.tolist(), "label": Y.tolist()})


FORMS = {
    "a loader": lambda: DataLoader(TensorDataset(X, Y), 32),
    "of dictionaries": lambda: DataLoader(table().with_format("torch"), 32),
    "that streams": lambda: DataLoader(Stream(), 7),
    "pairs": lambda: [(X[:100], Y[:100]), (X[100:], Y[100:])],
    "a pair alone": lambda: (X, Y),
    "a pair of a dictionary": lambda: ({"input": X}, Y.numpy()),
    "dictionaries": lambda: [by_name(X[:7], Y[:7]), by_name(X[7:], Y[7:])],
    "a generator": lambda: ((X[i : i + 9], Y[i : i + 9]) for i in range(0, 300, 9)),
    "arrays": lambda: [(X.numpy(), Y.numpy())],
    "one dictionary": by_name,
    "a set": lambda: osscar.TensorSet("a set", {"input": X}, Y),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_for_the_same_samples_and_labels(form):
    found = load_batches(FORMS[form](), rows_net(), samples=300)
    assert torch.equal(found.tensors["input"], X)
    assert torch.equal(found.labels, Y)
    assert "labels set aside to score by" in found.source


def test_an_iterator_of_pairs_prunes_as_its_inputs_do():
    pairs = zip(X[:256].split(64), Y[:256].split(64), strict=True)
    with pytest.warns(UserWarning, match="the data are"):
        found, due = (osscar.prune(rows_net(), data, **HALVED) for data in (pairs, X[:256]))
    assert found.calibration["samples"] == due.calibration["samples"] == 256
    assert torch.equal(found.model(X), due.model(X))


def test_data_without_labels_are_read_as_well():
    loader = DataLoader(TensorDataset(X), 64)
    for data in ([X[:8], X[8:]], [[X]], loader, [X.numpy()], X.clone().requires_grad_(), X.numpy()):
        found = load_batches(data, rows_net(), samples=300)
        assert torch.equal(found.tensors["input"], X)
        assert (found.labels, found.tensors["input"].requires_grad) == (None, False)
    for data, said in (
        ([(X, torch.randn(300, 3))], "a list, 300 samples; without labels"),
        ([by_name()], "labels set aside to score by; without idx, names"),
    ):
        assert load_batches(data, rows_net()).source.endswith(said)


def test_a_stream_without_end_is_read_as_far_as_asked():
    read = []

    def endless():
        for index in itertools.count():
            read.append(index)
            yield torch.randn(10, 6), torch.zeros(10, dtype=torch.int64)

    with pytest.warns(UserWarning, match="the data are a generator, its first 256 samples; labels"):
        result = osscar.prune(rows_net(), endless(), **MAGNITUDE)
    assert (result.calibration["samples"], len(read)) == (256, 26)
    with pytest.raises(
        DataError, match=r"has no length; say how many .*load_batches\(data, model, sam"
    ):
        osscar.evaluate(rows_net(), endless())


# ---- padding -----------------------------------------------------------------------------


def padded(side, filler, extra=()):
    """Return sequences of several lengths with something at the padded positions."""
    ids, mask = tokens(12, 20), torch.ones(12, 20, dtype=torch.int64)
    for row in range(12):
        gap = slice(20 - row, 20) if side == "right" else slice(0, row)
        ids[row, gap], mask[row, gap] = filler, 0
    return {"input_ids": ids, "attention_mask": mask, **dict(extra)}


@pytest.mark.parametrize(("family", "side"), [("opt", "left"), ("llama-gqa", "right")])
def test_padding_counts_nowhere(family, side):
    model = tiny(family, layers=1)
    batch, other = padded(side, 3), padded(side, 7, {"labels": tokens(12, 20)})
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    expected = [ids[kept][None] for ids, kept in rows]
    for padding in (batch, other):
        found = load_batches(padding, model)
        assert all(map(torch.equal, (one["input_ids"] for one in found.samples), expected))
        assert [*found.samples[0]] == ["input_ids"]
        assert found.source.endswith("padding cut off")
    assert as_inputs(model, found).settings["sizes"] == {"input_ids": [1, None]}
    one, two = (
        osscar.compare(tiny(family, layers=1, seed=1), model, data, repetitions=1).model.quality
        for data in (batch, padded(side, 7))
    )
    assert (one.kl, one.errors, one.classes_in) == (two.kl, two.errors, "logits")
    assert one.kl > 0


def test_a_batch_that_needs_no_padding_is_windows():
    model, ids = tiny("opt", layers=1), tokens(6, 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with pytest.warns(UserWarning, match="without labels$"):
        found = read_once(model, batch)
    assert torch.equal(found.tokens, ids)
    assert found.describe()["seen"]["count"] == 6  # of less than a run each, one hash
    assert "seed" not in found.sentence()
    with pytest.raises(DataError, match="windows of text take no sample_groups"):
        load_batches(batch, model, sample_groups=range(6))
    assert as_inputs(model, found).tokens


def test_a_classifier_of_padded_texts_is_scored_on_its_labels():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=VOCABULARY, num_labels=3,
    )  # fmt: skip
    model, labels = BertForSequenceClassification(config).eval(), torch.arange(12) % 3
    given = padded("right", 0, {"token_type_ids": torch.zeros(12, 20, dtype=torch.int64)})
    batch = {**given, "labels": labels}
    with torch.no_grad():
        right = (model(**given).logits.argmax(1) == labels).float().mean()
    with pytest.warns(UserWarning, match="labels set aside to score by; padding cut off"):
        quality = osscar.evaluate(model, batch, repetitions=1).quality
    assert quality.top1 == pytest.approx(float(right))
    sizes = as_inputs(model, load_batches(batch, model)).settings["sizes"]
    assert sizes["token_type_ids"] == [1, None]


def test_targets_and_labels_are_inputs_where_the_model_names_or_needs_them():
    class Learns(nn.Linear):
        def forward(self, input, labels):
            return super().forward(input), labels

    assert set(load_batches([by_name()], Learns(6, 3)).tensors) == {"input", "labels"}
    model, _ = nano()
    x, y = torch.randint(12, (2, 8, 10))
    for batch in ({"idx": x, "targets": y, "labels": y}, ({"idx": x, "targets": y}, y)):
        found = load_batches([batch], model)
        assert set(found.tensors) == {"idx", "targets"}
        assert torch.equal(found.labels, y)
    assert set(load_batches([(x, y)], model).tensors) == {"idx"}


# ---- images ------------------------------------------------------------------------------


def test_images_of_data_sets_are_decoded_as_those_of_files_are(tmp_path):
    pytest.importorskip("torchvision")
    datasets = hub()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p if i % 3 else p[..., 0]) for i, p in enumerate(pixels)]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index:02}.png")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("vwxyz"))}
    )
    columns = {"image": pictures, "label": [i % 5 for i in range(12)]}
    table = datasets.Dataset.from_dict(columns, features=features)
    pairs = [*zip(pictures, columns["label"], strict=True)]
    expected = osscar.load_images(tmp_path, plain(12)).tensor()
    for data, labelled in ((table, True), (pictures, False), (pairs, True)):
        found = osscar.load_images(data, plain(12))
        assert torch.equal(found.tensor(), expected)
        assert (found.labels is not None) == labelled
        assert not labelled or found.labels.tolist() == columns["label"]
    named = osscar.load_images(table, plain(12))
    assert named.classes == tuple("vwxyz")
    loaded = LoadedModel(small_net(), "net", None, torch.float32, preprocessing=plain(12))
    drawn = loaded.calibration(table, samples=5, seed=1)
    assert (drawn.source, len(drawn), len(drawn.fingerprints())) == ("Dataset, 12 images", 5, 5)
    with pytest.raises(DataError, match=r"yields samples, .* or images to osscar.load_images"):
        osscar.prune(loaded.model, table, channels=0.5)
