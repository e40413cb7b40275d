"""Files that strangers give: whatever they hold, a reader returns, or raises an error of ours."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graph
import osscar
import solvers
from osscar.base.errors import CheckpointError, FileError, ModelError, OsscarError, OutputError
from osscar.base.files import file_digest
from osscar.base.inputs import panics_are_errors
from osscar.base.json_files import read_object
from osscar.checkpoint.manifest import MANIFEST_FILE
from osscar.cli.common import check_json_path
from osscar.data.images import ImageSet, load_images
from osscar.data.text import read_text
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY, ModelKind, kind_of
from osscar.models.weights import read_state
from tests.osscar.families import CALIBRATION, tiny
from tests.osscar.networks import IMAGENET, plain, small_net
from tests.solvers.test_perspective import random_problem

MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=[12, pytest.param(60, marks=pytest.mark.slow)])
def examples(request):
    """How many damaged files are read: a dozen, and more with -m slow."""
    return settings(MANY, max_examples=request.param)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, -7, 1, 2, 10**9, 10**30, 1.5, float("nan"), float("inf")]),
    st.text(max_size=3),
    st.sampled_from([[], {}, [{}], [1, -1], {"type": "x"}, {"type": 3}]),
)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Give bytes that were a good file: cut off, with some changed, or with something inserted."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, min(len(data) - 1, 400)))
        data[place] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(data)))
        data[place:place] = draw(st.binary(max_size=8))
    if draw(st.booleans()):
        data = data[: draw(st.integers(0, len(data)))]
    return bytes(data)


@st.composite
def changed(draw, whole: dict) -> dict:
    """Give an object that was a good file, with values that make no sense, at any depth."""
    data = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        place = data
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = draw(st.sampled_from(list(keys)))
            inside = place[key]
            if not isinstance(inside, dict | list) or not inside or draw(st.booleans()):
                break
            place = inside
        if isinstance(place, dict) and draw(st.booleans()):
            del place[key]
        else:
            place[key] = copy.deepcopy(draw(VALUES))
        if not data:
            break
    return data


NO_OBJECTS = [b"", b"[]", b"3", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000]


def survives(reader, *arguments):
    """Call a reader; errors of any other tree come through and fail the test."""
    with contextlib.suppress(OsscarError):
        reader(*arguments)


# ---- images ------------------------------------------------------------------------------


def picture(kind: str) -> bytes:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    file = io.BytesIO()
    image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"])
def test_images(kind, tmp_path, examples):
    pytest.importorskip("torchvision", reason="images need the extra osscar[vision]")
    file = tmp_path / f"a.{'jpg' if kind == 'jpeg' else kind}"

    @examples
    @given(damaged(picture(kind)))
    def check(data):
        file.write_bytes(data)
        images = load_images(tmp_path, plain(8))
        survives(images.tensor)
        images.fingerprints()

    check()


def test_archives(tmp_path, examples):
    pytest.importorskip("torchvision", reason="images need the extra osscar[vision]")
    whole = io.BytesIO()
    np.savez(whole, images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.arange(2))
    file = tmp_path / "a.npz"

    @examples
    @given(damaged(whole.getvalue()))
    def check(data):
        file.write_bytes(data)
        survives(lambda: load_images(file, plain(4)).tensor())

    check()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_weights(name, tmp_path, examples):
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    file = tmp_path / name
    if name.endswith("pt"):
        torch.save(state, file)
    else:
        safetensors.torch.save_file(state, file)
    whole = file.read_bytes()

    @examples
    @given(damaged(whole))
    def check(data):
        file.write_bytes(data)
        survives(read_state, file)

    check()


@settings(MANY, max_examples=30)
@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_texts(tmp_path, data):
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    survives(read_text, file)


# ---- checkpoints -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))


@pytest.fixture
def checkpoint(request, tmp_path):
    """Write a tiny model of a family with the tokenizer of the demo."""
    path = tmp_path / "model"
    tiny(request.param).save_pretrained(path)
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


@pytest.mark.parametrize("checkpoint", ["opt", "llama-gqa"], indirect=True)
def test_configs(checkpoint, examples):
    file = checkpoint / "config.json"
    whole = json.loads(file.read_text())

    @examples
    @given(changed(whole))
    def check(data):
        file.write_text(json.dumps(data))
        survives(lambda: load_model(checkpoint, device="cpu").example)
        survives(osscar.load, checkpoint)

    check()
    for content in NO_OBJECTS:
        file.write_bytes(content)
        for reader in (load_model, osscar.load):
            with pytest.raises(FileError, match=r"config\.json: it "):
                reader(checkpoint)


@pytest.mark.parametrize("checkpoint", ["opt"], indirect=True)
def test_tokenizers(checkpoint):
    file = checkpoint / "tokenizer.json"
    whole = json.loads(file.read_text())
    table = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    panics = ({"normalizer": table}, {"pre_tokenizer": {"type": "FixedLength", "length": 0}})
    for content in (*NO_OBJECTS, *(json.dumps({**whole, **one}).encode() for one in panics)):
        file.write_bytes(content)
        with pytest.raises(ModelError, match="has no tokenizer that transformers can read"):
            load_model(checkpoint)


def test_a_panic_later_on_is_an_error():
    class PanicException(BaseException):
        pass

    panic = PanicException("out of range")
    fails = pytest.raises(ModelError, match="fails on this text: out of range")
    with fails, panics_are_errors("this text"):
        raise panic
    with pytest.raises(KeyboardInterrupt), panics_are_errors("this text"):
        raise KeyboardInterrupt


def test_manifests(runs, tmp_path, examples):
    path = tmp_path / "small"
    runs["convolutions"].result.save(
        path, report={"calibration": {"preprocessing": IMAGENET.record()}, "classes": []}
    )
    manifest = path / MANIFEST_FILE
    good = json.loads(manifest.read_text())
    assert kind_of(path) is ModelKind.CODE_DIRECTORY

    @examples
    @given(changed(good))
    def check_manifest(data):
        manifest.write_text(json.dumps(data))
        kind_of(path)
        survives(osscar.load, path)

    check_manifest()
    later = json.dumps({**good, "schema": "osscar.checkpoint/99"}).encode()
    for content in (*NO_OBJECTS, b'{"a": 1, "a": 2}', b"\x00", b"NaN", later):
        manifest.write_bytes(content)
        kind_of(path)
        with pytest.raises(CheckpointError, match=r"osscar\.json is not the description") as error:
            osscar.load(path)
    assert re.search(r"schema.*osscar\.checkpoint/99", str(error.value))


# ---- names and types ---------------------------------------------------------------------


@MANY
@given(
    st.one_of(
        st.text(max_size=20), st.sampled_from(["\udc80", "a\0b", "x" * 5000, "~no-such-user/x"])
    )
)
def test_names(text):
    survives(load_model, text)
    survives(load_images, text, IMAGENET)
    survives(read_text, text)


def calls(wrong, number):
    """Yield what is called with something of a wrong type, or with something that is no number."""
    loaded, data = load_model("demo", device="cpu"), ImageSet("none", [], IMAGENET)
    model, tokenizer, text = loaded.model, loaded.tokenizer, "some text"
    yield lambda: load_model(wrong)
    yield lambda: load_model("demo", device=wrong)
    yield lambda: load_model("demo", dtype=wrong)
    yield lambda: load_images(wrong, IMAGENET)
    yield lambda: load_images("images", wrong)
    yield lambda: read_state(wrong)
    yield lambda: read_text(wrong)
    yield lambda: osscar.load_calibration(wrong, tokenizer)
    yield lambda: osscar.load_calibration(CALIBRATION, wrong)
    yield lambda: osscar.load_calibration(CALIBRATION, tokenizer, samples=number)
    yield lambda: osscar.load_calibration(CALIBRATION, tokenizer, seqlen=number)
    yield lambda: osscar.load_calibration(CALIBRATION, tokenizer, seed=number)
    yield lambda: osscar.load_text([text], wrong)
    yield lambda: osscar.load_text([text], tokenizer, windows=number)
    words = osscar.load_text([text], tokenizer)
    yield lambda: osscar.evaluate(model, osscar.load_text([text], tokenizer, seqlen=number))
    yield lambda: osscar.evaluate(wrong, words)
    yield lambda: osscar.evaluate(model, wrong)
    yield lambda: osscar.evaluate(model, words, batch_size=number)
    yield lambda: osscar.evaluate(model, words, new_tokens=number)
    yield lambda: osscar.evaluate(model, words, repetitions=number)
    yield lambda: osscar.compare(model, wrong, words)
    yield lambda: osscar.evaluate(wrong, data)
    yield lambda: osscar.evaluate(small_net(), data, batch_size=number)
    yield lambda: osscar.compare(small_net(), wrong, data)
    yield lambda: data.sample(number, 0)


class Textless:
    """Its text fails, as do all of its attributes but those that every object has."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise ValueError("no text")


