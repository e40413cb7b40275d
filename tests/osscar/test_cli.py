"""The commands as a person runs them: what they print, write and refuse."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import osscar
import osscar.checkpoint.directory
from benchmarks.prose import Split, builtin_text
from osscar.base.printable import engineering
from osscar.cli import main
from osscar.models.names import DEMO_DIRECTORY
from osscar.proof.lineage import note, weights_digest
from osscar.recovery.request import RecoveryRequest
from osscar.request import PruningRequest
from osscar.run.points import SweepDirectory
from osscar.run.prune_page import run_facts
from osscar.run.run_log import RunLog
from osscar.study.directory import Study
from tests.osscar.families import HELD_OUT, framing_tokenizer, tiny

PROSE = "the quick brown fox jumps over the lazy dog and runs back again before night falls. " * 200


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(PROSE)
    return file


def small_prune(text, out, *more):
    return (
        *("prune", "demo", "--out", out, "--calibration", text, "--samples", 6, "--seqlen", 64),
        *("--backend", "magnitude", "--device", "cpu", *more),
    )


def test_demo_does_the_whole_job(run, tmp_path, monkeypatch):
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    for place in (work, temporary):
        place.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (work / "some.txt").write_text(HELD_OUT.read_text()[:3000])
    monkeypatch.setattr("osscar.models.loaded.DEMO_HELD_OUT", work / "some.txt")
    monkeypatch.setattr("osscar.cli.demo._SAMPLES", 32)
    monkeypatch.setattr("osscar.cli.demo._SEQLEN", 128)
    # Nothing falls where it was not asked to, and a demo that fails leaves nothing at all.
    assert run("demo", "--backend", "no such backend")[0] == 2
    assert list(temporary.iterdir()) == []
    status, out, err = run("demo", "--backend", "greedy", "--json", "demo.json")
    assert status == 0, err
    assert {file.name for file in work.iterdir()} == {"demo.json", "some.txt"}
    (place,) = temporary.glob("*/smaller")
    for expected in ("perplexity", "tokens/s", "Loss by layer", "next:", "dead"):
        assert expected in out
    assert f"saved: {place} (" in out
    document = json.loads((work / "demo.json").read_text())
    assert document["schema"] == "osscar.prune/5"
    assert document["settings"]["sparsity"] == 0.5
    # Of a model that does well nobody hears what refits could have done.
    assert not any(word in out + err for word in ("unrefitted", "growth", "held out,", "grew"))
    assert {tuple(layer["unrefitted"]) for layer in document["layers"]} == {()}
    assert all(1 < layer["growth"] < 50 and layer["held"] == 512 for layer in document["layers"])
    dense, pruned = document["evaluation"]["dense"], document["evaluation"]["model"]
    assert pruned["footprint"]["parameters"] < dense["footprint"]["parameters"]
    assert dense["quality"]["perplexity"] < pruned["quality"]["perplexity"] < 200
    model = osscar.load(place)
    assert sum(p.numel() for p in model.parameters()) == document["parameters_after"]
    monkeypatch.setattr("osscar.cli.demo.load_model", _interrupted)
    assert run("demo", "--out", place)[0] == 2
    assert run("demo", "--out", place, "--overwrite")[0] == 130


def _interrupted(*_, **__):
    raise KeyboardInterrupt


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints(run, tmp_path):
    _, _, shown = (Path(__file__).parents[2] / "README.md").read_text().partition("```\npruned the")
    shown = f"pruned the{shown.partition(chr(10) + '...')[0]}".splitlines()
    status, out, err = run("demo", "--out", tmp_path / "smaller")
    assert status == 0, err
    printed = [line.rstrip() for line in out.splitlines()][: len(shown)]
    # Tests prove for inputs of one size alone, and README.md shows a proof for any.
    of_this_machine = ("prefill", "decode", "peak memory", "proved:", "saved:", "time:")
    for line, ours in zip(shown, printed, strict=True):
        if line.strip().startswith(of_this_machine):
            assert ours.split()[0] == line.split()[0]
            continue
        line, ours = (re.sub(r"(optimal +)\d+\.\d\d", r"\1", one) for one in (line, ours))
        assert NUMBER.sub("#", line).split() == NUMBER.sub("#", ours).split()
        numbers = ([float(n.replace(",", "")) for n in NUMBER.findall(x)] for x in (line, ours))
        of_readme = next(numbers)
        # The last of two digits may be rounded up on one processor, and down on another.
        last = [10.0 ** -len(n.partition(".")[2]) for n in NUMBER.findall(line)]
        for due, found, step in zip(of_readme, next(numbers), last, strict=True):
            assert found == pytest.approx(due, rel=0.02, abs=1.01 * step if step < 1e-3 else 0)


def test_prune_then_eval_then_inspect(run, text, tmp_path):
    out_dir = tmp_path / "small"
    began = time.perf_counter()
    status, out, err = run(
        *small_prune(text, out_dir, "--neurons", "0.5", "--json", tmp_path / "p")
    )
    assert status == 0, err
    took = float(re.search(r"^took ([\d.]+) s \(", out, re.MULTILINE)[1])
    assert "320 of 640" in out
    assert "from_pretrained of transformers" in out
    report = json.loads((out_dir / "osscar_report.json").read_text())
    printed = json.loads((tmp_path / "p").read_text())
    assert report == {key: value for key, value in printed.items() if key != "saved"}
    assert report["seconds"] < took <= time.perf_counter() - began + 0.1
    before, after = (engineering(report[f"parameters_{one}"]) for one in ("before", "after"))
    assert f"keeps {after} of {before} parameters, removes " in out
    assert report["settings"]["neurons"] == "0.5"
    assert len(report["layers"]) == 4
    assert report["forward"]["pruned"]["flops"] < report["forward"]["dense"]["flops"]
    for file in (*out_dir.glob("*.json"), out_dir / "report.html", out_dir / "README.md"):
        assert str(tmp_path) not in file.read_text()

    other = tmp_path / "other.txt"
    other.write_text(PROSE.replace("fox", "cat"))
    evaluate = ("eval", out_dir, "--windows", 2, "--seqlen", 64, "--dense", "demo")
    status, out, err = run(*evaluate, "--text", other, "--json", tmp_path / "e")
    assert status == 0, err
    document = json.loads((tmp_path / "e").read_text())
    assert document["schema"] == "osscar.eval/3"
    assert document["ratios"]["parameters"] < 1
    assert document["model"]["quality"]["windows"] == 2

    status, out, err = run(*evaluate, "--text", text)
    assert status == 2
    assert "calibrated or recovered this model" in err

    status, out, err = run(
        "inspect", out_dir, "--svg", tmp_path / "g.svg", "--json", tmp_path / "i"
    )
    assert status == 0, err
    assert "320" in out
    assert "frozen: hidden" in out
    assert (tmp_path / "g.svg").read_bytes() == b"a picture"
    told = json.loads((tmp_path / "i").read_text())
    groups = told["groups"]
    reached = f"a budget reaches {told['prunable_parameters'] / told['parameters']:.1%} of "
    assert reached in " ".join(out.split())
    assert told["residual_parameters"] == 0
    assert sum(not g["frozen"] for g in groups) == 8


def test_no_figure_of_a_report_loses_a_run(run, text, tmp_path, monkeypatch):
    """A model is saved before it is measured, whatever becomes of that."""
    out_dir, copy = tmp_path / "small", tmp_path / "copy.json"
    asked = small_prune(text, out_dir, "--neurons", "0.5", "--json", copy)
    monkeypatch.setattr("osscar.run.result.measure_forward", _interrupted)
    assert run(*asked)[0] == 130
    saved = (out_dir / "model.safetensors").read_bytes()
    assert "milliseconds on" not in (out_dir / "README.md").read_text()
    assert not copy.exists()

    def fails(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("osscar.run.result.measure_forward", fails)
    status, out, err = run(*asked)
    assert (status, "before this run began" in out) == (0, True), err
    said = "a forward pass of both models (RuntimeError: no kernel)"
    report = json.loads((out_dir / "osscar_report.json").read_text())
    assert report["unmeasured"] == said
    assert dict(run_facts(report))["not measured"] == said
    assert report.items() <= json.loads(copy.read_text()).items()
    assert said in (out_dir / "report.html").read_text()
    assert (out_dir / "model.safetensors").read_bytes() == saved


@pytest.mark.parametrize(
    ("command", "stops", "at", "said"),
    [
        ("prune", RunLog.append, 0, None),
        ("prune", RunLog.append, 1, "1 group is done and kept in {}; AGAIN to go on"),
        (
            *("restart", RunLog.append, 2),
            "2 groups are done and kept in {}; AGAIN without --restart to go on",
        ),
        ("sweep", SweepDirectory.keep, 0, None),
        ("sweep", SweepDirectory.keep, 1, "1 point is kept in {}; AGAIN to go on"),
        ("gap", Study.run, 0, "1 problem and 0 answers are kept in {}; AGAIN to go on"),
        ("gap", Study.capture, 0, None),
    ],
)
def test_an_interrupt_says_what_is_kept(run, text, tmp_path, monkeypatch, command, stops, at, said):
    place, calls = tmp_path / "out", []

    def stopped(*arguments, **more):
        calls.append(arguments)
        if len(calls) > at:
            raise KeyboardInterrupt
        return stops(*arguments, **more)

    owner = {"RunLog": RunLog, "SweepDirectory": SweepDirectory, "Study": Study}
    name, _, method = stops.__qualname__.partition(".")
    monkeypatch.setattr(owner[name], method, stopped)
    small = small_prune(text, place, "--neurons", "0.5")
    windows = ("--windows", 1, "--seqlen", 32, "--samples", 6)
    uniform = ("--allocation", "uniform", "--backend", "magnitude")
    asked = {
        "prune": small,
        "restart": (*small, "--restart"),
        "sweep": ("sweep", "demo", "--out", place, "--sparsity", "0.3", *uniform, *windows),
        "gap": ("gap", "demo", "--out", place, "--groups", "*.0.*heads", *windows),
    }
    status, _, err = run(*asked[command])
    kept = place.with_name("out.run") if command in ("prune", "restart") else place
    expected = said or "nothing was done that could be kept; AGAIN to begin anew"
    expected = expected.format(kept).replace("AGAIN", "give the same command again")
    assert (status, err.splitlines()[-1]) == (130, f"interrupted: {expected}")
    assert kept.exists() == (said is not None)


def test_what_text_results_rest_on_is_printed_and_kept(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr("osscar.base.timing.WORTHWHILE_SECONDS", 0.0)
    dense, small = tmp_path / "dense", tmp_path / "small"
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=2))
    model.half().save_pretrained(dense)
    framing_tokenizer().save_pretrained(dense)
    other = tmp_path / "other.txt"
    other.write_text(PROSE.replace("fox", "cat"))
    arguments = ["--neurons", "0.5", "--backend", "magnitude", "--samples", "2", "--seqlen", "64"]
    status, out, err = run("prune", dense, *arguments, "--calibration", text, "--out", small)
    assert status == 0, err
    assert (
        f"calibration: 2 windows of 64 tokens of {text}, seed 0, each begins with <s> and ends "
        "with </s>; float32 on cpu (stored as float16), sdpa attention"
    ) in out
    report = json.loads((small / "osscar_report.json").read_text())
    assert (report["calibration"]["begins_with"], report["calibration"]["seed"]) == ("<s>", 0)
    how = {"dtype": "float32", "stored_dtype": "float16", "device": "cpu", "attention": "sdpa"}
    assert report["computed"] == how

    evaluate = ["eval", small, "--text", other, "--windows", "2", "--seqlen", "32"]
    evaluate += ["--json", tmp_path / "e.json"]
    status, out, err = run(*evaluate, "--dense", dense)
    assert status == 0, err
    assert (
        f"62 tokens of {other} scored in 2 windows of 32, each begins with <s>; float32 on" in out
    )
    document = json.loads((tmp_path / "e.json").read_text())
    assert (document["computed"], document["model"]["quality"]["special_tokens"]) == (how, 1)

    status, _, err = run(*evaluate, "--dense", "demo")
    assert status == 2
    assert "the two models have other tokenizers" in err


def saved_by_transformers(place, model):
    """A directory with a model and the tokenizer of the demo, without osscar.json."""
    model.save_pretrained(place)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, place / file)
    return place


@pytest.mark.slow
def test_every_command_reads_what_transformers_saved(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr("osscar.base.timing.WORTHWHILE_SECONDS", 0.0)
    status, _, err = run(*small_prune(text, tmp_path / "small", "--heads", "0.5"))
    assert status == 0, err
    tuned = saved_by_transformers(tmp_path / "tuned", osscar.load(tmp_path / "small"))
    again, other = tmp_path / "again", tmp_path / "other.txt"
    other.write_text(builtin_text(Split.TRAINING)[:5000])
    scored = ("--windows", 2, "--seqlen", 32)
    steps = ("--steps", 2, "--batch-size", 2, "--learning-rate", "1e-3")
    for command in (
        ("inspect", tuned),
        ("eval", tuned, *scored, "--text", text),  # what it has seen is not known
        ("prune", tuned, *small_prune(text, again, "--neurons", "0.5")[2:]),
        ("recover", tuned, "--dense", "demo", "--text", other, "--seqlen", 32, *steps),
    ):
        status, _, err = run(*command)
        assert status == 0, err
        assert f"warning: {tuned} has no osscar.json" in err
    status, _, err = run("export", tuned)
    assert status == 2
    assert "error: llama.cpp cannot run the model: it is a OPTForCausalLM" in err
    lineage = json.loads((again / "osscar.json").read_text())["lineage"]
    assert lineage["source"] == f"directory {tuned.name}, pruned on data that are not known"
    status, _, err = run("eval", again, *scored, "--text", text)
    assert status == 2
    assert "calibrated or recovered this model" in err


def test_a_command_takes_the_options_that_its_errors_advise(run, text, tmp_path):
    other = osscar.load_model("demo", device="cpu").model
    plan = osscar.prune(other, torch.arange(128).view(2, 64), heads=4, backend="magnitude").plan
    osscar.slice_units(other, plan)
    shapes = saved_by_transformers(tmp_path / "shapes", other)
    code = saved_by_transformers(tmp_path / "code", tiny("gpt2"))
    config = json.loads((code / "config.json").read_text())
    brought = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    changed = {**config, "model_type": "foreign", "auto_map": brought}
    (code / "config.json").write_text(json.dumps(changed))
    own = osscar.save(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "own").path
    named = {"code": "brings", "shapes": "other shapes|do not fit its config", "own": "own code"}
    for command, more in (
        *(("inspect", ()), ("export", ()), ("eval", ()), ("prune", ("--neurons", "0.5"))),
        *(
            ("sweep", ("--sparsity", "0.3")),
            ("gap", ()),
            ("recover", ("--dense", "demo", "--text", text)),
        ),
    ):
        out = () if command in ("inspect", "eval") else ("--out", tmp_path / "out")
        for directory in (shapes, code, own):
            status, _, err = run(command, directory, *more, *out)
            assert status == 2, (command, directory)
            assert re.search(named[directory.name], err) or command in ("export", "sweep"), err


def test_backends_lists_all_with_their_kind(run, tmp_path):
    status, out, _ = run("backends", "--json", tmp_path / "b.json")
    assert status == 0
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["backends"]}
    assert {"random", "magnitude", "wanda", "greedy", "multistage", "local_search"} < rows.keys()
    assert rows["enumerate"]["kind"] == "exact"
    assert rows["enumerate"]["capabilities"]["max_units"] == 16
    experts = {
        row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())["expert_backends"]
    }
    assert {"reap", "frequency", "local_search", "enumerate"} <= experts.keys()
    assert all(name in out for name in (*rows, *experts))


def test_certify_shows_gaps_and_what_proofs_rest_on(run, text, tmp_path):
    chosen = ("--backend", "local_search", "--json", tmp_path / "a.json")
    status, out, err = run(
        *small_prune(text, tmp_path / "a", "--heads", "0.5", "--certify"), *chosen
    )
    assert status == 0, err
    assert "gap" in out
    assert "trust_remote_code" in out
    layers = json.loads((tmp_path / "a.json").read_text())["layers"]
    assert all(layer["gap"] is not None for layer in layers)
    proved = sum(layer["proved_optimal"] for layer in layers)
    assert proved > 0
    said = f"proved optimal: {proved} of {len(layers)} choices"
    assert f"{said}; every proof was recomputed from its problem alone" in " ".join(out.split())


BAD = [
    (["--sparsity", "0"], "sparsity is 0"),
    (["--sparsity", "0.999"], "cannot be met"),
    (["--neurons", "641"], "cannot keep 641 units"),
    (["--neurons", "1" * 5000], "neurons is '1111"),
    (["--samples", "1000000", "--seqlen", "1" * 400, "--neurons", "0.5"], "one window of 1111"),
    (["--neurons", "0.5", "--backend", "magic"], "there is no backend 'magic'"),
    (["--neurons", "0.5", "--option", "stages=3"], "has no option stages"),
    (["--neurons", "0.5", "--option", "stages"], "is not NAME=VALUE"),
    (["--neurons", "0.5", "--batch-size", "0"], "batch-size is 0"),
    (["--neurons", "0.5", "--samples", "0"], "at least 1, not 0"),
    (["--neurons", "0.5", "--seqlen", "100000"], "100000"),
    (["--neurons", "0.5", "--seqlen", "513"], "the model takes 512"),
    (["--neurons", "0.5", "--option", "seed=NaN"], "cannot be NaN"),
    (["--neurons", "0.5", "--option", "seed=" + "[" * 100_000], "is nested too deeply"),
    (["--neurons", "0.5", "--out", os.fsdecode(b"small\xff")], "is not UTF-8"),
    (["--neurons", "0.5", "--json", os.fsdecode(b"x\xff")], "is not UTF-8"),
    (["--neurons", "0.5", "--device", "meta"], "cannot run on 'meta'"),
    (["--neurons", "0.5", "--calibration", "~no-such-user/x.txt"], "~no-such-user"),
    (["--neurons", "0.5", "--calibration", ""], "cannot read ''"),
    (["--neurons", "0.5", "--out", "~no-such-user/x"], "~no-such-user"),
    (["--neurons", "0.5", "--out", "x" * 300], "File name too long"),
    (["--neurons", "0.5", "--calibration", "missing.txt"], "missing.txt"),
    (["--neurons", "0.5", "--device", "tpu"], "tpu"),
    (["--neurons", "0.5", "--dtype", "int8"], "int8"),
    (["--neurons", "0.5", "--json", "/nowhere/x.json"], "/nowhere/x.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(run, text, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*small_prune(text, tmp_path / "small", *arguments))
    assert status == 2
    assert err.startswith("error: ")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    told = ("calibration: ", "dense model: perplexity", "keeps ")
    assert all(line.startswith(told) for line in out.splitlines()), out
    assert sorted(tmp_path.rglob("*")) == before


def test_links_to_nothing_are_refused_before_any_work(run, text, tmp_path):
    """What they lead to was made: a directory that nobody had named."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    link = tmp_path / "link"
    prune = small_prune(text, tmp_path / "small", "--neurons", "0.5")
    for command in (
        (*prune, "--out", link),
        (*prune, "--out", link / "small"),
        (*prune, "--json", link),
        (*prune, "--report", link),
        ("sweep", "demo", "--sparsity", "0.5", "--out", link),
        ("gap", "demo", "--out", link),
        ("demo", "--out", link),
    ):
        status, out, err = run(*command)
        assert (status, out) == (2, "")
        assert "is a link to " in err
        assert sorted(tmp_path.iterdir()) == [link, text]


