"""Every command that README and the site show: run on small data, or parsed where that cannot be.

A command that is added to a page has to be added here: each is run, or parsed with a reason.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import osscar.cli
from benchmarks.__main__ import benchmarks
from benchmarks.prose import Split, builtin_text
from osscar.cli.commands import app
from tests.docs.json_schema import missing, undescribed
from tests.docs.pages import PAGES, ROOT, Command, blocks, commands, mentions
from tests.osscar.interrupted_cases import tiny_model

INSTALLS = "needs an index of packages; `.ci/run` does it in a fresh environment"
THIS_SUITE = "is this suite"
BENCHMARK = "takes minutes to hours, and data; its arguments are parsed"
PARSED = {
    "python3 -m pip install -e .[all]": INSTALLS,
    "python3 -m pip install -e .[test]": INSTALLS,
    "python3 -m pip install -e .[dev]": INSTALLS,
    "python3 -m pip install -e .[vision]": INSTALLS,
    "python3 -m pip install osscar[gguf]": INSTALLS,
    "python3 -m pip install osscar[onnx]": INSTALLS,
    "python3 -m pip install osscar[ray]": INSTALLS,
    "python3 -m pip install osscar[recover]": INSTALLS,
    "torchrun": "starts processes; tests/osscar/test_ranks.py runs it",
    "osscar gap smollm2-135m --out study --ray": "needs a cluster; test_cluster.py starts one",
    "python3 -m pytest": THIS_SUITE,
    "bash .ci/run": "runs this suite",
    "osscar prune torchvision:ssdlite320": "takes a minute; test_libraries.py runs it",
    "osscar prune MODEL --experts": "takes a mixture; test_prune_experts.py runs it",
    "osscar eval smaller --images others/": "takes a detector; test_libraries.py runs it",
    "python3 -m osscar demo": "tests/osscar/test_cli.py runs it",
    "osscar export smaller --format gguf": "takes a LLaMA; test_gguf.py runs it",
    "osscar export smaller --format onnx": "takes a directory; test_export.py runs it",
    "osscar export tuned": "takes a model of ultralytics; test_python.py runs it",
    "osscar export recovered": "takes a LLaMA, and the demo is an OPT; test_gguf.py runs it",
    "osscar solve layer.safetensors --backend largest_input.py": "in test_user_code.py",
    "osscar prune demo --neurons 0.5 --backend largest_input.py": "in test_user_code.py",
    "osscar gap layer.safetensors --backends largest_input.py": "in test_user_code.py",
    "python benchmarks/": BENCHMARK,
    "python -m benchmarks.": BENCHMARK,
    "osscar prune smollm2-135m --max-perplexity-increase": "takes text that does not repeat",
    "osscar prune net.py:build --max-top1-drop": "takes labels; in test_quality_target.py",
    "osscar instances": "test_instances.py runs its commands on the smallest",
}
"""Commands, by what they begin with, that are not run here, and why."""

SMALL = {
    "smollm2-135m": ("smollm",),
    "torchvision:resnet50": ("torchvision:squeezenet1_1", "--weights", "squeezenet.pth"),
}
"""What stands here for the words of a page that need a network, or much time."""

FEWER = {
    "prune": ("--samples", "4", "--seqlen", "64"),
    "gap": (
        *("--samples", "4", "--seqlen", "64", "--windows", "1", "--sparsity", "0.5"),
        *("--backends", "greedy,local_search", "--jobs", "1"),
    ),
    "sweep": ("--samples", "4", "--seqlen", "64", "--windows", "2"),
    "eval": ("--windows", "2", "--seqlen", "64"),
    "recover": ("--samples", "8", "--steps", "2", "--batch-size", "2"),
    "inspect": (),
}
SMALL_GROUPS = "*.0.self_attn.heads,model.decoder.layers.0.neurons"


def reason(command: Command) -> str | None:
    return next((why for start, why in PARSED.items() if str(command).startswith(start)), None)


SHOWN = [command for page in PAGES for command in commands(page)]


def to_run() -> dict[str, list[Command]]:
    """The commands to run, by page; what an earlier page shows alike is run there."""
    pages: dict[str, list[Command]] = {}
    seen: set[tuple[str, ...]] = set()
    for command in SHOWN:
        if reason(command) is None and command.words not in seen:
            pages.setdefault(command.page, []).append(command)
        seen.add(command.words)
    return pages


TO_RUN = to_run()
LONG = ("README.md", "docs/vision.md")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def place(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all files that the pages name."""
    prose = "the quick brown fox jumps over the lazy dog and runs back before night falls. "
    (tmp_path / "calibration.txt").write_text(prose * 100)
    (tmp_path / "test.txt").write_text(prose.replace("fox", "cat") * 100)
    (tmp_path / "training.txt").write_text(builtin_text(Split.TRAINING)[:20_000])
    (tmp_path / "smollm").symlink_to(small_model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vision(place: Path) -> None:
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


OWN = {
    "docs/howto/own-model.md": "net.py",
    "docs/howto/nanogpt.md": "gpt.py",
    "docs/tutorials/image-classifier.md": "shapes.py",
}
"""Pages that build a network of one's own, and the file that holds it."""


@pytest.fixture
def own(place: Path, page: str) -> None:
    """The network that a page builds, its weights and its data."""
    network, data, *_ = blocks(page, "python")
    (place / OWN[page]).write_text(network)
    exec(compile(f"{network}\n{data}", OWN[page], "exec"), {"__name__": "net"})


def smaller(words: tuple[str, ...], of_text: bool) -> Iterator[str]:
    """The words of an osscar command, on small data."""
    for before, word in zip(("", *words), words, strict=False):
        if before == "--groups":
            yield SMALL_GROUPS
        elif words[1] == "sweep" and before in ("--sparsity", "--flops"):
            yield word.split(",")[0]
        elif before in ("--dense", "--dense") and word in SMALL:
            yield from SMALL[word]
        else:
            yield from SMALL.get(word, (word,))
    if words[1] == "gap" and "--calibration" not in words:  # of problems as they are
        yield from ("--backends", "greedy,local_search", "--jobs", "1")
    elif "--max-divergence" in words:  # which takes as many, of text that does not repeat
        yield from ("--samples", "32", "--seqlen", "32")
    elif of_text:
        yield from FEWER[words[1]]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if page in LONG else page for page in TO_RUN],
)
def test_the_commands_of_a_page_run(
    page: str, place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for command in TO_RUN[page]:
        signs = ("torchvision:resnet50", "net.py:build", "--images")
        of_own = page in OWN
        of_images = not of_own and any(word in command.words for word in signs)
        if of_own or of_images:
            request.getfixturevalue("own" if of_own else "vision")
        words = list(smaller(command.words, not (of_images or of_own)))
        if "--out" in words:  # pages give one name to several results
            _clear(place / words[words.index("--out") + 1])
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


def _clear(directory: Path) -> None:
    if directory.exists():
        directory.rename(directory.with_name(f"{directory.name}.{len(list(Path().iterdir()))}"))


class Parsed(Exception):
    """The arguments were understood; nothing was run."""


def test_every_benchmark_says_what_it_tells_and_how_long_it_takes() -> None:
    told = benchmarks()
    assert {"quality", "recovery", "coverage", "scale", "train_demo_model"} <= set(told)
    assert {name for name, words in told.items() if "\nTakes " not in words} == set()


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_command_is_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = command.words
    if program == "osscar":
        app.parse_args(words)
    elif program.startswith("python") and words[0].endswith(".py"):
        assert parses(runpy.run_path, str(ROOT / words[0]), words[1:], monkeypatch)
    elif words[:1] == ["-m"] and words[1].startswith("benchmarks."):
        assert parses(runpy.run_module, words[1], words[2:], monkeypatch)
    else:
        assert reason(command) is not None, f"add {command} to PARSED, with a reason, or run it"


@pytest.mark.parametrize(
    "command",
    # what a changelog tells of may have gone since
    [c for page in PAGES if page != "CHANGELOG.md" for c in mentions(page)],
    ids=str,
)
def test_what_the_text_mentions_exists(command: Command) -> None:
    program, *words = command.words
    end = [*words, "--"].index("--")
    words, more = words[:end], words[end + 1 :]
    options = {word for word in words if word.startswith("--")}
    known = osscar_options(words if program == "osscar" else ["prune"])
    assert {word for word in more if word.startswith("--")} <= known
    module = ROOT / f"{words[1].replace('.', '/')}.py" if words[0] == "-m" else ROOT / words[0]
    if not module.exists() and module.with_suffix("").is_dir():
        module = module.with_suffix("") / "__main__.py"
    if program == "osscar":
        assert options <= known
    elif module.suffix == ".py" and module.exists():
        source = module.read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in options)
    else:
        assert reason(command) is not None


def osscar_options(words: list[str]) -> set[str]:
    """The options of the command that words begin with; a group of commands has none."""
    command = app.parse_commands(words)[1][-1]
    if command.default_command is None:
        return set()
    return {option for one in command.assemble_argument_collection() for option in one.names}


def parses(
    run: Callable[..., Any], script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Run a script or module up to where it has parsed its arguments."""
    parse: Callable[..., Any] = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Parsed):
        run(script, run_name="__main__")
    return True
