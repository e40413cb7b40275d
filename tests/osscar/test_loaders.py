"""Data as people have them: loaders, data sets, and lists of batches with labels and masks."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, DetrConfig
from transformers import DetrForObjectDetection as Detr

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
    "a tuple of pairs": lambda: ((X[:100], Y[:100]), (X[100:], Y[100:])),
    "a tuple in a pair": lambda: [((X,), Y)],
    "dictionaries": lambda: [by_name(X[:7], Y[:7]), by_name(X[7:], Y[7:])],
    "a dictionary in a pair": lambda: [({"input": X}, Y)],
    "a generator": lambda: ((X[i : i + 9], Y[i : i + 9]) for i in range(0, 300, 9)),
    "arrays": lambda: [(X.numpy(), Y.numpy())],
    "one dictionary": by_name,
    "a set": lambda: osscar.TensorSet("a set", {"input": X}, Y),
}


WHOLE = {
    *("a pair alone", "a pair of a dictionary", "a tuple of pairs"),
    *("pairs", "a tuple in a pair", "dictionaries", "a dictionary in a pair", "arrays"),
    *("one dictionary", "a set"),
}
"""What is in memory, and read to its end."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_for_the_same_samples_and_labels(form):
    found = load_batches(FORMS[form](), rows_net(), samples=300)
    assert torch.equal(found.tensors["input"], X)
    assert torch.equal(found.labels, Y)
    assert "labels set aside to score by" in found.source
    loaded = LoadedModel(rows_net(), "net", None, torch.float32)
    assert len(loaded.calibration(FORMS[form](), samples=40)) == 40
    assert len(load_batches(FORMS[form](), rows_net())) == (300 if form in WHOLE else 256)


@pytest.mark.parametrize(
    "form",
    [
        lambda: (X[:256], Y[:256]),
        lambda: iter([(X[:200], Y[:200]), (X[200:], Y[200:])]),
        lambda: zip(X.split(64), Y.split(64), strict=True),
        lambda: map(tuple, [[X[:256], Y[:256].numpy()]]),
    ],
)
@pytest.mark.filterwarnings("ignore:the data are")
def test_a_pair_and_an_iterator_of_pairs_prune_as_their_inputs_do(form):
    found, due = (osscar.prune(rows_net(), data, **HALVED) for data in (form(), X[:256]))
    assert found.calibration["samples"] == due.calibration["samples"] == 256
    assert torch.equal(found.model(X), due.model(X))


class ReadsTargets(torch.nn.Linear):
    def forward(self, input, targets=None):
        return super().forward(input)


def test_what_forward_could_read_of_labels_is_said():
    net = ReadsTargets(X.shape[1], 3)
    assert "the model gets no targets: name the inputs" in load_batches((X, Y), net).source
    assert "targets" not in load_batches({"input": X, "targets": X, "labels": Y}, net).source
    assert "targets" not in load_batches(X, net).source


def test_data_without_labels_are_read_as_well():
    loader = DataLoader(TensorDataset(X), 64)
    for data in ([X[:8], X[8:]], [[X]], loader, [X.numpy()], X.clone().requires_grad_(), X.numpy()):
        found = load_batches(data, rows_net(), samples=300)
        assert torch.equal(found.tensors["input"], X)
        assert (found.labels, found.tensors["input"].requires_grad) == (None, False)
    parts = [X[:100], X[100:200], X[200:]]
    for data, samples, said in (
        ([(X, torch.randn(300, 3))], None, "a list, 300 samples; without labels"),
        ([by_name()], None, "labels set aside to score by; without idx, names"),
        (X[:256], 256, "a Tensor, 256 samples"),
        (X, 256, "a Tensor, its first 256 samples"),
        (parts, 256, "a list, its first 256 samples"),
    ):
        assert load_batches(data, rows_net(), samples=samples).source.endswith(said)


def test_a_stream_without_end_is_read_as_far_as_asked():
    read = []

    def endless():
        for index in itertools.count():
            read.append(index)
            yield torch.randn(10, 6), torch.zeros(10, dtype=torch.int64)

    with pytest.warns(UserWarning, match="the data are a generator, its first 256 samples; labels"):
        result = osscar.prune(rows_net(), endless(), **MAGNITUDE)
    assert (result.calibration["samples"], len(read)) == (256, 26)
    assert len(load_batches(endless(), rows_net(), samples=30)) == 30
    assert len(read) == 29
    with pytest.raises(
        DataError, match=r"has no length; say how many .*load_batches\(data, model, sam"
    ):
        osscar.evaluate(rows_net(), endless())


def test_a_score_reads_all_of_a_loader():
    loader = DataLoader(TensorDataset(X, Y), 32)
    with pytest.warns(UserWarning, match="300 samples; labels set aside"):
        quality = osscar.evaluate(rows_net(), loader).quality
    right = (rows_net()(X).argmax(1) == Y).float().mean()
    assert (quality.samples, quality.top1) == (300, pytest.approx(float(right)))


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
    assert as_inputs(model, found).tokens


def test_sequences_of_several_lengths_run_one_by_one():
    model = tiny("opt", layers=1)
    texts = [{"input_ids": row[None, : 8 + i % 3]} for i, row in enumerate(tokens(50, 20))]
    apart = load_batches([{**one, "text": ["a"]} for one in texts], model)
    assert [one["input_ids"].tolist() for one in apart.samples] == [
        one["input_ids"].tolist() for one in texts
    ]
    assert apart.source == "a list, 50 samples; without text"
    loader = DataLoader(tokens(50, 20), 7)
    with pytest.warns(UserWarning, match="its first 44 samples"):
        assert read_once(model, loader, windows=44).samples == 44


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
    of_file = osscar.TensorSet("a file", given, labels)
    with pytest.warns(UserWarning, match="the data are a file, 12 samples; labels"):
        assert osscar.evaluate(model, of_file, repetitions=1).quality == quality


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


class Annotated(list):
    """Images with annotations in files, such as those of `torchvision.datasets.VOCDetection`."""

    targets = ("0.xml", "1.xml")


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
    tensors = [(picture, torch.tensor(label)) for picture, label in pairs]
    boxes = [(picture, [label] * (i % 3)) for i, (picture, label) in enumerate(pairs)]
    forms = ((table, True), (pictures, False), (pairs, True), (tensors, True), (boxes, False))
    for data, labelled in (*forms, (Annotated(pictures), False)):
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


# ---- what is refused ---------------------------------------------------------------------


def test_padded_pixels_are_refused():
    config = DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=3,
        use_timm_backbone=False, use_pretrained_backbone=False,
        backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8],
                         "depths": [1, 1, 1, 1], "out_features": ["stage4"]},
    )  # fmt: skip
    model = Detr(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "pixel_mask": torch.ones(2, 32, 32)}
    found = load_batches([batch], model)
    assert set(found.tensors) == {"pixel_values", "pixel_mask"}
    batch["pixel_mask"][0, 20:] = 0
    with pytest.raises(DataError, match=r"the data have a mask, .* without padding"):
        osscar.prune(model, batch, sparsity=0.5)