def next_command(out: str, placeholder: str, given: object) -> list[str]:
    """The words of the command that a run prints, with what it leaves open."""
    line = out.partition("next:\n")[2].splitlines()[0]
    words = [str(given) if word == placeholder else word for word in shlex.split(line)]
    assert words[0] == "osscar"
    return words[1:]


def test_the_dense_model_is_scored_and_the_command_that_is_printed_can_be_given(
    run, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "an other text.txt"
    other.write_text(PROSE.replace("fox", "cat")[:400])
    small = small_prune(text, "a $small model", "--neurons", "0.5", "--dtype", "float32")
    status, out, err = run(*small)
    assert status == 0, err
    said = re.search(
        r"\ndense model: perplexity ([\d.]+) on 4 calibration windows of 64 tokens\n", out
    )
    assert said
    assert "chance" not in err
    dense = json.loads(Path("a $small model/osscar_report.json").read_text())["dense"]
    assert (f"{dense['value']:.1f}", dense["near_chance"]) == (said[1], False)
    assert f"perplexity {said[1]}" in Path("a $small model/report.html").read_text()
    for told in ("saved: a $small model (", "report: a $small model/report.html\n"):
        assert told in out  # as it was given
    command = next_command(out, "FILE", other)
    assert command[:2] == ["eval", "a $small model"]
    assert {"--seqlen", "--dtype", "--device"} < set(command)
    status, out, err = run(*command, "--json", "e.json")
    assert status == 0, err
    assert "warning" not in err
    document = json.loads(Path("e.json").read_text())
    assert document["dense_name"] == "demo"
    assert document["model"]["quality"]["seqlen"] == 64

    command[command.index("demo")] = untrained_demo(tmp_path / "untrained")
    status, _, err = run(*command)
    assert status == 0, err
    assert "is not the dense model that this one was pruned from" in err
    # A model that nobody trained is next to guessing, and says so before it is pruned.
    arguments = ("prune", "untrained", *small_prune(text, "b", "--neurons", "641")[2:])
    status, _, err = run(*arguments)
    assert status == 2
    assert "warning: the dense model does no better than chance" in err
    assert "cannot keep 641" in err


def untrained_demo(directory):
    loaded = osscar.load_model("demo", device="cpu")
    model = type(loaded.model)(loaded.model.config)
    model.save_pretrained(directory)
    loaded.tokenizer.save_pretrained(directory)
    return directory


def test_weights_are_told_from_others_in_any_format():
    exact, rounded = (osscar.load_model("demo", dtype=d, device="cpu").model
                      for d in ("float32", "bfloat16"))  # fmt: skip
    known = weights_digest(exact)
    assert len(known) == 16
    assert weights_digest(rounded) == ""  # which may be those of many models
    note(rounded, stored_dtype="bfloat16")
    assert weights_digest(rounded) == weights_digest(rounded.float()) != known
    for name in ("lm_head.weight", "model.decoder.layers.1.fc1.bias"):
        with torch.no_grad():
            number = exact.get_parameter(name).view(-1)[33]
            before = number.clone()
            number.copy_(torch.nextafter(before, before + 1))
        assert weights_digest(exact) != known  # of all of its numbers
        with torch.no_grad():
            number.copy_(before)
    assert weights_digest(exact) == known
    exact.double()
    note(exact, stored_dtype="float64")
    finer = weights_digest(exact)
    with torch.no_grad():
        exact.lm_head.weight.view(-1)[33] *= 1 + 1e-15
    assert weights_digest(exact) != finer
    assert weights_digest(exact.float()) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"too short", "tokens"), (b"\0\1\2", "binary")],
)
def test_calibration_text_that_cannot_serve_is_refused(run, tmp_path, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    status, _, err = run(*small_prune(file, tmp_path / "small", "--neurons", "0.5"))
    assert status == 2
    assert message in err
    assert not (tmp_path / "small").exists()


def test_a_full_directory_is_refused_before_any_work(run, text, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "precious").write_text("keep me")
    arguments = small_prune(text, tmp_path / "small", "--neurons", "0.5")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "not empty" in err
    status, _, err = run(*arguments, "--overwrite")
    assert status == 2
    assert "something other than a checkpoint" in err
    assert (tmp_path / "small" / "precious").read_text() == "keep me"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "small" / name).write_text("{}")
    status, _, err = run(*arguments, "--overwrite")
    assert (status, "would be lost: precious" in err) == (2, True)
    assert (tmp_path / "small" / "precious").read_text() == "keep me"
    (tmp_path / "small" / "precious").unlink()
    status, _, err = run(*arguments, "--overwrite")
    assert status == 0, err


