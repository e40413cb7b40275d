"""Models that read neither text nor pictures, from the file of tensors to the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import osscar
from osscar.base.errors import (
    CheckpointError,
    DataError,
    FileError,
    ModelError,
    OptionError,
)
from osscar.data.batches import as_inputs
from osscar.data.sample_files import holds_images
from osscar.evaluation.quality import score
from osscar.models.load import load_model
from osscar.preparation.fingerprint import Fingerprint
from osscar.proof.lineage import lineage_of
from osscar.proof.seen import Seen

FAST = ("--neurons", "0.5", "--backend", "magnitude")
CODE = """
import torch
from torch import nn

class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))
        self.body = nn.Sequential(nn.Conv1d(9, 12, 3), nn.ReLU(), nn.Conv1d(12, 10, 3), nn.ReLU())
        self.head = nn.Linear(10, 6)

    def forward(self, wave):
        z = torch.stft(wave.squeeze(1), 16, 8, window=self.window, return_complex=True)
        return self.head(self.body(z.abs()).mean(-1))

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.tokens = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.join = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, tokens, features, scale=None):
        return self.join(torch.cat([self.tokens(self.embed(tokens)).mean(1), features], 1))

class Named(nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.scores = scores
        self.body = nn.Sequential(nn.Linear(5, 24), nn.ReLU())
        self.box, self.cls = nn.Linear(24, 4), nn.Linear(24, 3)

    def forward(self, x):
        h = self.body(x)
        return {"raw": x * 2, "boxes": self.box(h), self.scores: self.cls(h)}

def sound():
    torch.manual_seed(0)
    return Sound(), torch.zeros(2, 1, 80)

def two():
    torch.manual_seed(0)
    example = {"tokens": torch.zeros(2, 6, dtype=torch.int64), "features": torch.zeros(2, 4)}
    return Two(), example

def alone():
    return Two()

def named():
    torch.manual_seed(0)
    return Named("logits"), torch.zeros(2, 5)

def unnamed():
    torch.manual_seed(0)
    return Named("scores"), torch.zeros(2, 5)
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return lambda function: f"mine.py:{function}"


def waves(count, seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 6, count)
    times = np.arange(80) * (labels[:, None] + 1) * 0.3
    wave = np.sin(times) + 0.3 * generator.normal(size=(count, 80))
    return {"wave": wave[:, None].astype(np.float32), "labels": labels}


def pairs(count, seed):
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 4)).astype(np.float32)
    return {"tokens": generator.integers(0, 9, (count, 6)), "features": features}


# ---- from end to end ---------------------------------------------------------------------


def test_what_is_handed_on_names_no_folder_of_the_machine(run, code, tmp_path):
    mine, data = tmp_path / code("sound"), tmp_path / "data.npz"
    np.savez(data, **waves(60, 0))
    np.savez(tmp_path / "test.npz", **waves(20, 1))
    on = ("--calibration", data, "--samples", 50)
    for command in (
        ("prune", mine, *on, "--sparsity", 0.4),
        ("recover", tmp_path / "prune", "--dense", mine, "--inputs", data, "--steps", 2),
        ("sweep", mine, *on, "--sparsity", "0.4", "--inputs", tmp_path / "test.npz"),
        ("gap", mine, *on, "--backends", "greedy", "--sparsity", 0.5),
    ):
        status, _, err = run(*command, "--out", tmp_path / command[0])
        assert status == 0, err
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".html", ".md", ".csv"):
            for place in (tmp_path, Path.home()):
                assert str(place) not in file.read_text(), file