WRONG = [3, 1.5, b"x", [], object(), Textless()]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_wrong_types(wrong):
    number = "3" if isinstance(wrong, int) else wrong
    for number_of_call, call in enumerate(calls(wrong, number)):
        with pytest.raises(OsscarError):
            pytest.fail(f"call {number_of_call} returned {call()}")


def structural_calls(wrong):
    """Yield what reads and cuts the structure of models, called with something of a wrong type."""
    net, images, plan = small_net(), torch.rand(2, 3, 12, 12), osscar.PruningPlan(())
    yield lambda: osscar.load(wrong)
    yield lambda: osscar.load(DEMO_DIRECTORY, dtype=wrong)
    yield lambda: osscar.load(DEMO_DIRECTORY, dense=wrong)
    yield lambda: osscar.save(wrong, "out")
    yield lambda: osscar.save(net, wrong)
    yield lambda: osscar.save(net, "out", dtype=wrong)
    yield lambda: osscar.slice_units(wrong, plan)
    yield lambda: osscar.shrink(wrong, plan, [(images,)])
    yield lambda: osscar.adapter(wrong)(print)
    yield lambda: osscar.mixture(wrong, gate="gate", experts="experts")
    yield lambda: osscar.prune(wrong, images, sparsity=0.5)
    yield lambda: osscar.prune(net, wrong, sparsity=0.5)
    yield lambda: osscar.prune(net, images, sparsity=0.5, backend=wrong)
    yield lambda: graph.trace(net, wrong)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_wrong_types_where_models_are_cut(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, call in enumerate(structural_calls(wrong)):
        with pytest.raises((OsscarError, graph.GraphError)):
            pytest.fail(f"call {number} returned {call()}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["a\0b", "\ud800", b"a", None, "~no-such-user/x", "a" * 300, "x/" * 3000]
)
def test_places_that_cannot_be(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OsscarError):
        osscar.save(small_net(), name)
    if isinstance(name, str):
        with pytest.raises(graph.GraphError):
            graph.trace(small_net(), {"x": torch.rand(2, 3, 12, 12)}).draw(name)
        with pytest.raises(solvers.SolverError):
            random_problem(129, 7, 1, 3, 3, spread=1.0).save(name + ".safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_of_a_study_that_never_ends(tmp_path):
    with pytest.raises(FileError, match="a pipe or a device"):
        file_digest(Path("/dev/zero"))


# ---- models of strange habits ------------------------------------------------------------


class Trains(torch.nn.BatchNorm2d):
    """A normalization that keeps to training mode."""

    def train(self, mode=True):
        return super().train(True)


class Silent(torch.nn.Sequential):
    """A model whose ``train`` returns nothing, and tells its parts nothing."""

    def train(self, mode=True):
        self.training = mode


class Broken(torch.nn.Sequential):
    def train(self, mode=True):
        raise KeyError("no mode")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 12), Trains(8), torch.nn.Flatten()),
         r"module '1' \(Trains\) stays in training mode"),
        (lambda: Silent(torch.nn.Conv2d(3, 8, 12), torch.nn.BatchNorm2d(8), torch.nn.Flatten()),
         r"module '1' \(BatchNorm2d\) stays in training mode"),
        (lambda: Broken(torch.nn.Conv2d(3, 8, 12), torch.nn.Flatten()), "Broken cannot be set"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_leave_training_mode(model, reason):
    net, images = model(), torch.rand(8, 3, 12, 12)
    flags = [module.training for module in net.modules()]
    with pytest.raises(ModelError, match=reason):
        osscar.prune(net, images, channels=0.5)
    with pytest.raises(ModelError, match=reason):
        osscar.shrink(net, osscar.PruningPlan(()), [(images[:1],)])
    assert [module.training for module in net.modules()] == flags


def test_a_model_that_cannot_run_on_the_inputs_of_the_proof():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(5, 2))
    with pytest.raises(ModelError, match=r"module '1' \(Linear\) fails on the inputs of the proof"):
        osscar.shrink(net, osscar.PruningPlan(()), [(torch.rand(2, 3),)])


def test_json_does_not_take_the_place_of_something_else(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"PK")
    (tmp_path / "old.json").write_text("{}")
    check_json_path(tmp_path / "old.json")
    check_json_path(tmp_path / "new.json")
    with pytest.raises(OutputError, match="would be lost"):
        check_json_path(tmp_path / "mine.npz")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "holds a list"),
        ('{"a": 1, "a": 2}', "stands there twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": ' + "1" * 5000 + "}", "4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "' + "x" * 200 + '"}', "more than 100 bytes"),
    ],
)
def test_an_object_of_another_project_comes_in_on_the_same_way(tmp_path, text, reason):
    limit = 100 if "xxx" in text else 2**20
    (tmp_path / "a").write_text('{"a": 1, "time_step_limit": [0.0, Infinity]}')
    assert read_object(tmp_path / "a", limit=limit)["a"] == 1
    (tmp_path / "a").write_text(text)
    with pytest.raises(FileError, match=reason):
        read_object(tmp_path / "a", limit=limit)
