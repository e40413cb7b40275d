"""The commands as a person runs them: what they print, write and refuse."""

import dataclasses
import json
from pathlib import Path

import pytest
from cyclopts import CycloptsError
from transformers import GPT2Config, GPT2LMHeadModel

import osscar
from osscar.base.errors import OptionError
from osscar.base.printable import engineering
from osscar.cli.commands import app, asked_points
from osscar.cli.options import recovery_of, request_of
from osscar.recovery.request import RecoveryRequest
from osscar.request import ArgumentsAlone, PruningRequest
from osscar.run.prune_page import prune_page, run_facts
from osscar.run.run_log import RunLog
from osscar.study.directory import Study
from tests.osscar.families import HELD_OUT, framing_tokenizer
from tests.osscar.interrupted_cases import pruning

PROSE = "the quick brown fox jumps over the lazy dog and runs back again before night falls. " * 200


def interrupted(*_, **__):
    raise KeyboardInterrupt


def words_of(err):
    return " ".join(err.split())


# ---- whole runs --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_demo_writes_nowhere_but_where_it_says(run, tmp_path, monkeypatch):
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    for place in (work, temporary):
        place.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    (work / "some.txt").write_text(HELD_OUT.read_text()[:1000])
    monkeypatch.setattr("osscar.models.loaded.DEMO_HELD_OUT", work / "some.txt")
    monkeypatch.setattr("osscar.cli.demo._SAMPLES", 8)
    monkeypatch.setattr("osscar.cli.demo._SEQLEN", 32)
    assert run("demo", "--backend", "no such backend")[0] == 2
    assert list(temporary.iterdir()) == []
    status, out, err = run("demo", "--backend", "magnitude", "--json", "demo.json")
    assert status == 0, err
    assert {file.name for file in work.iterdir()} == {"demo.json", "some.txt"}
    (place,) = temporary.glob("*/smaller")
    for expected in ("perplexity", "tokens/s", "Loss by layer", f"saved: {place} ("):
        assert expected in out
    document = json.loads((work / "demo.json").read_text())
    assert (document["schema"], document["settings"]["sparsity"]) == ("osscar.prune/7", 0.5)
    dense, pruned = (document["evaluation"][which] for which in ("dense", "model"))
    assert dense["quality"]["perplexity"] < pruned["quality"]["perplexity"]
    for parameters in (document["parameters_after"], pruned["footprint"]["parameters"]):
        assert parameters == sum(p.numel() for p in osscar.load(place).parameters())
    status, _, err = run("demo", "--out", place)
    assert (status, "a checkpoint is there; give another" in err) == (2, True)