def test_what_the_run_needs_is_never_replaced(run, text, tmp_path, monkeypatch):
    checkpoint = tmp_path / "project" / "model"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint.parent / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for place in (checkpoint, checkpoint.parent, tmp_path):
        arguments = list(small_prune(text, place, "--neurons", "0.5", "--overwrite"))
        arguments[1] = checkpoint
        status, _, err = run(*arguments)
        assert status == 2
        assert "is in use" in err
    same = small_prune(text, tmp_path / "new", "--neurons", "0.5", "--json", tmp_path / "new")
    assert run(*same)[0] == 2


def test_options_reach_the_backend_and_what_they_made_is_not_taken_for_a_demo(run, text, tmp_path):
    arguments = small_prune(text, tmp_path / "mine", "--neurons", "0.5", "--option", "seed=7")
    status, _, err = run(*arguments, "--backend", "random", "--json", tmp_path / "a.json")
    assert status == 0, err
    settings = json.loads((tmp_path / "a.json").read_text())["settings"]
    assert settings["backend_options"] == {"seed": 7}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("keep me")
    for place, why in (
        ("mine", "a checkpoint is there; give another directory, or --overwrite"),
        ("other", "not empty"),
        ("x" * 300, "File name too long"),
    ):
        status, _, err = run("demo", "--out", tmp_path / place)
        assert (status, err.count("\n")) == (2, 1)
        assert why in err