def test_a_model_that_reads_sound_is_pruned_scored_and_swept(run, code, tmp_path):
    """Its labels say that it is a classifier, and its Fourier window is a view of more."""
    np.savez("data.npz", **{f"{part}_{name}": array
                            for part, seed in (("cal", 0), ("test", 1))
                            for name, array in waves(60, seed).items()})  # fmt: skip
    asked = (code("sound"), "--calibration", "data.npz:cal", "--samples", 50)
    status, out, err = run("prune", *asked, "--out", "small", "--sparsity", 0.4,
                           "--json", "prune.json")  # fmt: skip
    assert status == 0, err
    report = json.loads((tmp_path / "prune.json").read_text())
    assert report["divergence"] is not None
    assert report["dense"]["samples"] == 50
    assert "of 50 labelled calibration samples" in out
    assert f"osscar eval small --inputs FILE --dense {code('sound')}" in out
    assert report["calibration"]["seen"]["count"] == report["calibration"]["samples"] == 50

    scored = ("small", "--dense", code("sound"), "--json", "eval.json")
    status, out, err = run("eval", *scored, "--inputs", "data.npz:test")
    assert status == 0, err
    assert "60 labelled samples scored, 'output' as scores of classes" in out
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["inputs"] == "data.npz:test"
    dense = load_model(code("sound")).model
    pruned = load_model("small", dense=code("sound")).model
    data = waves(60, 1)
    with torch.no_grad():
        mine, theirs = (m(torch.from_numpy(data["wave"])).double() for m in (pruned, dense))
    quality = found["model"]["quality"]
    right = (mine.argmax(1).numpy() == data["labels"]).mean()
    assert quality["top1"] == pytest.approx(right)
    assert quality["agreement"] == pytest.approx(
        float((mine.argmax(1) == theirs.argmax(1)).float().mean())
    )
    error = float((mine - theirs).square().sum() / theirs.square().sum())
    assert 0 < quality["errors"]["output"] == pytest.approx(error, rel=1e-4)
    assert found["model"]["footprint"]["flops"] < found["dense"]["footprint"]["flops"]
    assert found["ratios"]["samples_per_second"] > 0

    status, _, err = run("eval", *scored, "--inputs", "data.npz:cal")
    assert status == 2
    assert "about 83.3% of data.npz:cal calibrated or recovered this model" in err
    status, _, err = run("eval", *scored, "--images", "data.npz:test")
    assert (status, "torch.float32 (2, 1, 80), and images are one tensor" in err) == (2, True)
    status, _, err = run("eval", *scored, "--inputs", "data.npz:test", "--no-normalize")
    assert status == 2
    swept = (*asked, "--inputs", "data.npz:test", "--sparsity", "0.4", "--out", "sweep")
    status, out, err = run("sweep", *swept)
    assert status == 0, err
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "squared error of output" in page
    swept = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert swept["dense"] == report["dense"]
    assert f"dense model: top-1 {swept['dense']['value']:.1%} of 50" in out
    assert f"top-1 {swept['dense']['value']:.1%}" in page
    points = swept["points"]
    assert points[1]["quality"]["errors"]["output"] == pytest.approx(error, rel=1e-3)


def test_two_inputs_are_fed_by_name_from_either_kind_of_file(run, code, tmp_path):
    data = pairs(64, 0)
    np.savez("data.npz", **data)
    save_file({name: torch.from_numpy(array) for name, array in data.items()}, "data.safetensors")
    loaded = load_model(code("two"))
    found, same = (loaded.tensors(file) for file in ("data.npz", "data.safetensors"))
    assert all(torch.equal(tensor, same.tensors[name]) for name, tensor in found.tensors.items())
    asked = ("--calibration", "data.safetensors", "--form", "exported", *FAST, "--out", "s0")
    status, out, err = run("prune", code("two"), *asked)
    assert status == 0, err
    assert "measured distance: none: no output is known to be scores of classes" in out
    np.savez("test.npz", **pairs(40, 1))
    status, out, err = run("eval", "s0", "--inputs", "test.npz", "--dense", code("two"))
    assert status == 0, err
    assert "40 samples without labels scored, 'output' as scores of classes" in out
    assert run("export", "s0", "--format", "pt2")[0] == 2
    status, out, err = run("export", "s0", "--format", "pt2", "--dense", code("two"))
    assert status == 0, err
    status, out, err = run("eval", code("two"), "--inputs", "test.npz")
    assert status == 0, err
    assert "nothing is known of its quality" in out


