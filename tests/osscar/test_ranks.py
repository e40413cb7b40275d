"""Several processes that prune one model: they come to what one comes to, and end together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import osscar
import osscar.cli
from benchmarks.prose import Split, builtin_text
from osscar.base.errors import RanksError
from osscar.base.process import launched
from osscar.base.ranks import ALONE, Ranks
from osscar.data.samples import named_generator
from osscar.preparation.fingerprint import DenseOutputs, Fingerprint, JournalManifest
from tests import collected
from tests.osscar import ranks_worker
from tests.osscar.families import CALIBRATION
from tests.osscar.forked import PATIENCE, Forked, forked
from tests.osscar.ranks_cases import CASES, TWO_BATCHES, Case, cases, summary, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes, and uses gloo")

ROOT = Path(__file__).parents[2]

SMALL = ("--heads", "3/4", "--neurons", "1/2", "--samples", "16", "--seqlen", "64")
PRUNE = ("prune", "demo", *SMALL, "--batch-size", "4", "--device", "cpu")


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher says to one of its processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (told | where).items()}


@contextlib.contextmanager
def ranks_of(runs: Sequence[Callable[[], object]], place: Path) -> Iterator[list[Forked]]:
    """Start a rank for each of what they are to do; none outlives the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        forked(run, place, environment(rank, len(runs), port)) for rank, run in enumerate(runs)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def ended(runs: Sequence[Callable[[], object]], place: Path) -> list[Forked]:
    """Run a rank for each of what they are to do, to its end."""
    with ranks_of(runs, place) as started:
        for process in started:
            process.wait()
        return started


def scenario(run: Callable[[Path], object], size: int, place: Path) -> list[Forked]:
    return ended([lambda: run(place)] * size, place)


def command(*arguments: str) -> Callable[[], object]:
    """What a rank does that runs a command of osscar."""

    def run() -> None:
        sys.argv = ["osscar", *arguments]
        osscar.cli.main()

    return run


# ---- the same as one process -------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["children", "new processes"],
)
def two(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("two")
    TWO_BATCHES.run()  # imports what children then have from the start
    names = collected.values(request, "name")
    if request.param:  # which order their sets in ways of their own
        process = torchrun("tests.osscar.ranks_cases", str(place), *names, place=place)
        assert process.returncode == 0, process.stderr
    else:
        for process in scenario(lambda place: cases(place, names), 2, place):
            assert process.status == 0, process.stderr
    return place


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_come_to_what_one_process_does(name, two):
    check_same(CASES[name], [two / f"{name}.{rank}" for rank in range(2)])


@pytest.mark.slow
def test_a_rank_without_any_batch_changes_nothing(tmp_path):
    for process in scenario(lambda place: cases(place, ["two batches"]), 3, tmp_path):
        assert process.status == 0, process.stderr
    check_same(TWO_BATCHES, [tmp_path / f"two batches.{rank}" for rank in range(3)])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with as many threads as ranks do: some kernels round otherwise with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_same(case: Case, places: list[Path]) -> None:
    """Compare what ranks have written with what this process comes to by itself."""
    result = case.run()
    expected = json.loads(json.dumps(summary(result)))
    models = [safetensors.torch.load_file(f"{place}.safetensors") for place in places]
    for model in models[1:]:
        assert all(torch.equal(x, model[name]) for name, x in models[0].items())
    for name, x in weights(result.model).items():
        torch.testing.assert_close(models[0][name], x, rtol=1e-6, atol=1e-6)
    for place in places:
        found = json.loads(Path(f"{place}.json").read_text())
        for key in ("loss", "divergence"):
            assert found.pop(key) == pytest.approx(expected[key], rel=1e-9, abs=1e-15)
        curves = found.pop("curves")  # measured of sums that were added up in another order
        assert curves.keys() == expected["curves"].keys()
        for name, losses in curves.items():
            assert losses == pytest.approx(expected["curves"][name], rel=1e-9, abs=1e-15)
        assert found == {key: expected[key] for key in found}
    assert all(len(support) > 0 for support in expected["support"].values())


def test_words_and_tensors_arrive_as_they_were(tmp_path):
    for process in scenario(ranks_worker.told, 3, tmp_path):
        assert process.status == 0, process.stderr
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[0] == {
        "texts": ["of 0", "of 1", "of 2"],
        "tensors": [[[rank + 0.5] * 3] * 2 for rank in range(3)],
        "first": ["of 0", "torch.bfloat16"],
        "sums": [3, [7.0] * 3],
        "any": [True, False],
    }


@given(st.lists(st.floats(0.1, 100), max_size=30), st.integers(1, 6))
def test_work_is_shared_out_whole_and_evenly(costs, size):
    shares = [Ranks(rank, size).share(costs) for rank in range(size)]
    assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0.0) + 1e-9
    if size == 1:
        assert ALONE.share(costs) == list(range(len(costs)))
    # One large piece weighs as much as many small ones.
    assert [Ranks(rank, 2).share([1, 1, 5, 1, 1]) for rank in (0, 1)] == [[2], [0, 1, 3, 4]]