def test_json_goes_through_links_and_into_pipes(run, tmp_path):
    (tmp_path / ".b.json.partial").mkdir()  # what another process may be writing
    assert run("backends", "--json", tmp_path / "b.json")[0] == 0
    status, _, err = run("backends", "--json", tmp_path / ("x" * 250))
    assert (status, "File name too long" in err) == (2, True)
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("real.json")
    assert run("backends", "--json", tmp_path / "link.json")[0] == 0
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text())["schema"] == "osscar.backends/1"
    assert run("backends", "--json", "/dev/null")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prun", "demo"), "prune"),
        (("prune", "--out", "small"), "MODEL"),
        (("eval", "no-such-directory/at-all/here"), "no-such-directory"),
        (("inspect", "no-such-directory/at-all/here"), "no-such-directory"),
        (("eval", "demo", "--batch-size", 0, "--windows", 1), "must be at least 1, not 0"),
        (("prune", "demo", "--sparsty", 0.3, "--out", "small"), "--sparsty.*--sparsity"),
        (("prune", "demo", "--samples", "1e9", "--out", "small"), "--samples.*1e9"),
        (("prune", "demo", "--batch-size", "2.7", "--out", "small"), "'2.7' is not a whole number"),
        (("gap", "demo", "--out", "study", "--jobs", 0), "--jobs. must be at least 1, not 0"),
        (("prune", "demo", "more", "--out", "small"), "unexpected argument 'more'; --help"),
    ],
)
def test_what_no_command_takes_is_refused_in_one_line(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, _, message = run(*arguments)
    assert status == 2
    assert re.match(rf"error: .*{words}", message)
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_finite_is_refused_by_name(run, text, tmp_path):
    model = tiny("opt")
    model.model.decoder.layers[0].fc2.weight.data[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "broken")
    osscar.load_model("demo").tokenizer.save_pretrained(tmp_path / "broken")
    arguments = list(small_prune(text, tmp_path / "small", "--neurons", "0.5"))
    arguments[1] = tmp_path / "broken"
    status, _, err = run(*arguments)
    assert status == 2
    assert "fc2.weight" in err
    assert not (tmp_path / "small").exists()


HOSTILE = "a\x1b]0;owned\x07\x1b[31m\n[/red][bold]\u202e:smile:"
"""Sets a terminal's title and colour, starts a line of its own, and is markup."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("command", ["inspect", "eval", "prune"])
def test_names_are_shown_as_they_are_and_do_nothing(run, text, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_DIRECTORY, HOSTILE)
    arguments = {
        "inspect": (HOSTILE,),
        "eval": (HOSTILE, "--text", text, "--windows", 1, "--seqlen", 32, "--dense", HOSTILE),
        "prune": small_prune(text, HOSTILE + "out", "--neurons", "0.5")[1:],
    }[command]
    status, out, err = run(command, *arguments)
    assert status == 0, err
    missing = run(command, HOSTILE + "\udc80/no", *arguments[1:])
    assert missing[0] == 2
    assert missing[2].count("\n") == 1
    for shown in (out, err, *missing[1:]):
        assert all(c.isprintable() or c == "\n" for c in shown)
    assert r"a\x1b]0;owned\x07\x1b[31m" in missing[2]
    if command != "inspect":
        assert all(part in out for part in (r"red][bold]\u202e:", "smile:"))  # a table may wrap it


def test_a_console_that_knows_no_unicode_is_written_to(monkeypatch):
    said = {}
    for arguments in (["backends"], ["inspect", "na\u00efve/\u672c/model"]):
        monkeypatch.setattr("sys.argv", ["osscar", *arguments])
        for name in ("stdout", "stderr"):
            said[name] = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
            monkeypatch.setattr(sys, name, said[name])
        with pytest.raises(SystemExit):
            main()
        out, err = (_written(said[name]) for name in ("stdout", "stderr"))
        assert b"magnitude" in out if arguments == ["backends"] else rb"na\xefve/\u672c" in err


def _written(stream):
    stream.flush()
    return stream.buffer.getvalue()


@pytest.mark.parametrize("place", ["pipe.txt", "pipe", "/dev/zero"])
def test_what_never_ends_is_not_read(run, text, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe.txt", "pipe"):
        os.mkfifo(name)
    Path("model").mkdir()
    os.mkfifo("model/config.json")
    status, _, err = run(*small_prune(place, tmp_path / "small", "--neurons", "0.5"))
    assert (status, "is a pipe or a device" in err) == (2, True)
    status, _, err = run("eval", "demo", "--text", place)
    assert (status, "is a pipe or a device" in err) == (2, True)
    assert run("eval", "model")[0] == 2
    os.mkfifo("p.safetensors")
    os.mkfifo("w.pt")
    for arguments in (
        ("solve", "p.safetensors"),
        ("gap", "p.safetensors", "--out", "study"),
        ("eval", "torchvision:resnet18", "--images", ".", "--weights", "w.pt"),
    ):
        status, _, err = run(*arguments)
        assert (status, "is a pipe or a device" in err) == (2, True)


def test_version_and_help_name_every_command_and_every_choice(run):
    status, out, _ = run("--version")
    assert (status, out.split()[:2]) == (0, ["osscar", osscar.__version__])
    status, out, _ = run("--help")
    assert status == 0
    assert {line.split()[1] for line in out.splitlines() if line.startswith("│ ")} >= {
        *("demo", "prune", "sweep", "eval", "inspect", "export", "gap", "solve"),
        *("instances", "backends"),
    }
    fields = {*PruningRequest.__dataclass_fields__, *RecoveryRequest.__dataclass_fields__}
    named = {name for name in fields if "_" in name}
    said = {}
    for command in ("prune", "recover", "sweep", "eval", "inspect", "export", "gap", "solve"):
        status, out, _ = run(command, "--help")
        said[command] = " ".join(out.replace("│", " ").split())
        assert not named & set(re.findall(r"\w+", said[command])), "options as Python has them"
        assert not re.search(r"-ed\b", said[command]), "an ending behind the name of a choice"
    for words in (
        "[choices: measured, uniform]",
        "[choices: weights, residual]",
        "[choices: correct, keep]",
        "[choices: auto, eager, exported]",
        "With --certify: rounds",
    ):
        assert words in said["prune"]
    assert "the samples, and of --augment" in said["recover"]
    titles = [
        "Arguments",
        "Budget",
        "Target of quality",
        "What to keep",
        "Calibration and test data",
        "Images",
        "Solver and refit",
        "Training",
        "Model",
    ]
    first = said["prune"].partition("Arguments")[0]
    assert [first.count(f"--{budget} 0.") for budget in ("sparsity", "neurons", "flops")] == [1] * 3
    assert re.findall(r"╭─ ([\w ]+) ─", said["prune"]) == [*titles, "Output"]


def test_being_terminated_leaves_nothing_half_written(run, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        osscar.checkpoint.directory,
        "_prove_same",
        lambda *_: os.kill(os.getpid(), signal.SIGTERM),
    )
    before = signal.getsignal(signal.SIGTERM)
    status, _, _ = run(*small_prune(text, tmp_path / "out", "--neurons", 0.5))
    assert status == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    # What was solved is kept, in plain sight, and nothing else.
    assert {path.name for path in tmp_path.iterdir()} == {text.name, "out.run"}


def test_two_files_of_one_name_are_refused_as_what_is_written(run, tmp_path):
    same = tmp_path / "same"
    both = ("--json", same, "--report", same)
    status, _, err = run("prune", "demo", "--neurons", 0.5, "--out", tmp_path / "out", *both)
    assert status == 2
    assert f"--report {same} would write to {same}, which the command writes" in err
    status, _, err = run("inspect", "demo", "--json", same, "--svg", same)
    assert status == 2
    assert f"--svg {same} would write to {same}, which the command writes" in err
    assert not same.exists()