def test_nothing_is_written_where_data_do_not_fit(run, code, tmp_path):
    data = pairs(8, 0)
    np.savez("swapped.npz", tokens=data["features"], features=data["tokens"])
    asked = ("--calibration", "swapped.npz", "--neurons", "0.5", "--out", "small")
    status, _, err = run("prune", code("two"), *asked)
    assert status == 2
    assert "'tokens' is float32 of (8, 4), and in the example inputs int64 of (2, 6)" in err
    assert {path.name for path in tmp_path.iterdir()} <= {"mine.py", "swapped.npz", "__pycache__"}
    loaded = load_model(code("two"))
    with pytest.raises(DataError, match="tensors for tokens, features"):
        loaded.calibration(None, samples=None, seqlen=None, seed=0)
    with pytest.raises(OptionError, match="give one of them"):
        loaded.held_out(images="x.npz", inputs="swapped.npz")
    with pytest.raises(ModelError, match="its model reads tokens, features; return the model, and"):
        load_model(code("alone"))
    with pytest.raises(DataError, match=r"is tokens .*, features .*, and images are one tensor"):
        load_model(code("two"), preprocessing=osscar.Preprocessing(mean=0, std=1))


def test_outputs_of_a_dictionary_are_scored_by_name(run, code):
    """The first entry is no prediction, and labels need to know of which they are."""
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal(size=(30, 5)).astype(np.float32))
    plain, labelled = (osscar.TensorSet("x", {"x": x}, y) for y in (None, torch.arange(30) % 3))
    found = {}
    for name in ("named", "unnamed"):
        dense, pruned = (load_model(code(name)).model for _ in range(2))
        with torch.no_grad():
            pruned.body[0].weight[12:] = 0
        found[name] = score([pruned], plain, dense=dense)[0]
        if name == "named":
            assert score([pruned], labelled, dense=dense)[0].top1 is not None
        else:
            known = r"'raw' \(30, 5\), 'boxes' \(30, 4\), 'scores' \(30, 3\), and it is not known"
            with pytest.raises(ModelError, match=known):
                score([pruned], labelled, dense=dense)
    assert found["named"].errors["raw"] == 0
    assert min(found["named"].errors[key] for key in ("boxes", "logits")) > 0
    assert (found["named"].classes_in, found["named"].kl > 0) == ("logits", True)
    assert (found["unnamed"].classes_in, found["unnamed"].kl) == (None, None)
    assert found["unnamed"].errors["scores"] == pytest.approx(found["named"].errors["logits"])


# ---- files -------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, tokens, features, scale=None):
        return self.layer(features) + tokens.sum(1, keepdim=True)


EXAMPLE = {"tokens": torch.zeros(2, 6, dtype=torch.int64), "features": torch.zeros(2, 4)}
GOOD = pairs(8, 0)
SPOILT = np.where(np.arange(32).reshape(8, 4) == 5, np.nan, GOOD["features"])