def test_prune_eval_and_inspect_tell_and_keep_what_results_rest_on(run, tmp_path, monkeypatch):
    """Of a model in half precision, which nobody trained, and a tokenizer that frames texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("osscar.base.timing.WORTHWHILE_SECONDS", 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=16, n_layer=1, n_head=4))
    model.half().save_pretrained("a $dense model")
    framing_tokenizer().save_pretrained("a $dense model")
    Path("text.txt").write_text(PROSE)
    Path("an other text.txt").write_text(PROSE.replace("fox", "cat"))
    status, out, err = run(
        *("prune", "a $dense model", "--neurons", "0.5", "--heads", "0.5", "--certify"),
        *(
            "--set",
            "backend_options.max_swaps=3",
            "--samples",
            2,
            "--seqlen",
            64,
            "--dtype",
            "float32",
        ),
        *("--calibration", "text.txt", "--out", "a $small model", "--device", "cpu"),
        *("--json", "p.json"),
    )
    assert status == 0, err
    assert (
        "calibration: 2 windows of 64 tokens of text.txt, seed 0, each begins with <s> and ends "
        "with </s>; float32 on cpu (stored as float16), sdpa attention"
    ) in out
    report = json.loads(Path("a $small model/osscar_report.json").read_text())
    printed = json.loads(Path("p.json").read_text())
    assert report == {key: value for key, value in printed.items() if key != "saved"}
    assert report["settings"]["backend_options"] == {"max_swaps": 3}
    assert (report["calibration"]["begins_with"], report["calibration"]["seed"]) == ("<s>", 0)
    how = {"dtype": "float32", "stored_dtype": "float16", "device": "cpu", "attention": "sdpa"}
    assert report["computed"] == how
    assert [layer["kept"] for layer in report["layers"]] == [2, 32]
    before, after = (engineering(report[f"parameters_{one}"]) for one in ("before", "after"))
    assert f"keeps {after} of {before} parameters, removes " in out
    assert report["forward"]["pruned"]["flops"] < report["forward"]["dense"]["flops"]
    assert "saved: a $small model (" in out  # as it was given
    page = Path("a $small model/report.html").read_text()
    assert page == prune_page(report, "a $small model")
    for file in (*Path("a $small model").glob("*.json"), *Path().glob("*/README.md")):
        assert str(tmp_path) not in file.read_text()

    command = ["eval", "a $small model", "--text", "an other text.txt", "--seqlen", 64]
    command += ["--dense", "a $dense model", "--dtype", "float32", "--device", "cpu"]
    status, out, err = run(*command, "--windows", 2, "--json", "e.json")
    assert status == 0, err
    assert "warning" not in err
    said = "126 tokens of an other text.txt scored in 2 windows of 64, each begins with <s>; float"
    assert said in out
    document = json.loads(Path("e.json").read_text())
    assert (document["schema"], document["computed"]) == ("osscar.eval/4", how)
    assert document["model"]["quality"]["special_tokens"] == 1
    assert document["ratios"]["parameters"] < 1
    status, _, err = run(*[str(word).replace("an other ", "") for word in command])
    assert (status, "was used to calibrate or recover this model" in words_of(err)) == (2, True)

    status, out, err = run("inspect", "a $small model", "--svg", "g.svg", "--json", "i")
    assert status == 0, err
    assert "frozen: hidden" in out
    assert Path("g.svg").read_bytes() == b"a picture"
    told = json.loads(Path("i").read_text())
    assert [group["units"] for group in told["groups"] if not group["frozen"]] == [2, 32]


@pytest.mark.slow
def test_no_figure_of_a_report_loses_a_run(run, tiny, tmp_path, monkeypatch):
    """A model is saved before it is measured, whatever becomes of that."""
    out_dir, copy = tmp_path / "small", tmp_path / "copy.json"
    asked = pruning(tiny, "--neurons", "0.5", "--out", str(out_dir), "--json", str(copy))
    monkeypatch.setattr("osscar.run.result.measure_forward", interrupted)
    assert run(*asked)[0] == 130
    saved = (out_dir / "model.safetensors").read_bytes()
    assert not copy.exists()

    def fails(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("osscar.run.result.measure_forward", fails)
    status, _, err = run(*asked[:-1], "/proc/copy.json")  # where nobody can write
    assert (status, "cannot write /proc/copy.json" in err) == (2, True)
    status, _, err = run(*asked)
    assert status == 0, err
    said = "a forward pass of both models (RuntimeError: no kernel)"
    report = json.loads((out_dir / "osscar_report.json").read_text())
    assert report["unmeasured"] == said
    assert dict(run_facts(report))["not measured"] == said
    assert report.items() <= json.loads(copy.read_text()).items()
    assert said in (out_dir / "report.html").read_text()
    assert (out_dir / "model.safetensors").read_bytes() == saved
    assert not (tmp_path / "small.run").exists()


# ---- interrupts --------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("command", "owner", "method", "at", "said"),
    [
        ("prune", RunLog, "append", 1, "1 group is done and kept in {}"),
        ("gap", Study, "run", 0, "1 problem and 0 answers are kept in {}"),
        ("gap", Study, "capture", 0, ""),
    ],
)
def test_an_interrupt_says_what_is_kept(
    run, tiny, tmp_path, monkeypatch, command, owner, method, at, said
):
    calls, known = [], getattr(owner, method)

    def stopped(*arguments, **more):
        calls.append(arguments)
        return known(*arguments, **more) if len(calls) <= at else interrupted()

    monkeypatch.setattr(owner, method, stopped)
    asked = ("--groups", "*.0.*heads") if command == "gap" else ("--neurons", "0.5", "--restart")
    _, model, *usual = pruning(tiny, *asked)
    if command == "gap":
        backend = usual.index("--backend")
        del usual[backend : backend + 2]
    place = tmp_path / "out"
    status, _, err = run(command, model, *usual, "--out", place)
    kept = place.with_name("out.run") if command == "prune" else place
    last = err.splitlines()[-1]
    assert (status, kept.exists()) == (130, bool(said))
    assert last.startswith(f"interrupted: {said.format(kept) or 'no finished work was kept'}")
    assert ("without --restart" in last) == (command == "prune" and bool(said))


# ---- what is refused ---------------------------------------------------------------------

NEURONS = ("--neurons", "0.5")
BAD = [
    (("--sparsity", "0.999"), "cannot be met"),
    ((*NEURONS, "--set", "backend_options.stages=3"), "has no option stages"),
    ((*NEURONS, "--out", "full", "--overwrite"), "files that are not a checkpoint"),
]


def test_bad_input_is_one_line_and_writes_nothing(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/precious").write_text("keep me")
    for arguments, message in BAD:
        place = () if "--out" in arguments else ("--out", "small")
        status, _, err = run(*pruning(tiny, *place, *arguments))
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert (status, len(lines)) == (2, 1), (arguments, err)
        assert lines[0].startswith("error: ")
        assert message in words_of(err), arguments
        assert sorted(Path().rglob("*")) == [Path("full"), Path("full/precious")]


# ---- what is shown -----------------------------------------------------------------------


def asked_by(monkeypatch, *words):
    """The options that a command line comes to."""
    found = []
    monkeypatch.setattr("osscar.cli.commands._run", lambda *words: found.append(words[-1]))
    app(list(words))
    return found


def asked_of(file, monkeypatch, *more):
    """The options that a file and the command line come to."""
    (found,) = asked_by(monkeypatch, "prune", "demo", "--config", str(file), "--out", "x", *more)
    return found


OWN = {
    "damp": 0.0, "allocation": "uniform", "at_least": "10%", "round_to": 32, "target": "weights",
    "correction_weight": 0.5, "batch_norm": "keep", "distance": "relative", "form": "eager",
    "skip": ("h.0.*", "a"), "certify": True, "backend_options": {"max_swaps": 3, "stages": "x"},
    "groups": {"h.1.heads": "1/3", "h.2.heads": 2}, "backend": "magnitude", "seed": 7,
}  # fmt: skip
TRAINED = {"steps": 5, "lora": 4, "checkpointing": True, "augment": "none", "distance": "nats"}


def test_every_field_of_a_request_can_be_set_by_its_name(monkeypatch):
    """As in Python, whichever has an option of its own; and those of a recovery that follows."""
    monkeypatch.setattr(PruningRequest, "chosen_backend", lambda *_, **__: None)
    asked = {**OWN, "sparsity": 0.25}
    pairs = [f"{name}={value}" if isinstance(value, str) else f"{name}={json.dumps(value)}"
             for name, value in asked.items() if not isinstance(value, dict)]  # fmt: skip
    for name in ("backend_options", "groups"):
        pairs += [f"{name}.{entry}={value}" for entry, value in OWN[name].items()]
    pairs += [f"recovery.{name}={json.dumps(value)}" for name, value in TRAINED.items()]
    words = [word for pair in pairs for word in ("--set", pair)]
    (found,) = asked_by(monkeypatch, "prune", "demo", "--out", "x", "--recover", *words)
    request = request_of(found, PruningRequest)
    assert request == PruningRequest(**asked)
    assert recovery_of(found, request) == RecoveryRequest(**TRAINED, seed=7)
    words = [word.removeprefix("recovery.") for word in words if "recovery." in word]
    words = [part for word in words for part in ("--set", word)]
    (found,) = asked_by(monkeypatch, "recover", "small", "--dense", "demo", *words)
    assert request_of(found, RecoveryRequest) == RecoveryRequest(**TRAINED)
    shown = {*["lora", "augment", "damp", "form"]}
    for command in ("prune", "sweep", "recover"):
        options = {one.name[2:] for one in app[command].assemble_argument_collection()}
        assert not shown & options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set dmap=1", r"--set names 'dmap', which is no field; did you mean damp\? "),
        ("--set zzz=1", r"'zzz', which is no field; `osscar fields prune` lists all"),
        ("--set damp.x=1", r"'damp.x', which is no field; did you mean damp"),
        ("--set recovery.stps=1", r"'recovery.stps', .* did you mean recovery.steps "),
        ("--set damp", "--set 'damp' is not NAME=VALUE"),
        ("--set damp=1 --set damp=2", "--set gives damp more than once"),
        ("--set batch-norm=1 --set batch_norm=2", "--set gives batch_norm more than once"),
        ("--set groups=0.5", "'groups=0.5' holds no mapping; give groups.NAME=VALUE"),
        ("--set groups.a=2.5", "groups.a is 2.5; give a fraction"),
        ("--set sparsity=0.5", "sparsity is given by --sparsity and by --set; give it once"),
        ("--set damp=NaN", "damp is nan; "),
        ("--set batch_norm=no", "batch_norm is 'no'; it must be 'correct' or 'keep'"),
        ("--set skip=3", "skip is 3; it must be"),
        ("--set recovery.lora=4", "recovery.lora is 4; give --recover, too, or omit it"),
        ("--recover --set recovery.lora=0", "lora is 0; it must be"),
    ],
)
def test_what_is_set_is_checked_before_anything_is_loaded(words, message, monkeypatch):
    with pytest.raises(OptionError, match=message):
        asked_by(monkeypatch, "prune", "demo", "--sparsity", "0.3", "--out", "x", *words.split())


def test_a_sweep_takes_fields_by_name_but_no_target(monkeypatch):
    def points(*words):
        (found,) = asked_by(monkeypatch, "sweep", "demo", *words)
        return asked_points(found, ArgumentsAlone)

    base, jobs = points("--set", "sparsity=0.1,0.2", "--set", "allocation=uniform", "--baselines")
    assert [job.value for job in jobs if job.method == "uniform"] == [0.1, 0.2]
    base, _ = points("--params", "0.9,0.8", "--set", "flops=0.9", "--set", "heads=2")
    assert (base.params, base.flops, base.heads) == (0.9, 0.9, 2)
    with pytest.raises(OptionError, match="a sweep has budgets, and no target; omit max_top1_drop"):
        points("--params", "0.9,0.8", "--set", "max_top1_drop=1%")
    with pytest.raises(OptionError, match=r"'recovery\.steps', which is no field"):
        points("--params", "0.9,0.8", "--set", "recovery.steps=3")


@pytest.mark.parametrize("command", ["prune", "sweep", "recover"])
def test_a_screen_lists_every_field_and_help_names_it(command, run):
    status, out, _ = run("fields", command)
    request = RecoveryRequest if command == "recover" else PruningRequest
    names = [
        line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] > " "
    ]
    assert (status, names[1:]) == (0, [one.name for one in dataclasses.fields(request)])
    assert "Random seed of" in out
    assert run(command, "--help")[1].endswith(f"Further fields: osscar fields {command}\n")


@pytest.mark.parametrize("length", [252, 300])
def test_a_directory_whose_name_is_too_long_is_refused(length, run, tiny):
    status, _, err = run(*pruning(tiny, "--neurons", "0.5", "--out", "x" * length))
    assert (status, "File name too long" in err) == (2, True)


def test_options_come_from_a_file_and_the_command_line_has_the_last_word(tmp_path, monkeypatch):
    skip = "skip{}['*.0.*']\nrecover{}true\nseqlen{}9\n"
    lines = {
        "run.toml": 'sparsity = "30%"\nround-to = 1\n' + skip.replace("{}", " = "),
        "run.yaml": "sparsity: 30%\nround_to: 1\n" + skip.replace("{}", ": "),
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
        found = asked_of(tmp_path / name, monkeypatch, "--seqlen", "16")
        assert (found.sparsity, found.settings, found.skip) == ("30%", ["round_to=1"], ["*.0.*"])
        assert (found.recover, found.seqlen) == (True, 16)
    (tmp_path / "own.toml").write_text(
        "sparsity = 0.3\ndamp = 0.5\nat-least = '10%'\nrecover = true\n"
        "[backend_options]\nmax_swaps = 3\nstages = 2\n[recovery]\nsteps = 4\nlora = 2\n"
    )
    more = ("sparsity=0.4", "damp=0.1", "backend_options.stages=1", "recovery.steps=8")
    words = [word for pair in more for word in ("--set", pair)]
    found = asked_of(tmp_path / "own.toml", monkeypatch, *words)
    request = request_of(found, ArgumentsAlone)
    assert (request.sparsity, request.damp, request.at_least) == (0.4, 0.1, "10%")
    assert request.backend_options == {"max_swaps": 3, "stages": 1}
    assert (recovery_of(found, request).steps, recovery_of(found, request).lora) == (8, 2)
    for name, text, message in (
        ("a.toml", "sparcity = 0.3", "a.toml names 'sparcity', .*; did you mean sparsity"),
        ("b.toml", "sparsity = ", "b.toml cannot be read"),
        ("c.ini", "", "give a .toml, .yaml or .json file"),
        ("d.json", '{"schema": "osscar.prune/7"}', "d.json is no report of a run"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises((OptionError, CycloptsError), match=message):
            asked_of(tmp_path / name, monkeypatch)


def test_a_report_repeats_its_run(runs, tmp_path, monkeypatch):
    result = runs["opt"].result
    own = RecoveryRequest(steps=3, batch_size=2, device=result.request.device)
    report = {**result.record(), "recovery": {"settings": own.to_json()}}
    more = {"damp": 0.0, "backend_options": {"max_swaps": 3}, "groups": {"a.b.heads": "1/3"}}
    report["settings"] |= more
    (tmp_path / "osscar_report.json").write_text(json.dumps(report))
    found = asked_of(tmp_path / "osscar_report.json", monkeypatch)
    monkeypatch.setattr(PruningRequest, "chosen_backend", lambda *_, **__: None)
    request = request_of(found, PruningRequest)
    assert request == dataclasses.replace(result.request, **more)
    assert (found.recover, recovery_of(found, request)) == (True, own)
    assert found.samples == result.calibration["samples"]
