"""``osscar recover`` and ``osscar prune --recover`` as a person runs them."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

import osscar
import osscar.cli.recover
from benchmarks.prose import Split, builtin_text
from osscar.base.errors import OutputError
from osscar.data.text import load_calibration
from osscar.recovery.page import recovery_facts
from tests.docs.json_schema import missing, undescribed
from tests.osscar.families import CALIBRATION
from tests.osscar.interrupted_cases import pruning

TEXT = builtin_text(Split.TRAINING)[:1500]
TRAINING = ("--steps", 4, "--batch-size", 2, "--learning-rate", "1e-3", "--device", "cpu")


ON_TEXT = ("--text", CALIBRATION, "--samples", 6, *TRAINING)


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """A pruned model."""
    place = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        command = pruning(tiny, "--neurons", "0.25", "--out", str(place / "small"))
        patch.setattr("sys.argv", ["osscar", *command])
        with pytest.raises(SystemExit) as stop:
            osscar.cli.main()
    assert not stop.value.code
    return place / "small"


@pytest.fixture
def small(pruned, tmp_path, monkeypatch):
    """A pruned model, and a text beside it, in the directory in which commands are given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pruned, "small")
    Path("text.txt").write_text(TEXT)
    return Path("small")


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def weights(directory):
    return safetensors.torch.load_file(Path(directory) / "model.safetensors")


def report(directory):
    return json.loads((Path(directory) / "osscar_report.json").read_text())


def read(file):
    return json.loads(Path(file).read_text())


def check_card(directory, recovery):
    """Check that a model card says of held-out samples what they decided, and the unit."""
    card = (Path(directory) / "README.md").read_text()
    assert f"On {recovery['held_out']} samples that no weight was trained on" in card
    assert (
        "These samples chose the step that was kept and whether the learning rate was lowered"
        in card
    )
    assert f"to {recovery['after']:.4g} ({recovery['distance']['measure']})" in card
    assert "trained nothing" not in card


# ---- the whole way -----------------------------------------------------------------------


def test_what_was_recovered_is_nearer_of_the_same_shapes_and_says_what_it_has_seen(
    run, small, tiny
):
    before = contents(small)
    recover = ("recover", "small", "--dense", tiny, "--text", "text.txt", *TRAINING)
    status, out, err = run(*recover, "--json", "said.json")
    assert status == 0, err
    assert contents(small) == before
    assert not Path("small-recovered.recover").exists()

    said, document = read("said.json"), report("small-recovered")
    assert document == {key: value for key, value in said.items() if key != "saved"}
    assert (undescribed(said), missing(said)) == (set(), set())
    assert document["before"] == report("small")
    recovery = document["recovery"]
    assert 0 < recovery["after"] < recovery["before"]
    assert recovery["settings"]["learning_rate"] == recovery["points"][0]["rate"] == 1e-3
    assert recovery["data"]["seqlen"] == 32  # as when it was pruned
    told = [f"{name}: {fact}" for name, fact in recovery_facts(recovery)]
    for line in (*told, "saved: small-recovered ("):
        assert line in out
    check_card("small-recovered", recovery)

    old, new = weights("small"), weights("small-recovered")
    assert {n: (x.shape, x.dtype) for n, x in old.items()} == {
        n: (x.shape, x.dtype) for n, x in new.items()
    }
    assert not all(torch.equal(x, new[name]) for name, x in old.items())
    known, manifest = read("small/osscar.json"), read("small-recovered/osscar.json")
    *earlier, seen_text = manifest["lineage"]["calibration"]
    assert earlier == known["lineage"]["calibration"]
    assert seen_text["seen"] == recovery["data"]["seen"]

    Path("other.txt").write_text(TEXT.replace("the", "a"))
    status, _, err = run("eval", "small-recovered", "--text", "other.txt", "--device", "cpu")
    assert (status, "was used to calibrate or recover this model" in err) == (2, True), err


@pytest.mark.slow
def test_a_model_of_a_file_of_code_is_read_back_by_a_new_process(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Sequential):\n    pass\n"
        "def net():\n"
        "    torch.manual_seed(0)\n"
        "    layers = torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)\n"
        "    return Net(*layers), torch.randn(2, 8)\n"
    )
    samples = {"input": torch.randn(64, 8, generator=torch.Generator().manual_seed(0))}
    safetensors.torch.save_file(samples, "x.safetensors")
    asked = "--neurons", "0.5", "--calibration", "x.safetensors", "--out", "small"
    assert run("prune", "net.py:net", *asked)[0] == 0
    trained = "--dense", "net.py:net", "--inputs", "x.safetensors", "--steps", 2, "--out", "better"
    status, _, err = run("recover", "small", *trained)
    assert status == 0
    assert "only in this process" not in err
    assert read("better/osscar.json")["fresh"]


def test_one_run_prunes_and_recovers(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prune = pruning(tiny, "--neurons", "0.25", "--recover", "--set", "recovery.steps=4")
    status, out, err = run(*prune, "--out", "out", "--json", "p.json")
    assert status == 0, err
    said, document = read("p.json"), report("out")
    assert document == {key: value for key, value in said.items() if key != "saved"}
    assert undescribed(said) == set()
    recovery = document["recovery"]
    assert recovery["settings"]["steps"] == 4
    assert recovery["after"] < recovery["before"]
    assert all(f"{name}: {fact}" in out for name, fact in recovery_facts(recovery))
    check_card("out", recovery)
    assert ", before the recovery" in out
    assert "pruned and recovered" in Path("out/report.html").read_text()
    parameters = sum(p.numel() for p in osscar.load("out").parameters())
    assert parameters == document["parameters_after"]


# ---- that were ended ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_begins_anew_where_that_is_asked_for(run, small, tiny, monkeypatch):
    asked = ("recover", "small", "--dense", tiny, *ON_TEXT)

    def full(*given, **more):
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(osscar.cli.recover, "save", full)
        status, _, err = run(*asked)
    assert status == 2
    assert "the disk is full. 4 steps are kept in" in err
    assert Path("small-recovered.recover").exists()
    status, _, err = run(*asked, "--set", "mixed_precision=bf16")
    assert status == 2
    assert "holds another recovery" in err
    assert "mixed_precision was None and is 'bf16'" in err
    status, _, err = run(*asked, "--seed", 1, "--restart")
    assert status == 0, err
    assert not Path("small-recovered.recover").exists()


# ---- data --------------------------------------------------------------------------------


def test_windows_that_may_not_overlap_share_no_token(tiny):
    tokenizer = osscar.load_model(tiny).tokenizer
    words = " ".join(f"w{number}" for number in range(400))
    text = tokenizer(words, return_tensors="pt")["input_ids"][0]
    given = {"seqlen": 32, "seed": 0}
    few = load_calibration([words], tokenizer, samples=4, overlapping=False, **given)
    alike = load_calibration([words], tokenizer, samples=4, **given)
    assert torch.equal(few.tokens, alike.tokens)
    assert few.source == "a list"
    many = load_calibration([words], tokenizer, samples=1000, overlapping=False, **given)
    assert many.samples == len(text) // 32
    assert many.source == f"a list, as many as its {len(text):,} tokens have room for"
    starts = [int((text.unfold(0, 32, 1) == one).all(1).nonzero()[0]) for one in many.tokens]
    assert all(b - a >= 32 for a, b in pairwise(starts))