def test_files_that_do_not_fit_the_model_are_refused(tmp_path):
    for arrays, message in (
        (
            {"tokens": GOOD["features"], "features": GOOD["tokens"]},
            "'tokens' is float32 of .8, 4",
        ),
        (
            {"tokens": GOOD["tokens"]},
            "takes tokens, features, scale, and there is no 'features'",
        ),
        (
            {**GOOD, "feature": GOOD["features"]},
            "takes no 'feature'; it takes tokens, features",
        ),
        (
            {**GOOD, "features": GOOD["features"].T[:, :4].T[..., None]},
            r"float32 of \(4, 4, 1\)",
        ),
        ({**GOOD, "features": GOOD["features"].astype(np.uint8)}, "'features' is uint8"),
        ({**GOOD, "tokens": GOOD["tokens"] > 3}, "'tokens' is bool"),
        ({**GOOD, "features": SPOILT}, "'features' have NaN or infinite entries, 1 of 32"),
        ({**GOOD, "features": GOOD["features"][:7]}, "disagree on the number of samples"),
        ({**GOOD, "features": np.zeros((0, 4), np.float32)}, "'features' are empty"),
        ({**GOOD, "features": np.array([{}])}, "read as .npz: Object arrays cannot be loaded"),
        ({**GOOD, "features": np.array(["a"] * 8)}, "read as .npz: can.t convert .*str_"),
        ({**GOOD, "labels": np.zeros(8)}, "labels must be 8 whole numbers, .* not torch.float64"),
        ({**GOOD, "labels": np.zeros(3, int)}, r"not torch.int64 of \(3,\)"),
        (
            {f"test_{name}": array for name, array in GOOD.items()},
            "x.npz:test reads the entries",
        ),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(FileError, match=message):
            osscar.load_tensors(tmp_path / "x.npz", Mixed(), EXAMPLE)
    for name in ("x.npz", "x.safetensors", "none.npz", "none.safetensors", "x.pt"):
        if name.startswith("x"):
            (tmp_path / name).write_bytes(b"PK\3\4" + bytes(60))
        with pytest.raises(FileError):
            osscar.load_tensors(tmp_path / name, Mixed(), EXAMPLE)


def test_whole_numbers_take_the_width_of_the_example_and_fractions_any(tmp_path):
    narrow = {"tokens": GOOD["tokens"].astype(">i2"), "features": GOOD["features"].astype(">f8")}
    np.savez(tmp_path / "x.npz", **narrow)
    np.savez(tmp_path / "y.npz", **GOOD)
    found, same = (osscar.load_tensors(tmp_path / f"{n}.npz", Mixed(), EXAMPLE) for n in "xy")
    assert found.tensors["tokens"].dtype == torch.int64
    assert found.fingerprints() == same.fingerprints()
    drawn = found.sample(5, seed=1)
    assert set(drawn.fingerprints()) < set(found.fingerprints())
    assert len(drawn) == len(set(drawn.fingerprints())) == 5
    assert drawn.fingerprints() != found.sample(5, seed=2).fingerprints()


class Pictured(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.forward = {1: lambda images: images, 2: lambda images, features: images}[len(names)]


def test_an_archive_holds_images_unless_the_model_calls_something_else_so(tmp_path):
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "pixels.npz", images=pixels, test_images=pixels)
    np.savez(tmp_path / "floats.npz", images=pixels.astype(np.float32))
    np.savez(tmp_path / "other.npz", tokens=pixels)
    one, two = Pictured("images"), Pictured("images", "features")
    told = {
        (file, kind): holds_images(tmp_path / file, model)
        for file in (
            "pixels.npz",
            "pixels.npz:test",
            "floats.npz",
            "other.npz",
            "x.safetensors",
            "",
        )
        for kind, model in (("one", one), ("two", two), ("mixed", Mixed()))
    }
    assert {key for key, pictures in told.items() if pictures} == {
        *(("pixels.npz", "one"), ("pixels.npz", "mixed"), ("pixels.npz:test", "one")),
        *(("pixels.npz:test", "mixed"), ("", "one"), ("", "two"), ("", "mixed")),
    }
    for dtype, is_read in ((torch.uint8, False), (torch.float32, True)):
        known = {"images": torch.zeros(2, 4, 4, 3, dtype=dtype)}
        assert holds_images(tmp_path / "pixels.npz", one, known) == is_read
    (tmp_path / "bad.npz").write_bytes(b"PK no archive")
    with pytest.raises(FileError, match=r"cannot be read as \.npz"):
        holds_images(tmp_path / "bad.npz", one)


# ---- from Python -------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def samples(seed=0, labels=None, count=48):
    generator = torch.Generator().manual_seed(seed)
    return osscar.TensorSet("drawn", {"input": torch.randn(count, 5, generator=generator)}, labels)


def test_labels_say_that_a_matrix_is_of_scores_of_classes():
    labels = torch.arange(48) % 4
    model = network()
    assert as_inputs(model, samples(labels=labels)).predictions == ()
    measured = [
        osscar.prune(model, samples(labels=given), flops=0.6).divergence for given in (None, labels)
    ]
    assert measured[0] is None
    assert measured[1] > 0


def test_what_calibrated_a_model_is_known_and_its_evaluation_is_of_python_too():
    dense, data = network(), samples()
    pruned = osscar.prune(dense, data, neurons=0.5).model
    (known,) = lineage_of(pruned).calibration
    assert known.seen == Seen.of(data.fingerprints())
    labelled = samples(1, torch.arange(48) % 4)
    found = osscar.compare(pruned, dense, labelled, repetitions=1)
    assert found.model.quality.top1 is not None
    assert found.dense.quality.errors == {}
    alone = osscar.evaluate(pruned, labelled, batch_size=7, repetitions=1)
    assert alone.quality.top1 == found.model.quality.top1
    assert alone.sample == "sample"


def test_probabilities_diverge_as_their_logits_do():
    dense, pruned = network(), network()
    with torch.no_grad():
        pruned[2].weight.mul_(1.1)
    chances = [nn.Sequential(*model, nn.Softmax(1)).eval() for model in (pruned, dense)]
    of_logits = score([pruned], samples(), dense=dense)[0]
    of_chances = score(chances[:1], samples(), dense=chances[1])[0]
    assert of_logits.kl == pytest.approx(of_chances.kl, rel=1e-3)


def test_the_dense_model_is_scored_on_labels_that_are_its_classes():
    dense = network()
    with torch.no_grad():
        right = dense(samples().tensors["input"]).argmax(1)
    told = [osscar.score_dense(dense, samples(labels=labels)) for labels in (right, right + 3)]
    assert (told[0].value, told[0].near_chance) == (1.0, False)
    assert told[1].value is None
    assert "the model 4 classes" in told[1].reason
    assert osscar.score_dense(dense, samples()) is None


def test_data_and_labels_that_a_model_has_no_use_for_are_refused():
    model = network()
    for tensors, message in (
        ({"wave": GOOD["features"]}, "'wave' are a ndarray; give a tensor, such as torch.as_ten"),
        (torch.zeros(2, 3), "the data are a Tensor; give a mapping of tensors by the names"),
        (None, "the data are a NoneType; give a mapping"),
    ):
        with pytest.raises(DataError, match=message):
            osscar.TensorSet("x", tensors)
    for data, error, message in (
        (samples(labels=torch.arange(48) % 5), DataError, "from 0 to 4 and the model 4 cl"),
        (osscar.TensorSet("x", {"x": torch.zeros(2, 5)}), DataError, "takes no 'x'; it tak"),
        (osscar.TensorSet("x", {"input": torch.zeros(2, 3)}), DataError, r"input .*\(2, 3\)"),
        ({"input": torch.zeros(2, 5)}, DataError, "the data are a dict; give what osscar"),
        (samples(labels=torch.zeros(48, 2, dtype=int)), ModelError, r"the labels are \(32, 2\)"),
        (samples(labels=torch.eye(4, dtype=int).repeat(12, 1)), ModelError, "one-hot, .*argmax.1"),
    ):
        with pytest.raises(error, match=message):
            osscar.evaluate(model, data)
    with pytest.raises(DataError, match="cannot draw 0 samples"):
        samples().sample(0, seed=0)
    with pytest.raises(OptionError, match="batch size"):
        osscar.evaluate(model, samples(), batch_size=0)
    with pytest.raises(ModelError, match="cannot be compared"):
        osscar.compare(model, nn.Sequential(nn.Linear(5, 3)).eval(), samples())


def test_labels_are_whole_numbers_of_any_width_and_those_of_minus_100_are_not_scored():
    model = network()
    right = model(samples().tensors["input"]).argmax(1)
    some = torch.where(torch.arange(48) < 12, right, -100)
    scores = {}
    for name, labels in {
        "all": right.to(torch.uint16),
        "some": some,
        "none": some - some - 100,
    }.items():
        data = samples(labels=labels).sample(48, seed=0)
        scores[name] = [one(data) for one in (lambda d: score([model], d)[0].top1,
                                              lambda d: osscar.score_dense(model, d))]  # fmt: skip
    assert [top1 for top1, _ in scores.values()] == [1.0, 1.0, None]
    assert scores["some"][1].chance == int(right[:12].bincount().max()) / 12
    assert scores["none"][1] is None


class Segments(nn.Module):
    """Scores of 3 classes at each of 5 places, where torch has them, or last."""

    def __init__(self, last=False):
        super().__init__()
        self.layer, self.last = nn.Linear(5, 15), last

    def forward(self, input):
        scores = self.layer(input).unflatten(1, (3, 5))
        return scores.mT if self.last else scores


def test_the_classes_of_predictions_at_several_places_are_found_as_torch_has_them():
    torch.manual_seed(0)
    first, last = Segments(), Segments(last=True)
    last.load_state_dict(first.state_dict())
    scores = first(samples().tensors["input"])
    labels = torch.where(torch.rand(48, 5) < 0.5, scores.argmax(1), -100)
    labels[:9] = 0
    expected = (scores.argmax(1) == labels)[labels >= 0].double().mean()
    for model in (first, last):
        assert score([model], samples(labels=labels))[0].top1 == pytest.approx(expected)
    with pytest.raises(ModelError, match=r"scores of classes would be \(32, 'classes', 4\)"):
        score([first], samples(labels=labels[:, :4]))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, input):
        return self.net(input), input


