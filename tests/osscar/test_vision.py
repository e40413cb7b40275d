"""Models that read images, from the name to the command line."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import osscar
from osscar.base.errors import (
    CheckpointError,
    DataError,
    FileError,
    ModelError,
    OptionError,
    import_torchvision,
)
from osscar.base.json_files import validated
from osscar.checkpoint.builders import LibraryOrigin
from osscar.checkpoint.directory import save
from osscar.cli import main
from osscar.data.images import ImageSet, load_images
from osscar.data.preprocessing import Preprocessing
from osscar.evaluation.dense import score_dense
from osscar.evaluation.evaluate import compare, evaluate
from osscar.evaluation.quality import score
from osscar.evaluation.tables import dense_facts
from osscar.models.load import load_model
from osscar.models.names import ModelKind, kind_of
from osscar.models.weights import fill, read_state
from osscar.proof.lineage import lineage_of
from osscar.proof.seen import Calibration, Seen, refuse_overlap
from tests.osscar.networks import IMAGENET, plain, small_net

pytest.importorskip("torchvision", reason="images need the extra osscar[vision]")

SIDE = 12
FAST = ("--channels", "0.5", "--backend", "magnitude", "--form", "eager")
CODE = """
import osscar
import torch
from tests.osscar.networks import small_net

def build():
    return small_net(), torch.zeros(2, 3, 12, 12)

def stating():
    return *build(), osscar.Preprocessing(mean=0, std=1)

def broken():
    raise RuntimeError("no luck")

def wrong():
    return "a model"

def spare():
    net, *rest = stating()
    torch.seed()
    net.spare = torch.nn.Parameter(torch.rand(2))
    return net, *rest

def drawn():
    net = small_net()
    torch.seed()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.reset_parameters()
    return net, torch.zeros(2, 3, 12, 12), osscar.Preprocessing(mean=0, std=1)
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    return f"{tmp_path / 'mine.py'}:stating"


def pixels(count, seed=0):
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(3, 1).repeat(3, 2)


@pytest.fixture
def archive(tmp_path):
    file = tmp_path / "images.npz"
    labels = np.arange(40) % 5
    parts = {"train_images": pixels(60), "test_images": pixels(40, 1), "test_labels": labels}
    np.savez(file, **parts)
    return file


