"""Every command that README and the site show: run on small data, or parsed where that cannot be.

A command that is added to a page has to be added here: each is run, or parsed with a reason.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import osscar.cli
from benchmarks.__main__ import benchmarks
from benchmarks.prose import Split, builtin_text
from osscar.cli.commands import app
from osscar.cli.settings import known_names
from osscar.recovery.request import RecoveryRequest
from osscar.request import PruningRequest
from tests.docs.json_schema import missing, undescribed
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands
from tests.osscar.interrupted_cases import tiny_model

BENCHMARK = "takes minutes to hours, and data; its arguments are parsed"
PARSED = {
    "python3 -m pip install": "needs an index of packages; `.ci/run` does it anew",
    "torchrun": "starts processes; tests/osscar/test_ranks.py runs it",
    "osscar gap smollm2-135m --out study --ray": "needs a cluster; test_cluster.py starts one",
    "python3 -m pytest": "is this suite",
    "bash .ci/run": "runs this suite",
    "osscar prune torchvision:ssdlite320": "takes a minute; test_libraries.py loads it",
    "osscar prune MODEL --experts": "takes a mixture; test_prune_experts.py runs it",
    "osscar eval smaller --images others/": "takes a detector, pruned",
    "python3 -m osscar demo": "tests/osscar/test_cli.py runs it",
    "osscar export smaller --format": "takes a LLaMA, a directory; test_gguf.py, test_export.py",
    "osscar export tuned": "takes a model of ultralytics; test_python.py runs it",
    "osscar export recovered": "takes a LLaMA, and the demo is an OPT; test_gguf.py runs it",
    "osscar solve problems/resnet20-c16-k8.safetensors": "in test_user_code.py",
    "osscar prune demo --neurons 0.5 --backend largest_input.py": "in test_user_code.py",
    "osscar gap problems/resnet20-c16-k8.safetensors": "in test_user_code.py",
    "python -m benchmarks.": BENCHMARK,
    "osscar prune smollm2-135m --max-perplexity-increase": "takes text that does not repeat",
    "osscar prune net.py:build --max-top1-drop": "takes labels; in test_quality_target.py",
    "osscar prune smollm2-135m --speedup": "times of a tiny model are noise; in test_clocks.py",
    "osscar prune model.py:build --speedup": "as above",
    "osscar fields": "test_cli.py shows all fields",
    "osscar instances": "test_instances.py runs its commands on the smallest",
}
"""Commands, by what they begin with, that are not run here, and why."""

SMALL = {
    "smollm2-135m": ("smollm",),
    "demo": ("smollm", "--calibration", "training.txt"),
    "torchvision:resnet50": ("torchvision:squeezenet1_1", "--weights", "squeezenet.pth"),
}
"""What stands here for the words of a page that need a network, or much time."""

FEW = ("--samples", "4", "--seqlen", "64")
FEWER = {
    "prune": FEW,
    "gap": (*FEW, "--windows", "1", "--sparsity", "0.5"),
    "sweep": (*FEW, "--windows", "2"),
    "eval": ("--windows", "2", "--seqlen", "64"),
    "recover": ("--samples", "8", "--steps", "2", "--batch-size", "2"),
    "inspect": (),
}
OWN = {"docs/howto/own-model.md": "net.py", "docs/tutorials/image-classifier.md": "shapes.py"}
"""Pages that build a network of one's own, and the file that holds it."""


def reason(command):
    return next((why for start, why in PARSED.items() if str(command).startswith(start)), None)


SHOWN = [command for page in PAGES for command in commands(page)]


def to_run():
    """The commands to run, by page; what an earlier page shows alike is run there."""
    first: dict[tuple[str, ...], Command] = {}
    pages: dict[str, list[Command]] = {}
    for command in SHOWN:
        if first.setdefault(command.words, command) is command and reason(command) is None:
            pages.setdefault(command.page, []).append(command)
    return pages


TO_RUN = to_run()
LONG = ("README.md", "docs/vision.md", "docs/budget.md")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with a small model and all texts that the pages name."""
    prose = "the quick brown fox jumps over the lazy dog and runs back before night falls. "
    (tmp_path / "calibration.txt").write_text(prose * 100)
    (tmp_path / "test.txt").write_text(prose.replace("fox", "cat") * 100)
    (tmp_path / "training.txt").write_text(builtin_text(Split.TRAINING)[:20_000])
    tiny_model(tmp_path / "smollm", ffn_dim=512)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vision(place):
    """Images, labelled ones, and weights for a small model of torchvision and for a page's own."""
    image = pytest.importorskip("PIL.Image")
    models = pytest.importorskip("torchvision.models")
    generator = np.random.default_rng(0)
    for name in (*(f"images/{i}.png" for i in range(6)), "labelled/0/a.png", "labelled/1/b.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        image.fromarray(pixels).save(place / name)
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1().state_dict(), place / "squeezenet.pth")
    (code,) = blocks("docs/vision.md", "python")
    (place / "net.py").write_text(code)
    torch.save(runpy.run_path(str(place / "net.py"))["build"]()[0].state_dict(), place / "net.pt")


