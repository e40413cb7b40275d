"""Data that a model cannot read: what is said of them, before anything else is done."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import osscar
from osscar.base.errors import DataError


class Images(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.second(self.first(x).relu()).mean((2, 3))


class Words(nn.Module):
    """Reads tokens, and how much each counts."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, words, weights):
        return (self.down(self.up(self.table(words)).relu()) * weights[..., None]).mean(1)


def words(count=40, **other):
    drawn = {
        "words": torch.arange(count * 5).reshape(count, 5) % 9,
        "weights": torch.rand(count, 5),
    }
    return {**drawn, **{name: change(drawn[name]) for name, change in other.items()}}


def with_last(number):
    def change(tokens):
        tokens = tokens.clone()
        tokens[-2, 1] = number
        return tokens

    return change


CASES = {
    "other width": (
        nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2)),
        torch.randn(30, 8),
        r"input \(float32, 30 x 8\) in '0' \(Linear\(in_features=7, .*7x9\); give data of the form",
    ),
    "bytes": (
        Images(),
        torch.randint(256, (20, 3, 9, 11), dtype=torch.uint8),
        r"x \(uint8, 20 x 3 x 9 x 11\) .*; give data of the form",
    ),
    "tokens with fractions": (
        Words(),
        words(words=torch.Tensor.float),
        r"words \(float32, 40 x 5\), weights \(float32, 40 x 5\) in 'table' ",
    ),
    "a token too many": (
        Words(),
        words(words=with_last(9)),
        r"words \(int64, 40 x 5, 0 to 9\), .* in 'table' \(Embedding\(9, 6\)\): IndexError: ",
    ),
    "a padding token of -1": (
        Words(),
        words(words=with_last(-1)),
        r"words \(int64, 40 x 5, -1 to 8\), .* in 'table' .*; give data of the form",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_data_that_a_model_cannot_read_are_named_before_any_work(case, monkeypatch):
    model, data, said = CASES[case]
    monkeypatch.setattr("graph.trace", None)
    with pytest.raises(DataError, match=said) as told:
        osscar.prune(model, data, neurons=0.5)
    assert str(told.value).startswith(f"the data: {type(model).__name__} fails on ")


def test_samples_of_all_sizes_are_tried_at_the_ends_of_their_numbers():
    samples = [words(1, words=lambda one, n=n: one[:, :n] % 7) for n in range(1, 5)]
    for one in samples:
        one["weights"] = one["weights"][:, : one["words"].shape[1]]
    osscar.prune(Words(), osscar.SampleList("sentences", samples), neurons=0.5)
    samples[2]["words"] = samples[2]["words"] + 8
    with pytest.raises(
        DataError, match=r"^sentences: Words fails on words \(int64, 1 x 3, 8 to 10\)"
    ):
        osscar.prune(Words(), osscar.SampleList("sentences", samples), neurons=0.5)


@pytest.mark.parametrize(
    ("samples", "said"),
    [([], "holds no samples"), ([torch.ones(1, 5)], "sample 0: .*give a mapping of tensors")],
)
def test_a_list_of_no_samples_is_refused(samples, said):
    with pytest.raises(DataError, match=said):
        osscar.prune(Words(), osscar.SampleList("sentences", samples), neurons=0.5)


def test_integers_that_the_model_converts_itself_are_read():
    class Bytes(Images):
        def forward(self, x):
            return super().forward(x.float() / 255)

    drawn = torch.randint(256, (20, 3, 9, 11), dtype=torch.uint8)
    result = osscar.prune(Bytes(), drawn, channels=0.5)
    assert result.parameters_after < result.parameters_before


BUILD = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(7, 9), nn.Linear(9, 2)
    def forward(self, x, edges=None):
        h = self.up(x).relu()
        return self.down(h if edges is None else h.index_add(0, edges[1], h[edges[0]]))
def build():
    return Net(), {"x": torch.randn(2, 7)}
def graph():
    return Net(), {"x": torch.randn(5, 7), "edges": torch.randint(5, (2, 8))}
def wrong():
    return Net(), torch.randn(2, 8)
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(BUILD)
    np.savez(tmp_path / "wide.npz", x=np.zeros((300, 8), np.float32))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("prune net.py:build --neurons 0.5 --calibration wide.npz --out s", r"256 x 8\) in 'up'"),
        ("eval net.py:build --inputs wide.npz", r"32 x 8\) in 'up'"),
    ],
)
def test_the_file_is_named(words, said, net, run):
    status, _, err = run(*words.split())
    err = " ".join(err.split())
    assert status == 2
    assert re.search(rf"error: wide\.npz: Net fails on x \(float32, {said}", err), err


def test_inspect_reads_a_graph_and_names_example_inputs(net, run):
    status, out, _ = run("inspect", "net.py:graph")
    assert status == 0
    assert "neurons" in out
    status, _, err = run("inspect", "net.py:graph", "--times")
    assert status == 2
    assert "--times takes batches, and the example inputs of net.py:graph differ" in " ".join(
        err.split()
    )
    status, _, err = run("inspect", "net.py:wrong")
    assert status == 2
    assert "error: the example inputs of net.py:wrong: Net fails on x (float32, 2 x 8)" in " ".join(
        err.split()
    )


def test_padding_without_a_mask_is_told():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=61, pad_token_id=3, num_hidden_layers=1, **sizes))
    ids = torch.randint(4, 61, (6, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* have padding")
        osscar.prune(model, batch, neurons=0.5)
        ids[1:3, -2:] = 3  # which a text may end with
        osscar.prune(model, batch, neurons=0.5)
        ids[1:3, -4:] = 3
        osscar.prune(model, {**batch, "attention_mask": (ids != 3).long()}, neurons=0.5)
    with pytest.warns(
        UserWarning, match="^2 of 6 samples have padding at an end, .* give attention_mask"
    ):
        osscar.prune(model, batch, neurons=0.5)
