"""``osscar recover`` and ``osscar prune --recover`` as a person runs them."""

import dataclasses
import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import osscar
import osscar.cli.recover
from benchmarks.prose import Split, builtin_text
from osscar.base.errors import OutputError
from osscar.cli.options import RecoverOptions
from osscar.data.text import load_calibration
from osscar.recovery.page import recover_page, recovery_facts, recovery_table
from osscar.recovery.request import RecoveryRequest
from osscar.recovery.training import RecoveryLog
from tests.docs.json_schema import missing, undescribed
from tests.osscar.browser import DESK, PHONE, seen_at
from tests.osscar.families import CALIBRATION, framing_tokenizer
from tests.osscar.interrupted_cases import pruning
from tests.osscar.networks import images

TEXT = builtin_text(Split.TRAINING)[:1500]
TRAINING = ("--steps", 4, "--batch-size", 2, "--learning-rate", "1e-3", "--device", "cpu")


@pytest.fixture(scope="module")
def pruned(tiny, tmp_path_factory):
    """A pruned model, with everything that the command leaves beside it."""
    place = tmp_path_factory.mktemp("pruned") / "small"
    with pytest.MonkeyPatch.context() as patch:
        command = pruning(tiny, "--neurons", "0.25", "--out", str(place))
        patch.setattr("sys.argv", ["osscar", *command])
        with pytest.raises(SystemExit) as stop:
            osscar.cli.main()
    assert not stop.value.code
    return place