def test_the_first_of_several_outputs_is_scored_by_labels_with_a_warning_as_of_images():
    labels = torch.arange(48) % 4
    with pytest.warns(UserWarning, match=r"scored is '0', the first; to score another, call it"):
        several = score([Several()], samples(labels=labels))[0]
    assert several.classes_in == "0"
    assert several.top1 == score([network()], samples(labels=labels))[0].top1
    assert score([Several()], samples())[0].classes_in is None


def test_the_example_of_a_file_may_be_a_tensor_or_several(tmp_path):
    np.savez(tmp_path / "x.npz", **GOOD)
    np.savez(tmp_path / "y.npz", input=GOOD["features"])
    several = osscar.load_tensors(tmp_path / "x.npz", Mixed(), tuple(EXAMPLE.values()))
    assert set(several.tensors) == {"tokens", "features"}
    net = nn.Sequential(nn.Linear(4, 3))
    assert len(osscar.load_tensors(tmp_path / "y.npz", net, torch.zeros(2, 4))) == 8
    with pytest.raises(FileError, match=r"in the example inputs float32 of \(2, 5\)"):
        osscar.load_tensors(tmp_path / "y.npz", net, torch.zeros(2, 5))
    with pytest.raises(DataError, match=r"3 \(int\) are no example inputs; give a tensor"):
        osscar.load_tensors(tmp_path / "y.npz", net, 3)