@pytest.fixture
def own(place, page):
    """The network that a page builds, its weights and its data."""
    network, data, *_ = blocks(page, "python")
    (place / OWN[page]).write_text(network)
    exec(compile(f"{network}\n{data}", OWN[page], "exec"), {"__name__": "net"})


def smaller(words, of_text):
    """The words of an osscar command, on small data."""
    found = list[str]()
    for before, word in zip(("", *words), words, strict=False):
        if words[1] == "sweep" and before in ("--sparsity", "--flops"):
            word = word.split(",")[0]
        elif before == "--groups":
            word = "*.0.self_attn.heads,model.decoder.layers.0.neurons"
        found += SMALL.get(word, (word,))
    if "--max-divergence" in words:
        found += ("--samples", "64", "--seqlen", "32")
    elif of_text and (words[1] != "gap" or "--calibration" in words):
        pairs = zip(FEWER[words[1]][::2], FEWER[words[1]][1::2], strict=True)
        found += (one for pair in pairs if pair[0] not in words for one in pair)
    if "--times" in words:
        found += ("--batch-size", "1", "--seqlen", "16")
    if words[1] == "gap":
        found += () if "--backends" in words else ("--backends", "greedy,local_search")
        found += ("--jobs", "1")
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page in LONG else page for page in TO_RUN],
)
def test_the_commands_of_a_page_run(page, place, request, monkeypatch, capsys):
    for command in TO_RUN[page]:
        signs = ("torchvision:resnet50", "net.py:build", "--images")
        of_images = any(word in command.words for word in signs)
        if page in OWN or of_images:
            request.getfixturevalue("own" if page in OWN else "vision")
        words = smaller(command.words, not (of_images or page in OWN))
        if "--out" in words and Path(words[words.index("--out") + 1]).exists():
            out = Path(words[words.index("--out") + 1])  # pages give one name to several results
            out.rename(f"{out}.{len(list(place.iterdir()))}")
        if "--json" not in words:
            words += ["--json", "out.json"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            osscar.cli.main()
        captured = capsys.readouterr()
        assert not stop.value.code, f"{' '.join(words)}: {captured.err}"
        assert captured.out
        document = json.loads((place / words[words.index("--json") + 1]).read_text())
        assert (undescribed(document), missing(document)) == (set(), set())


class Parsed(Exception):
    """The arguments were understood; nothing was run."""


def test_every_benchmark_says_what_it_tells_and_how_long_it_takes():
    told = benchmarks()
    assert {"quality", "peers", "coverage", "scale", "train_demo_model"} <= set(told)
    assert {name for name, words in told.items() if "\nTakes " not in words} == set()


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_command_is_understood(command, monkeypatch, tmp_path):
    program, *words = command.words
    if "--config" in words:  # which is read
        recipe = tmp_path / "run.toml"
        recipe.write_text("sparsity = 0.3\n")
        words[words.index("--config") + 1] = str(recipe)
    if program == "osscar":
        app.parse_args(words)
    elif words[:1] == ["-m"] and words[1].startswith("benchmarks."):
        parse(words[1], words[2:], monkeypatch)
    else:
        assert reason(command) is not None, f"add {command} to PARSED, with a reason, or run it"


def test_options_in_the_prose_are_options_of_a_command_and_what_is_set_is_a_field():
    commands = [app[name] for name in app if name.isalpha() and app[name].default_command]
    arguments = [one for command in commands for one in command.assemble_argument_collection()]
    options = {name for one in arguments for name in one.names} | {"--source"}  # of benchmarks
    fields = {*known_names(PruningRequest, recovers=True), *known_names(RecoveryRequest)}
    found = 0
    for page in (one for one in PAGES if re.match(r"(README|docs/.*)\.md$", one)):
        for code in re.findall(r"(?<!`)`(--[^`\n]+)`(?!`)", (ROOT / page).read_text("utf-8")):
            for option, field in re.findall(r"(?<!\S)(--[a-z0-9-]+)(?: ([a-z_.]+)=)?", code):
                found += 1
                assert option in options, f"{page}: {code}"
                assert option != "--set" or field in {*fields, ""}, f"{page}: {code}"
    assert found > 100


def parse(module, arguments, monkeypatch):
    """Run a module up to where it has parsed its arguments."""
    parse_args: Callable[..., Any] = argparse.ArgumentParser.parse_args

    def stop(self, *given):
        parse_args(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")