@pytest.fixture
def small(pruned, tmp_path, monkeypatch):
    """The same, in the directory in which commands are given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pruned, tmp_path / "small")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "small"


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def weights(directory):
    return safetensors.torch.load_file(Path(directory) / "model.safetensors")


def report(directory):
    return json.loads((Path(directory) / "osscar_report.json").read_text())


def read(file):
    return json.loads(Path(file).read_text())


# ---- the whole way -----------------------------------------------------------------------


def test_what_was_recovered_is_nearer_of_the_same_shapes_and_says_what_it_has_seen(
    run, small, tiny
):
    before = contents(small)
    recover = ("recover", "small", "--dense", tiny, "--text", "text.txt", *TRAINING)
    status, out, err = run(*recover, "--json", "said.json", "--report", "page.html")
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
    assert "as many as its " in recovery["data"]["source"]
    assert f"of text.txt, {recovery['data']['source'].partition(', ')[2]}, seed 0" in out
    told = [f"{name}: {fact}" for name, fact in recovery_facts(recovery)]
    for line in (*told, "saved: small-recovered (", "next:"):
        assert line in out
    assert Path("page.html").read_text() == Path("small-recovered/report.html").read_text()

    old, new = weights("small"), weights("small-recovered")
    assert {n: (x.shape, x.dtype) for n, x in old.items()} == {
        n: (x.shape, x.dtype) for n, x in new.items()
    }
    assert not all(torch.equal(x, new[name]) for name, x in old.items())
    known, manifest = read("small/osscar.json"), read("small-recovered/osscar.json")
    assert manifest["stock"] == known["stock"]
    *earlier, seen_text = manifest["lineage"].pop("calibration")
    assert earlier == known["lineage"].pop("calibration")
    assert manifest["lineage"] == known["lineage"]
    assert seen_text["seen"] == recovery["data"]["seen"]
    shared = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all((Path("small-recovered") / n).read_bytes() == before[Path(n)] for n in shared)

    command = shlex.split(out.partition("next:\n")[2].splitlines()[0])
    assert command[1:3] == ["eval", "small-recovered"]
    evaluate = [*command[1:], "--windows", "2", "--seqlen", "32"]
    status, _, err = run(*[word.replace("FILE", "text.txt") for word in evaluate])
    assert status == 2
    assert "calibrated or recovered this model" in err
    Path("other.txt").write_text(TEXT.replace("the", "a"))  # much of it is as it was
    status, _, err = run(*[word.replace("FILE", "other.txt") for word in evaluate])
    assert status == 2
    assert "% of other.txt calibrated or recovered this model" in err
    Path("other.txt").write_text(" ".join(reversed(TEXT.split())))
    status, _, err = run(*[word.replace("FILE", "other.txt") for word in evaluate])
    assert status == 0, err
    assert "is not the dense model" not in err


def test_the_pruned_model_is_replaced_where_that_is_asked_for(run, small, tiny):
    recover = (
        "recover",
        "small",
        "--dense",
        tiny,
        "--text",
        CALIBRATION,
        "--samples",
        6,
        *TRAINING,
        "--out",
        "small",
    )
    before, old = contents(small), report(small)
    status, _, err = run(*recover)
    assert status == 2
    assert "a checkpoint is there; give another directory, or --overwrite" in err
    assert contents(small) == before
    status, _, err = run(*recover, "--overwrite")
    assert status == 0, err
    assert report(small)["before"] == old
    assert sorted(p.name for p in small.parent.iterdir()) == ["small", "text.txt"]


def test_where_nothing_was_better_the_model_is_as_it_came(run, small, tiny):
    (small / "osscar_report.json").unlink()
    asked = ("--text", CALIBRATION, "--samples", 6, *TRAINING, "--steps", 2, "--out", "new")
    asked = (*asked, "--learning-rate", 1)
    status, out, err = run("recover", "small", "--dense", tiny, *asked)
    assert status == 0, err
    assert "on 1 held-out sample; kept: the weights that it came with" in out
    document = report("new")
    assert (document["recovery"]["kept"], document["before"]) == (0, None)
    old, new = weights(small), weights("new")
    assert all(torch.equal(x, new[name]) for name, x in old.items())


# ---- what is refused ---------------------------------------------------------------------

BAD = [
    (["nothing"], "'nothing' is no directory with a checkpoint"),
    (["."], "'.' is no directory with a checkpoint"),
    (["~nobody/small"], "is no directory with a checkpoint"),
    (["small", "--out", "small/inner"], "lies in small, which stays as it is"),
    (["small", "--out", "small/.."], "in use"),
    (["small", "--out", "text.txt"], "is a file"),
    (["small", "--json", "small/x.json"], "which the command reads"),
    (["small", "--report", "small/report.html"], "which the command reads"),
    (["small", "--steps", "0"], "steps is 0"),
    (["small", "--loss", "mine"], "loss"),
    (["small", "--samples", "2", "--batch-size", "2"], "2 samples are too few"),
    (["small", "--batch-size", "2.7"], "--batch-size: '2.7' is not a whole number"),
    (["small", "--text", "missing.txt"], "missing.txt"),
    (["small", "--text", "short.txt"], "fewer than one window"),
    (["small", "--text", "text.txt", "--steps", "1000", "--batch-size", "500"], "too few"),
    (["small", "--seqlen", "0"], "not"),
    (["small", "--images", "text.txt"], "reads text, not images"),
    (["small", "--inputs", "text.txt"], "reads text, not images"),
    (["small", "--mean", "0.5", "--std", "1"], "reads text, not images"),
    (["small", "--dense", "demo"], "pruned from"),
    (["small", "--dense", "untrained"], "was not pruned from this OPTForCausalLM"),
    (["small", "--dense", "framed"], "other tokenizers"),
    (["small", "--dense", "small"], "small holds the same weights as small"),
    (["unpruned"], "holds the same weights as"),
]


@pytest.fixture(scope="module")
def crowded(pruned, tiny, tmp_path_factory):
    """A directory with what somebody could take for the dense model, or for text."""
    place = tmp_path_factory.mktemp("crowded")
    shutil.copytree(pruned, place / "small")
    (place / "text.txt").write_text(TEXT)
    (place / "short.txt").write_text("too short")
    loaded = osscar.load_model(tiny, device="cpu")
    torch.manual_seed(1)
    type(loaded.model)(loaded.model.config).save_pretrained(place / "untrained")
    loaded.tokenizer.save_pretrained(place / "untrained")
    for name in ("unpruned", "framed"):
        shutil.copytree(tiny, place / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (place / "framed" / file).unlink()
    framing_tokenizer().save_pretrained(place / "framed")
    return place


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    run, crowded, tiny, monkeypatch, arguments, message
):
    monkeypatch.chdir(crowded)
    before = contents(crowded)
    text = () if "--text" in arguments else ("--text", CALIBRATION)
    status, _, err = run("recover", "--dense", tiny, *TRAINING, *text, *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert message in " ".join(err.split())
    assert contents(crowded) == before


def test_what_trains_is_asked_for_before_a_model_is_read(run, crowded, tiny, monkeypatch):
    monkeypatch.chdir(crowded)
    monkeypatch.setattr("osscar.cli.recover.load_model", lambda *_, **__: pytest.fail("read"))
    status, _, err = run("recover", "small", "--dense", tiny)
    assert (status, "give --text, --images or --inputs, data like what small" in err) == (2, True)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": NaN}'])
def test_a_report_that_cannot_go_along_is_named(run, small, tiny, content):
    (small / "osscar_report.json").write_text(content)
    status, _, err = run("recover", "small", "--dense", tiny, "--text", CALIBRATION, *TRAINING)
    assert status == 2
    assert "osscar_report.json" in err


def test_options_are_the_fields_of_the_request():
    options = {one.name for one in dataclasses.fields(RecoverOptions)}
    assert options >= set(RecoveryRequest.__dataclass_fields__) - {"loss"}


# ---- that were ended ---------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "command", [("recover", "small", "--dense"), ("prune",)], ids=["recover", "prune"]
)
def test_a_run_that_was_ended_goes_on_to_the_same_weights(run, small, tiny, command, monkeypatch):
    def asked(out):
        if command[0] == "recover":
            return (*command, tiny, "--text", CALIBRATION, "--samples", 6, "--out", out, *TRAINING)
        more = ("--neurons", "0.25", "--recover", "--recover-steps", 4, "--out", out)
        return pruning(tiny, *map(str, more))

    status, _, err = run(*asked("whole"))
    assert status == 0, err
    keep = RecoveryLog.keep

    def ended(log, progress, tensors):
        keep(log, progress, tensors)
        if progress.points[-1].step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RecoveryLog, "keep", ended)
    status, _, err = run(*asked("out"))
    assert status == 130
    assert "2 steps are kept in" in err
    assert not Path("out").exists()
    assert Path("out.recover").exists()

    if command[0] == "recover":
        status, _, err = run(*asked("out"), "--mixed-precision", "bf16")
        assert status == 2
        assert "mixed-precision was None and is 'bf16'" in err
    taken = []

    def noted(log, progress, tensors):
        taken.append(progress.points[-1].step)
        keep(log, progress, tensors)

    monkeypatch.setattr(RecoveryLog, "keep", noted)
    status, _, err = run(*asked("out"))
    assert status == 0, err
    assert taken == [3, 4]
    whole, again = weights("whole"), weights("out")
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    assert not [p for p in Path().iterdir() if p.name.startswith("out.")]


def test_a_run_begins_anew_where_that_is_asked_for(run, small, tiny, monkeypatch):
    asked = ("recover", "small", "--dense", tiny, "--text", CALIBRATION, "--samples", 6, *TRAINING)

    def full(*given, **more):
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(osscar.cli.recover, "save", full)
        status, _, err = run(*asked)
    assert status == 2
    assert "the disk is full. 4 steps are kept in" in err
    assert Path("small-recovered.recover").exists()
    status, _, err = run(*asked, "--seed", 1)
    assert status == 2
    assert "holds another recovery" in err
    status, _, err = run(*asked, "--seed", 1, "--restart")
    assert status == 0, err
    assert not Path("small-recovered.recover").exists()


# ---- images, and anything else -----------------------------------------------------------

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 5, bias=False),
    )
    return net.eval(), torch.zeros(1, 3, 12, 12)
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["images", "inputs"])
def test_a_network_of_ones_own_is_recovered_on_samples_that_it_knows_again(
    run, kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    pixels = (40 * images(40) + 128).clamp(0, 255).numpy().astype(np.uint8)
    if kind == "images":
        np.savez("data.npz", images=pixels.transpose(0, 2, 3, 1), labels=np.arange(40) % 5)
    else:
        np.savez("data.npz", input=pixels.astype(np.float32) / 255)
    stated = ("--no-normalize",) if kind == "images" else ()
    calibrate = ("--calibration", "data.npz", "--samples", 8, *stated, "--device", "cpu")
    status, _, err = run("prune", "net.py:build", "--channels", 0.25, *calibrate, "--out", "small")
    assert status == 0, err
    rate = ("--learning-rate", 1e-4, "--device", "cpu")
    train = ("--dense", "net.py:build", "--steps", 4, *rate, f"--{kind}", "data.npz")
    status, out, err = run("recover", "small", *train)
    assert status == 0, err
    assert f"recovery: 40 {'image' if kind == 'images' else 'sample'}s of data.npz" in out
    recovery = report("small-recovered")["recovery"]
    assert recovery["after"] < recovery["before"]
    assert (recovery["samples"], recovery["held_out"]) == (35, 5)
    evaluate = ("eval", "small-recovered", "--dense", "net.py:build", f"--{kind}", "data.npz")
    status, _, err = run(*evaluate)
    assert status == 2
    assert "calibrated or recovered this model" in err
    status, _, err = run("recover", "small", "--dense", "demo", *train[2:], "--out", "other")
    assert status == 2
    assert "(--dense module:function" in " ".join(err.split())
    status, _, err = run("recover", "small", *train[:-2], "--out", "other")
    assert status == 2
    assert "nothing to train on: give --text, --images or --inputs" in err
    for more in (("--text", "net.py"), ("--seqlen", "8")):
        status, _, err = run("recover", "small", *train, *more, "--out", "other")
        assert status == 2
        assert "reads no text: omit --text and --seqlen" in err


# ---- in one run with the pruning ---------------------------------------------------------


def test_one_run_prunes_and_recovers_on_text_of_its_own(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    prune = pruning(tiny, "--neurons", "0.25", "--recover", "--recover-steps", "4")
    status, out, err = run(*prune, "--recover-text", "text.txt", "--out", "out", "--json", "p.json")
    assert status == 0, err
    said, document = read("p.json"), report("out")
    assert document == {key: value for key, value in said.items() if key != "saved"}
    assert undescribed(said) == set()
    recovery = document["recovery"]
    assert recovery["settings"]["steps"] == 4
    assert recovery["after"] < recovery["before"]
    assert recovery["data"]["source"].startswith("text.txt")
    assert all(f"{name}: {fact}" in out for name, fact in recovery_facts(recovery))
    assert ", before the recovery" in out
    page = Path("out/report.html").read_text()
    assert "pruned and recovered" in page
    calibration = read("out/osscar.json")["lineage"]["calibration"]
    assert [one["source"][:8] for one in calibration] == ["calibrat", "text.txt"]
    model = osscar.load("out")
    assert sum(p.numel() for p in model.parameters()) == document["parameters_after"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recover-steps", "3"), "--recover-steps is 3 without --recover; give"),
        (("--recover-text", "text.txt"), "--recover-text is 'text.txt' without --recover"),
        (("--recover", "--max-memory", "1GB"), "--recover needs the weights in memory"),
        (("--recover", "--recover-text", "missing.txt"), "missing.txt"),
        (
            ("--recover", "--recover-text", "text.txt", "--json", "text.txt"),
            "would write to text.txt",
        ),
        (("--recover", "--samples", "1"), "1 sample is too few"),
        (
            ("--recover", "--recover-text", "text.txt", "--max-divergence", "0.1"),
            "--recover-text may hold samples that measure",
        ),
    ],
)
def test_a_recovery_that_cannot_be_is_refused_before_anything_is_pruned(
    run, small, tiny, more, message, monkeypatch
):
    before = contents(small.parent)
    status, _, err = run(*pruning(tiny, "--neurons", "0.5", "--out", "out"), *more)
    assert status == 2
    assert message in " ".join(err.split())
    assert contents(small.parent) == before


def test_an_estimate_says_that_no_recovery_is_in_it(run, tiny):
    status, out, err = run(*pruning(tiny, "--neurons", "0.5", "--dry-run", "--recover"))
    assert status == 0, err
    assert "recovery: comes on top, and is not estimated" in out


# ---- data and pages ----------------------------------------------------------------------


def test_windows_that_may_not_overlap_share_no_token(tiny):
    tokenizer = osscar.load_model("demo", device="cpu").tokenizer
    words = " ".join(f"w{number}" for number in range(400))
    tokens = len(tokenizer(words)["input_ids"])
    given = {"seqlen": 32, "seed": 0}
    few = load_calibration([words], tokenizer, samples=4, overlapping=False, **given)
    same = load_calibration([words], tokenizer, samples=4, **given)
    assert torch.equal(few.tokens, same.tokens)
    assert few.source == "a list"
    many = load_calibration([words], tokenizer, samples=1000, overlapping=False, **given)
    assert many.samples == tokens // 32
    assert many.source == f"a list, as many as its {tokens:,} tokens have room for"
    text = tokenizer(words, return_tensors="pt")["input_ids"][0]
    starts = [int((text.unfold(0, 32, 1) == one).all(1).nonzero()[0]) for one in many.tokens]
    assert all(b - a >= 32 for a, b in pairwise(starts))


BF16 = {"mixed_precision": "bf16"}
POINTS = [
    {"step": 0, "rate": 1e-3, "loss": None, "held_out": 0.4, "seconds": 0.0},
    {"step": 2, "rate": 1e-3, "loss": 0.5, "held_out": 0.2, "seconds": 1.0},
    {"step": 4, "rate": 1e-3, "loss": None, "held_out": None, "seconds": 2.0},
    {"step": 6, "rate": 1e-4, "loss": 0.5, "held_out": 0.3, "seconds": 2.0},
]


def document(**changed):
    recovery = {
        "settings": {"steps": 16, "lora": None, "learning_rate": None, "seed": 0},
        "chosen": {"lora": None, "micro_batch_size": 4, "augment": "none", **BF16},
        "data": {"source": "<b>text</b>.txt", "seen": {"count": 2, "least": ""}},
        **{"measure": "nats", "points": POINTS, "kept": 2, "before": 0.4, "after": 0.2},
        **{"learning_rate": 1e-4, "samples": 9, "held_out": 2, "trained": 1234, "seconds": 2.5},
        "stages": {"recovery: training": 2.0, "other": 0.5},
    }
    computed = {"dtype": "float32", "device": "cpu"}
    return {
        **{"model": "small", "dense": "large", "computed": computed, "parameters": 9876},
        "own_code": False,
        **{"recovery": {**recovery, **changed}, "before": None},
    }


@pytest.mark.usefixtures("drawn")
def test_the_page_shows_the_curve_and_fits(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(recover_page(document()), encoding="utf-8")
    for shown in seen_at(page, PHONE, DESK):
        assert shown["overflow"] <= 0
        assert not shown["scripts"]
        assert not shown["fetched"]
        assert [name for name, *_ in shown["pictures"]] == ["recovery"]
        text = shown["text"]
        for expected in (
            *("small, recovered", "9876", "not finite", "<b>text</b>.txt"),
            "0.4000 nats a prediction from the dense model became 0.2000 on 2 held-out samples",
            "kept: step 2",
            "1,234 weights on 9 samples",
            "matrix products in bfloat16",
            "learning rate\t0.001, lowered to 0.0001 as the held-out loss rose",
            "after 6 of 16 steps, as the held-out loss rose again and again",
            *("steps\t16\tasked", "seed\t0\tby default", "micro batch size\t4\tchosen"),
            *("augment\tnone\tchosen", "data: source\t<b>text</b>.txt\tdata"),
        ):
            assert expected in text
        assert "flip-shift" not in text


def test_what_a_recovery_came_to_is_told_as_it_was():
    unit = "of the squared dense outputs"
    nothing = document(kept=0, after=0.4, measure="relative", points=POINTS[:2])["recovery"]
    told = dict(recovery_facts(nothing))
    assert told["recovered"] == (
        f"0.4000 {unit} from the dense model became 0.4000 on 2 held-out samples; kept: the "
        "weights that it came with; 2.5 s"
    )
    assert told["stopped"] == "after 2 of 16 steps, as the held-out loss rose again and again"
    chosen = {"lora": 4, "mixed_precision": "no"}
    given = document(settings={"steps": 2}, chosen=chosen)["recovery"]
    _, *facts = recovery_facts({**given, "points": POINTS[:2]})
    products = "matrix products in the format of the weights"
    assert facts == [
        ("training", f"1,234 weights (adapters, rank 4) on 9 samples, {products}"),
        ("learning rate", "0.001"),
    ]
    assert [row[-1] for row in recovery_table(given).rows] == ["", "yes", "", ""]
    close = [{**POINTS[1], "held_out": one} for one in (0.003512, 0.00349, 0.0034897, 3.49e-7, 0.0)]
    held = [row[2] for row in recovery_table({**given, "points": close}).rows]
    assert held == ["0.003512", "0.003490", "0.003490", "3.490e-07", "0.000"]