def test_labels_added_before_a_run_goes_on_are_other_data():
    model, labels = network(), torch.arange(48) % 4
    told = [
        Fingerprint.of(model, as_inputs(model, samples(labels=each)), 8) for each in (None, labels)
    ]
    assert told[0].difference(told[1]) == "the calibration data are others"


ANY_NUMBER = """
import torch
from tests.osscar.test_tensors import AnyNumber

def build():
    return AnyNumber()
"""


class AnyNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, z):
        return self.net(torch.view_as_real(z).flatten(1) if z.is_complex() else z.float())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e5m2])
def test_a_model_of_any_number_format_is_opened_again(dtype, tmp_path):
    (tmp_path / "mine.py").write_text(ANY_NUMBER)
    data = (torch.rand(24, 3 if dtype.is_complex else 6) * 8).to(dtype)
    pruned = osscar.prune(AnyNumber().eval(), {"z": data}, neurons=0.5, backend="magnitude")
    pruned.save(tmp_path / "small")
    again = load_model(tmp_path / "small", dense=f"{tmp_path / 'mine.py'}:build")
    assert again.example["z"].shape[1:] == data.shape[1:]
    file = tmp_path / "small" / "osscar.json"
    name = str(dtype).removeprefix("torch.")
    for other in ("zeros", "float4_e2m1fn_x2"):
        file.write_text(file.read_text().replace(f'"{name}"', f'"{other}"'))
        name = other
        with pytest.raises(CheckpointError, match=f"the input 'z' in .* no sense: '{other}'"):
            load_model(tmp_path / "small", dense=f"{tmp_path / 'mine.py'}:build")