# ---- what goes wrong ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "size", "message"),
    [
        (
            ranks_worker.apart,
            2,
            "rank 1 is at 'pears (torch.float32 [2])' and rank 0 at 'apples (torch",
        ),
        (ranks_worker.formats, 2, "rank 1 is at 'ones (torch.float64 [2])'"),
        (ranks_worker.defect, 3, "rank 1: ZeroDivisionError: of rank 1"),
    ],
)
def test_the_first_rank_says_what_another_failed_of(run, size, message, tmp_path):
    processes = scenario(run, size, tmp_path)
    assert all(process.status for process in processes)
    assert message in processes[0].stderr


@pytest.mark.parametrize(
    "run", [ranks_worker.refused_first, ranks_worker.refused_before_all_are_there]
)
def test_all_end_where_the_first_rank_fails(run, tmp_path):
    first, second = scenario(run, 2, tmp_path)
    assert "IndexError" in first.stderr
    assert second.status == 2
    assert "rank 0 has ended without a word" in second.stderr


def test_ranks_with_other_options_are_refused(tmp_path):
    out = tmp_path / "out"
    asked = [(*PRUNE, "--out", str(out)), (*PRUNE, "--out", "x", "--damp", "0.1")]
    first, second = ended([command(*words) for words in asked], tmp_path)
    assert (first.status, second.status) == (2, 2)
    assert "rank 1" in first.stderr
    assert "damp was None and is 0.1 there" in first.stderr
    assert second.stdout + second.stderr == ""
    assert not list(tmp_path.iterdir())


OUTPUTS = DenseOutputs({"device": "x", "threads": "1", "torch": "2.9"}, "s", ("0x0.0p+0",), 1e-4)


def test_a_rank_that_differs_is_named_with_what_differs():
    asked, dense = {"torch": "2.9", "damp": None}, Fingerprint("v", "d", OUTPUTS)
    own = JournalManifest("osscar.run-log/3", asked, dense)

    class Three(Ranks):
        def all_gather(self, place, mine):
            return [mine, mine, other]

    for changed, difference in (
        ({"asked": {**asked, "torch": "1.0"}}, "torch was '2.9' and is '1.0' there"),
        ({"asked": {**asked, "damp": 0.1}}, "damp was None and is 0.1 there"),
        ({"dense": Fingerprint("w", "d", OUTPUTS)}, "the model's weights are others there"),
        ({"dense": Fingerprint("v", "e", OUTPUTS)}, "the calibration data are others there"),
    ):
        other = dataclasses.replace(own, **changed)
        with pytest.raises(RanksError, match=f"rank 2 is not asked .*{re.escape(difference)}"):
            own.check_alike(Three())


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path):
    run = command(*PRUNE, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "said.json"))
    log = tmp_path / "out.run"
    with ranks_of([run] * 2, tmp_path) as (first, second):
        end = time.monotonic() + PATIENCE
        while not list(log.glob("*.safetensors")) and time.monotonic() < end:
            time.sleep(0.01)
        second.kill()
        assert first.wait() == 2
    assert "rank 1 has ended without a word" in first.stderr
    assert "give the same command again to go on" in first.stderr
    assert not (tmp_path / "out").exists()
    done = len(list(log.glob("*.safetensors")))
    assert 1 <= done < 8

    for process in ended([run] * 2, tmp_path):
        assert process.status == 0, process.stderr
    found = json.loads((tmp_path / "said.json").read_text())
    expected = summary(CASES_AS_PRUNED.run())
    assert {layer["name"]: layer["support"] for layer in found["layers"]} == expected["support"]
    assert {layer["name"]: layer["loss"] for layer in found["layers"]} == pytest.approx(
        expected["loss"],
        rel=1e-6,  # the model is in float32, whose kernels round by shape
    )
    assert not log.exists()


def _demo_tokens() -> object:
    tokenizer = osscar.load_model("demo").tokenizer
    return osscar.load_calibration(CALIBRATION, tokenizer, samples=16, seqlen=64)


CASES_AS_PRUNED = Case(
    lambda: osscar.load_model("demo", device="cpu").model,
    _demo_tokens,
    {"heads": "3/4", "neurons": "1/2", "batch_size": 4},
)
"""What `PRUNE` asks for."""


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )

    def forward(self, x):
        contrast = (x - x.mean((2, 3), keepdim=True)).abs().mean((1, 2, 3), keepdim=True)
        return self.net(x / (contrast > 0.01))