@pytest.fixture
def folders(tmp_path):
    from PIL import Image

    root = tmp_path / "folders"
    for index, image in enumerate(pixels(10, 2)):
        place = root / "abcde"[index % 5]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{index}.png")
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["osscar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return call


# ---- the dense model, and commands that compare with it ------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A model of the user's own code, with weights in a file, and images that it tells apart."""
    monkeypatch.chdir(tmp_path)
    Path("my nets").mkdir()
    Path("my nets/mine.py").write_text(CODE)
    net = small_net(seed=5)
    torch.save(net.state_dict(), "my weights.pt")
    parts = {"train_images": pixels(60), "test_images": pixels(40, 1)}
    for part in ("train", "test"):
        images = load_images_of(parts[f"{part}_images"])
        parts[f"{part}_labels"] = net(images).argmax(1).numpy()
    np.savez("my images.npz", **parts)
    return "my nets/mine.py:drawn"


def load_images_of(array):
    steps = plain(SIDE)
    return ImageSet("pixels", array, steps).tensor()


def test_the_command_that_is_printed_compares_with_the_same_dense_model(run, own):
    prune = ("prune", own, "--calibration", "my images.npz:train", *FAST)
    status, out, err = run(*prune, "--weights", "my weights.pt", "--out", "my small model",
                           "--device", "cpu")  # fmt: skip
    assert status == 0, err
    assert "\ndense model: top-1 100.0% of 60 labelled calibration images\n" in out
    assert "freshly initialized" not in err
    line = out.partition("next:\n")[2].splitlines()[0]
    words = ["my images.npz:test" if w == "PATH" else w for w in shlex.split(line)]
    status, out, err = run(*words[1:], "--json", "e.json")
    assert status == 0, err
    assert "warning" not in err
    compared = json.loads(Path("e.json").read_text())
    assert compared["dense"]["quality"]["top1"] == 1

    # The same without weights: nothing that was drawn just now is taken for the dense model.
    at = words.index("--weights")
    status, out, err = run(*words[1:at], *words[at + 2 :], "--json", "e.json")
    assert status == 0, err
    assert "mine.py:drawn returns freshly initialized weights" in err
    assert "no comparison" in err
    alone = json.loads(Path("e.json").read_text())
    assert alone["dense_name"] is None
    assert "dense" not in alone
    assert alone["model"]["quality"]["top1"] == compared["model"]["quality"]["top1"]

    # Other weights are told.
    torch.save(small_net(seed=6).state_dict(), "other.pt")
    words[at + 1] = "other.pt"
    status, _, err = run(*words[1:])
    assert status == 0, err
    assert "is not the dense model that this one was pruned from" in err


def test_code_that_draws_weights_is_told_from_code_that_loads_them(own):
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"initialized weights: \d+% of its parameters differ"):
        found = osscar.load_model(own, device="cpu")
    layers = [m for m in found.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    drawn = sum(p.numel() for layer in layers for p in layer.parameters())
    assert found.drawn == drawn / sum(p.numel() for p in found.model.parameters())
    with pytest.warns(UserWarning, match=r"initialized weights: less than 1%"):
        osscar.load_model(own.replace("drawn", "spare"), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, weights in ((own, "my weights.pt"), (own.replace("drawn", "build"), None)):
            assert osscar.load_model(name, weights=weights, device="cpu").drawn == 0
        osscar.load_model(own, pretrained=False, device="cpu")


def test_labels_that_are_not_the_models_classes_are_no_obstacle():
    model = small_net()
    some = ImageSet("pixels", pixels(4), plain(SIDE), torch.tensor([0, 1, 2, 9]))
    score = score_dense(model, some)
    assert score.value is None
    assert "labels from 0 to 9" in dict(dense_facts(dataclasses.asdict(score)))["dense model"]
    # Of two images nothing can be said, whatever the model makes of them.
    wrong = (model(some.tensor()).argmax(1)[:2] + 1) % 5
    assert not score_dense(model, dataclasses.replace(some, items=some.items[:2],
                                                      labels=wrong)).near_chance  # fmt: skip
    assert score_dense(model, dataclasses.replace(some, labels=None)) is None
    many = ImageSet("pixels", pixels(40), plain(SIDE))
    labels = (model(many.tensor()).argmax(1) + torch.arange(40)) % 5
    near = score_dense(model, dataclasses.replace(many, labels=labels))
    assert (near.near_chance, near.value) == (True, 0.2)
    told = dict(dense_facts(dataclasses.asdict(near)))
    assert told["dense model"] == "top-1 20.0% of 40 labelled calibration images"
    assert "no better than chance" in told["warning"]
    model.head.register_forward_hook(lambda _, __, y: y - torch.inf * (torch.arange(5) == 4))
    assert "NaN or infinite" in score_dense(model, dataclasses.replace(some, labels=wrong)).reason


# ---- from end to end ---------------------------------------------------------------------


def test_prune_eval_inspect_and_load_a_model_of_the_users_own(run, code, archive, tmp_path):
    out_dir, report = tmp_path / "small", tmp_path / "report.json"
    train, test = f"{archive}:train", f"{archive}:test"
    prune = ("prune", code, "--out", out_dir, "--calibration", train, "--samples", 60)
    status, out, err = run(*prune, "--sparsity", 0.5, "--residual", "0.75", "--json", report,
                           "--backend", "magnitude", "--device", "cpu")  # fmt: skip
    assert status == 0, err
    assert "osscar eval small --dense DENSE --images PATH" in (out_dir / "report.html").read_text()
    assert "batch norm: new running statistics of 8 layers" in out
    written = json.loads(report.read_text())
    assert written["batch_norms"] == 8
    assert written["settings"]["residual"] == "0.75"
    assert written["calibration"]["seen"]["count"] == written["calibration"]["samples"] == 60
    assert written["calibration"]["preprocessing"]["crop"] == SIDE
    assert {layer["name"]: layer["kept"] for layer in written["layers"]}["stem.0.channels"] == 6

    evaluate = ("eval", out_dir, "--device", "cpu", "--images")
    status, out, err = run(*evaluate, test, "--dense", code, "--json", report)
    assert status == 0, err
    for expected in ("top-1", "images/s", "FLOPs per image", "agreement with dense", "KL"):
        assert expected in out
    compared = json.loads(report.read_text())
    assert compared["schema"] == "osscar.eval/3"
    assert compared["dense"]["quality"]["agreement"] is None
    assert 0 <= compared["model"]["quality"]["agreement"] <= 1
    assert compared["ratios"]["flops"] < 0.6
    again = ("prune", out_dir, "--out", tmp_path / "smaller", "--calibration", train, *FAST)
    for words, message in (
        (
            (*evaluate, train, "--dense", code),
            ":train calibrated or recovered this model",
        ),
        ((*evaluate, test), "--dense module:function"),
        ((*evaluate, test, "--dense", "torchvision:resnet18"), "not 'torchvision:resnet18'"),
        (
            (*evaluate, test, "--dense", code, "--weights", tmp_path / "w.pt"),
            "no file of weights",
        ),
        ((*again, "--device", "cpu"), "--dense module:function"),
        (("inspect", code, "--dense", code), "omit --dense"),
    ):
        status, _, err = run(*words)
        assert (status, message in err.replace("\n", " ")) == (2, True), err
    status, out, err = run("inspect", out_dir, "--dense", code)
    assert status == 0, err
    assert "channels, residual" in out


@pytest.mark.slow
def test_a_pruned_torchvision_model_is_read_in_another_process(run, archive, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.manual_seed(0)
    dense = import_torchvision("models").squeezenet1_1(num_classes=7).eval()
    torch.save(dense.state_dict(), weights)
    out_dir = tmp_path / "small"
    name = "torchvision:squeezenet1_1"
    status, _, err = run("prune", name, "--weights", weights, "--calibration", f"{archive}:train",
                         "--samples", 4, "--channels", 0.5, "--backend", "magnitude",
                         "--out", out_dir, "--device", "cpu")  # fmt: skip
    assert status == 0, err
    model = osscar.load(out_dir)
    x = torch.randn(2, 3, 64, 64)
    torch.save({"x": x, "y": model(x)}, tmp_path / "expected.pt")
    before = sum(p.numel() for p in dense.parameters())
    script = f"""
        import torch, osscar
        expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
        model = osscar.load({str(out_dir)!r})
        assert expected["y"].shape == (2, 7)
        assert torch.equal(model(expected["x"]), expected["y"])
        assert sum(p.numel() for p in model.parameters()) < 0.9 * {before}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    loaded = load_model(out_dir)
    assert "crop_size=[224]" in loaded.preprocessing.sentence()
    assert loaded.classes == ()
    evaluate = ("eval", out_dir, "--images", f"{archive}:test", "--samples", 2, "--device", "cpu")
    status, out, err = run(*evaluate, "--dense", name, "--weights", weights)
    assert status == 0, err
    assert "agreement with dense" in out


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fcn_resnet50", "resnet18"])
def test_a_model_that_a_plan_names_is_built_without_fetching_anything(name, monkeypatch, tmp_path):
    for place in ("torch.hub.load_state_dict_from_url", "torch.hub.download_url_to_file"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("fetched"))
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", torch.hub.load_state_dict_from_url
    )
    save(LibraryOrigin("torchvision", name).build(), tmp_path / "small")
    assert osscar.load(tmp_path / "small").training is False
    example = load_model(tmp_path / "small", device="cpu").example
    side = {"resnet18": 224, "fcn_resnet50": 520}.get(name, 320)
    assert [tuple(x.shape[2:]) for x in example.values()] == [(side, side)]


def test_bad_input_ends_in_one_line_before_anything_is_written(run, code, archive, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "osscar.json").write_text("{ 3")
    train, test = f"{archive}:train", f"{archive}:test"
    prune = ("prune", code, "--out", tmp_path / "out", "--sparsity", "0.5", "--calibration")
    evaluate = ("eval", code, "--images", test, "--device", "cpu", "--dense")
    for words, message in (
        (prune[:-1], "give --calibration a directory of images, an .npz file"),
        ((*prune, tmp_path / "nowhere"), "file of that name; images are a directory, or"),
        ((*prune, f"{archive}:valid"), "it has no entries of that name, only train_images"),
        ((*prune, train, "--seqlen", 8), "--seqlen is 8, and the data are no text"),
        ((*prune, train, "--weights", archive), "cannot be read"),
        ((*prune, train, "--samples", 0), "cannot draw 0 images"),
        ((*prune, train, "--heads", "0.5"), "no group of heads"),
        (("eval", code, "--text", "x"), "reads no text: omit --text"),
        (("eval", code), "give --images"),
        (("eval", "demo", "--images", archive), "reads text, not images"),
        (("eval", "demo", "--samples", 3), "reads text, not images: omit --samples"),
        (("eval", tmp_path / "empty", "--images", archive), "not a checkpoint"),
        (("eval", tmp_path / "bad", "--images", archive), "not the description of a checkpoint"),
        ((*evaluate, "demo"), "'demo' is a language model, and"),
        ((*evaluate, "torchvision:resnet"), "has no model 'resnet'"),
        (
            ("eval", "demo", "--windows", 1, "--dense", "torchvision:resnet18"),
            "'torchvision:resnet18' is a model of torchvision, and",
        ),
    ):
        status, _, err = run(*words)
        assert (status, message in err.replace("\n", " ")) == (2, True), err
        assert not (tmp_path / "out").exists()


# ---- models ------------------------------------------------------------------------------


def test_names_tell_which_sort_of_model_they_stand_for(tmp_path, code):
    for name in ("torchvision:resnet18", code, "package.module:function"):
        assert kind_of(name) is not ModelKind.LANGUAGE
    for name in ("demo", "owner/name", str(tmp_path), "C:/models"):
        assert kind_of(name) is ModelKind.LANGUAGE
    for name, error, message in (
        ("torchvision:resnet19", ModelError, "did you mean resnet"),
        (f"{tmp_path}/none.py:build", ModelError, "no file"),
        ("no.such.module:build", ModelError, "cannot import"),
        (f"{tmp_path}/mine.py:absent", ModelError, "has no function 'absent'"),
        (code.replace("stating", "broken"), ModelError, "RuntimeError: no luck"),
        (code.replace("stating", "wrong"), ModelError, "returned a str"),
    ):
        with pytest.raises(error, match=message):
            load_model(name)
    with pytest.raises(OptionError, match="weights of its own"):
        load_model("demo", weights=tmp_path / "w.pt")
    with pytest.raises(OptionError, match="omit dense="):
        load_model(code, dense=code)


def test_without_a_connection_both_ways_to_get_weights_are_named(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nonexistent-osscar-test")
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    with pytest.raises(ModelError, match=r"from https://.*mobilenet.*connect, or .*weights=FILE"):
        load_model("torchvision:mobilenet_v2")


def test_weights_come_from_safetensors_and_from_state_dicts(code, tmp_path):
    other = small_net(seed=5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "w.pt")
    for wrapped in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        there = {f"{wrapped}{key}": tensor for key, tensor in other.state_dict().items()}
        save_file(there, tmp_path / f"{wrapped}safetensors")
    for file in ("w.pt", *(path.name for path in tmp_path.glob("*.safetensors"))):
        loaded = load_model(code, weights=tmp_path / file)
        state = loaded.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    floating = {k: t.double() if t.is_floating_point() else t for k, t in state.items()}
    torch.save(floating, tmp_path / "w.pt")
    assert load_model(code, weights=tmp_path / "w.pt").stored_dtype == torch.float32


def test_weights_that_do_not_fit_are_refused():
    net = small_net()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    without = {key: value for key, value in state.items() if key != "head.bias"}
    for given, message in (
        ({**state, "extra": torch.zeros(1)}, "do not fit SmallNet: Unexpected key.*extra"),
        ({**state, "head.weight": torch.zeros(3, 48)}, "size mismatch for head.weight"),
        (without, "Missing key.*head.bias"),
    ):
        with pytest.raises(ModelError, match=message):
            fill(net, given, "a file")


def test_files_that_hold_no_weights_are_refused_unpickled(tmp_path):
    file = tmp_path / "w.pt"
    for content in (b"", b"hello", b"x"):
        file.write_bytes(content)
        with pytest.raises(ModelError, match=r"cannot be read: .*weights_only=True") as caught:
            read_state(file)
        assert "\x1b" not in str(caught.value)
    torch.save({1: torch.zeros(2)}, file)
    with pytest.raises(ModelError, match="holds no state dicts, which have tensors by name"):
        read_state(file)
    torch.save(small_net(), file)  # a whole model, which only pickle can read
    with pytest.raises(ModelError, match="weights_only=True"):
        read_state(file)
    with pytest.raises(ModelError, match="no file of weights"):
        read_state(tmp_path / "none.pt")


def test_a_state_dict_among_other_entries_is_read_and_named(tmp_path, recwarn):
    file, state = tmp_path / "w.pt", small_net().state_dict()
    optimizer = {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]}
    for entries, said in (
        (state, ""),
        ({"model": state}, "of the 1 entries of '{}', 'model' is read"),
        (
            {"net": state, "optimizer": optimizer, "best": torch.zeros(1), "epoch": 3},
            "of the 4 entries of '{}', 'net' is read",
        ),
    ):
        torch.save(entries, file)
        found = read_state(file)
        assert all(torch.equal(found[key], state[key]) for key in state)
        assert [str(one.message) for one in recwarn] == [said.format(file)] * bool(said)
        recwarn.clear()
    torch.save({"model": state, "ema": state, "epoch": 3}, file)
    with pytest.raises(ModelError, match=r"holds 2 state dicts, .*to a file of its own"):
        read_state(file)
    torch.save({"optimizer": optimizer, "epoch": 3}, file)
    with pytest.raises(ModelError, match="holds no state dicts"):
        read_state(file)


def test_a_directory_of_unknown_code_is_loaded_with_the_dense_model(tmp_path):
    model, data = small_net(), torch.rand(60, 3, SIDE, SIDE)
    options = {"backend": "magnitude", "device": "cpu", "form": "eager"}
    result = osscar.prune(model, data, channels=0.5, **options)
    result.save(tmp_path / "small")
    again = osscar.load(tmp_path / "small", dense=small_net(seed=9))
    assert torch.equal(again(data), result.model(data))
    with pytest.raises(CheckpointError, match=r"\(dense=\)"):
        osscar.load(tmp_path / "small")


# ---- images ------------------------------------------------------------------------------


def test_images_that_would_not_be_seen_as_they_are_are_refused(tmp_path, monkeypatch):
    """PostScript under the name of a JPEG would be given to an interpreter."""
    from PIL import EpsImagePlugin, Image

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    wide = np.full((12, 12), 40_000)
    for mode, dtype in (("I;16", np.uint16), ("I", np.int32), ("F", np.float32)):
        file = tmp_path / ("a.png" if dtype is np.uint16 else "a.tif")
        Image.fromarray(wide.astype(dtype)).save(file)
        with pytest.raises(DataError, match=f"pixels of mode '{mode}'.*rescale it to 8 bits"):
            load_images(tmp_path, IMAGENET).tensor()
        file.unlink()
    Image.new("RGB", (30, 1)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"a\.png' cannot be decoded .*exceeds limit of 20 pixels"):
        load_images(tmp_path, IMAGENET).tensor()
    (tmp_path / "a.png").unlink()
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(program)
    with pytest.raises(DataError, match=r"a\.jpg' cannot be decoded .*JPEG"):
        load_images(tmp_path, IMAGENET).tensor()


def test_a_report_whose_preprocessing_makes_no_sense_is_refused():
    known = ImageSet("none", [], IMAGENET).describe()["preprocessing"]
    for change, message in (
        ({"interpolation": "x"}, "interpolation: input should be 'nearest', .*, not 'x'"),
        ({"resize": -1}, "resize: give pixels, from 1 to 16384"),
        ({"crop": 10**9}, "crop: give pixels, from 1 to 16384"),
        ({"resize": "x"}, "resize: give pixels"),
        ({"std": [float("nan")] * 3}, "std: give that of pixels / 255, above 0 and at most 1"),
        ({"mean": [float("nan")] * 3}, "mean: give that of pixels / 255, at most 1"),
        ({"std": [-1, 1, 1]}, "std: give that of pixels"),
        ({"mean": []}, "mean: give one number for all channels"),
        ({"mean": [0.5, 0.5]}, "mean: give one number for all channels"),
        ({"mean": [127.5] * 3}, "mean: give that of pixels / 255"),
        ({"channels": 1}, "mean has 3 numbers, and images 1 channel"),
        ({"dtype": "int8"}, "dtype: unexpected"),
    ):
        with pytest.raises((OptionError, FileError), match=message):
            validated(json.loads(json.dumps({**known, **change})), Preprocessing, "it")


def test_images_are_transformed_as_torchvision_does(folders):
    from PIL import Image

    weights = import_torchvision("models").ResNet18_Weights.DEFAULT
    preset = weights.transforms(crop_size=8, resize_size=10)
    preprocessing = Preprocessing(10, 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = load_images(folders, preprocessing)
    expected = torch.stack([preset(Image.open(file)) for file in images.items])
    assert torch.equal(images.tensor(), expected)
    assert torch.equal(load_images(folders, preset).tensor(), expected)
    assert images.classes == ("a", "b", "c", "d", "e")
    assert load_images(folders / "a", IMAGENET).labels is None
    record = json.loads(json.dumps(preprocessing.record()))
    assert validated(record, Preprocessing, "it") == preprocessing


def test_an_archive_and_a_draw_from_it(archive):
    images = load_images(f"{archive}:test", plain(SIDE))
    assert len(images) == 40
    drawn, again = images.sample(8, seed=3), images.sample(8, seed=3)
    assert torch.equal(drawn.tensor(), again.tensor())
    assert not torch.equal(drawn.tensor(), images.sample(8, seed=4).tensor())
    whole = {
        print_: int(label)
        for print_, label in zip(images.fingerprints(), images.labels, strict=True)
    }
    assert [whole[p] for p in drawn.fingerprints()] == drawn.labels.tolist()


def test_places_without_images_are_refused(tmp_path, monkeypatch):
    for arrays, message in (
        ({"images": np.zeros((2, 8), np.uint8)}, "must be uint8"),
        ({"images": np.zeros((2, 8, 8, 3), np.float32)}, "is torch.float32"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "must be uint8 .*0, 8, 8, 3"),
        ({"images": pixels(2), "labels": np.zeros(3, int)}, "must be 2 whole numbers"),
        ({"images": pixels(2), "labels": np.zeros(2)}, "whole numbers, .*not torch.float64"),
        ({"pictures": pixels(2)}, "no entries of that name, only pictures"),
        ({"images": np.array([{}])}, "Object arrays cannot be loaded"),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(DataError, match=message):
            load_images(tmp_path / "x.npz", IMAGENET)
    (tmp_path / "x.npz").write_bytes(b"PK no archive")
    (tmp_path / "notes.txt").write_text("no image")
    for path, message in (
        (tmp_path, "holds no images"),
        (tmp_path / "notes.txt", "no images at"),
        (tmp_path / "x.npz", r"cannot be read as \.npz"),
        *((spec, "") for spec in ("", "x" * 5000, "~no-such-user/x", "a\0b.npz", "\udc80")),
    ):
        with pytest.raises(DataError, match=message or "images"):
            load_images(path, IMAGENET)


def test_what_is_no_image_among_others_is_left_alone_or_named(folders):
    os.mkfifo(folders / "a" / "pipe.png")
    (folders / "a" / "loop").symlink_to(folders)
    (folders / ".ipynb_checkpoints").mkdir()
    (folders / ".ipynb_checkpoints" / "0.png").write_bytes(b"of an editor")
    found = load_images(folders, IMAGENET)
    assert (len(found), found.classes) == (10, tuple("abcde"))
    (folders / "a" / "bad.png").write_bytes(b"\x89PNG nothing more")
    with pytest.raises(DataError, match=r"bad\.png.* cannot be decoded"):
        load_images(folders, IMAGENET).tensor()


def test_images_are_recognized_by_what_is_stored(folders):
    images = load_images(folders, IMAGENET)
    text = Calibration("text", Seen.of([]))
    known = [text, Calibration.of(images.sample(3, seed=0).describe())]
    with pytest.raises(DataError, match=r"about 30% of .* calibrated or recovered this model \("):
        refuse_overlap(images, known)
    others = ImageSet("others", pixels(200, 9), IMAGENET)
    refuse_overlap(others, known)
    refuse_overlap(images, [])
    one = Calibration.of(others.sample(1, seed=0).describe())
    with pytest.warns(UserWarning, match=r"about 0\.5% of others calibrated or recovered this"):
        refuse_overlap(others, [text, one])


def test_python_saves_all_that_the_command_line_does(code, archive, tmp_path):
    loaded = load_model(code)
    images = loaded.calibration(f"{archive}:train", samples=8, seqlen=None, seed=0)
    result = osscar.prune(loaded.model, images, sparsity=0.5, backend="magnitude", device="cpu")
    result.save(tmp_path / "small")
    again = load_model(tmp_path / "small", dense=code)
    assert again.preprocessing == loaded.preprocessing != IMAGENET
    lineage = lineage_of(again.model)
    assert lineage == lineage_of(result.model)
    assert lineage.source == Path(code).name
    with pytest.raises(DataError, match=r"about 100% of .* calibrated or recovered this model"):
        refuse_overlap(images, lineage.calibration)
    file = tmp_path / "small" / "osscar.json"
    manifest = json.loads(file.read_text())
    manifest["lineage"]["preprocessing"]["resize"] = -1
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="makes no sense: resize: give pixels"):
        load_model(tmp_path / "small", dense=code)


# ---- evaluation --------------------------------------------------------------------------


@pytest.fixture
def labelled(archive):
    return load_images(f"{archive}:test", plain(SIDE))


def test_quality_is_what_the_logits_say(labelled):
    model, dense = small_net(classes=6), small_net(classes=6, seed=3)
    mine, theirs = score([model, dense], labelled, dense=dense, batch_size=7)
    with torch.no_grad():
        p, q = (m(labelled.tensor()).double() for m in (model, dense))
    labels = labelled.labels
    assert mine.samples == 40
    assert mine.top1 == pytest.approx((p.argmax(1) == labels).double().mean().item())
    ranks = (p > p.gather(1, labels[:, None])).sum(1)
    assert mine.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert mine.agreement == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())
    kl = (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).sum(1).mean()
    assert mine.kl == pytest.approx(kl.item(), rel=1e-5)
    assert theirs.agreement is None
    alone = score([model], dataclasses.replace(labelled, labels=None), dense=dense)[0]
    assert (alone.top1, alone.agreement) == (None, mine.agreement)


def test_a_model_beside_itself_is_equal_and_as_large_as_it_is(labelled):
    model, hidden, area = small_net(), 16, SIDE * SIDE
    comparison = compare(model, small_net(), labelled, repetitions=1)
    quality, footprint = comparison.model.quality, comparison.model.footprint
    assert (quality.agreement, quality.top5) == (1, None)
    assert quality.kl == pytest.approx(0, abs=1e-12)
    assert comparison.ratios["top1"] == comparison.ratios["flops"] == 1
    block = area * (8 * hidden + 9 * hidden + 9 * hidden * 8) + 2 * 4 * hidden
    products = area * 27 * 8 + 2 * block + area // 4 * 9 * 8 * 12 + 48 * 5
    assert footprint.flops == 2 * products
    assert footprint.parameters == sum(p.numel() for p in model.parameters())
    assert comparison.model.speed.samples_per_second > 0


def test_models_that_cannot_be_scored_on_images_are_named(labelled):
    gray, segmenter = torch.nn.Conv2d(1, 5, 3), torch.nn.Conv2d(3, 2, 1)
    with pytest.raises(
        DataError, match=r"Conv2d fails on the data \(input torch.float32 \(.*3, 12"
    ):
        evaluate(gray, labelled)
    with pytest.warns(UserWarning, match="Conv2d puts out no scores of classes, so that the lab"):
        [quality] = score([segmenter], labelled, dense=torch.nn.Conv2d(3, 2, 1))
    assert (quality.top1, set(quality.errors)) == (None, {"output"})
    with pytest.raises(ModelError, match="cannot be compared"):
        score([small_net(classes=6)], labelled, dense=small_net())


def test_folders_are_matched_with_classes(folders):
    images = load_images(folders, IMAGENET)
    order = images.labels.tolist()
    assert images.class_labels((), 5).tolist() == order
    named = images.class_labels(("x", "e", "d", "c", "b", "a"), 6)
    assert named.tolist() == [5 - label for label in order]
    with pytest.raises(DataError, match="5 class folders and the model 7 classes"):
        images.class_labels((), 7)
    numbered = ImageSet("x", images.items, IMAGENET, images.labels, ("0", "2", "4", "6", "8"))
    assert numbered.class_labels((), 10).tolist() == [2 * label for label in order]
    with pytest.raises(DataError, match="labels from 0 to 8 and the model 8 classes"):
        numbered.class_labels((), 8)