def build():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 3, 12, 12)
"""


FLAWED = (
    *("prune", "net.py:build", "--channels", "0.5", "--calibration", "images.npz"),
    *("--samples", "16", "--no-normalize", "--batch-size", "4", "--out", "out"),
)
SAYS_OF_WHAT = "error: rank 1: the inputs of 'net.2' have NaN or infinite entries"


@pytest.fixture
def flawed(tmp_path):
    """Where the data lie that rank 1 fails of; nothing else may be left there."""
    (tmp_path / "net.py").write_text(NET)
    pixels = np.random.default_rng(0).integers(0, 200, (16, 12, 12, 3), dtype=np.uint8)
    sixth = torch.randperm(16, generator=named_generator("images", 0))[5]
    pixels[sixth] = 100  # without contrast; drawn into the second batch of four, which is rank 1's
    np.savez(tmp_path / "images.npz", images=pixels)
    before = sorted(tmp_path.iterdir())
    yield tmp_path
    assert sorted(p for p in tmp_path.iterdir() if p.name != "__pycache__") == before


def test_the_first_rank_says_of_what_another_failed_and_leaves_nothing(flawed):
    first, second = ended([command(*FLAWED)] * 2, flawed)
    assert (first.status, second.status) == (2, 2)
    assert SAYS_OF_WHAT in first.stderr
    assert (first.stderr.count("error: "), second.stderr) == (1, "")


@pytest.mark.slow
def test_torchrun_says_of_what_a_rank_failed_and_leaves_nothing(flawed):
    ended = torchrun("osscar", *FLAWED, place=flawed)
    assert ended.returncode == 1
    assert SAYS_OF_WHAT in ended.stderr
    assert ended.stderr.count("error: ") == 1


@pytest.mark.slow
def test_torchrun_prunes(tmp_path):
    ended = torchrun("osscar", *PRUNE, "--out", "out", "--json", "said.json", place=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("parameters became") == 1
    found = json.loads((tmp_path / "said.json").read_text())
    expected = summary(CASES_AS_PRUNED.run())
    assert {layer["name"]: layer["support"] for layer in found["layers"]} == expected["support"]
    assert osscar.load(tmp_path / "out").num_parameters() == found["parameters_after"]


@pytest.mark.slow
def test_torchrun_recovers_what_one_process_does(tmp_path):
    data = ("--samples", "8", "--seqlen", "32", "--device", "cpu")
    prune = ("prune", "demo", "--neurons", "1/8", "--backend", "wanda", *data)
    train = ("--dense", "demo", "--steps", "4", "--learning-rate", "1e-4", "--device", "cpu")
    train = (*train, "--mixed-precision", "no")
    recover = ("recover", "small", *train, "--text", "text.txt")
    (tmp_path / "text.txt").write_text(builtin_text(Split.TRAINING)[:5000])
    for words in ((*prune, "--out", "small"), (*recover, "--out", "alone")):
        alone = forked(command(*words), tmp_path)
        assert alone.wait() == 0, alone.stderr
    for words in (
        (*prune, "--recover", "--recover-steps", "2", "--out", "both"),
        (*recover, "--out", "two"),
    ):
        process = torchrun("osscar", *words, place=tmp_path)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("saved: ") == process.stdout.count("recovered: ") == 1
    names = ("small", "alone", "two", "both")
    small, one, two, _ = (osscar.load(tmp_path / name).state_dict() for name in names)
    assert not all(torch.equal(x, small[name]) for name, x in one.items())
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=2e-3, atol=1e-4)  # float16 on disk
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((*names, "text.txt"))


def torchrun(module: str, *arguments: str, place: Path) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, "-m", module, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def told(monkeypatch):
    def tell(rank: str, size: str) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": size}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")

    return tell


def test_commands_for_one_process_refuse_to_run_in_several(told, monkeypatch, capsys):
    told("0", "2")
    monkeypatch.setattr(sys, "argv", ["osscar", "backends"])
    with pytest.raises(SystemExit) as stop:
        osscar.cli.main()
    assert stop.value.code == 2
    assert "osscar backends runs in one process, and 2 were launched" in capsys.readouterr().err


def test_a_launch_that_makes_no_sense_is_refused(told, monkeypatch):
    for rank, size in (("2", "2"), ("-1", "2"), ("one", "2"), ("0", "0"), ("0", "9" * 20)):
        told(rank, size)
        with pytest.raises(RanksError, match=f"RANK is '{rank}' and WORLD_SIZE '{size}'"):
            launched()
    monkeypatch.setenv("WORLD_SIZE", "8")  # which some set for all containers
    monkeypatch.delenv("RANK")
    assert launched() == (0, 1)
