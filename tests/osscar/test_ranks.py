"""Several processes that prune one model: they come to what one comes to, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import osscar
import osscar.cli
from osscar.base.errors import NonFiniteError
from osscar.base.ranks import ALONE, Ranks, together
from osscar.cli.common import guard
from osscar.request import PruningRequest
from osscar.run.prune import prune_as_asked
from tests.osscar.families import tiny, tokens
from tests.osscar.forked import PATIENCE, Forked, forked
from tests.osscar.mixtures import mixture
from tests.osscar.networks import images, small_net

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes, and uses gloo")

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


def command(*arguments: str) -> Callable[[], object]:
    """What a rank does that runs a command of osscar."""

    def run() -> None:
        sys.argv = ["osscar", *arguments]
        osscar.cli.main()

    return run


def torchrun(*arguments: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in two new processes, which order their sets in ways of their own."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *launcher, "-m", "osscar", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with as many threads as ranks do: some kernels round otherwise with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the same as one process -------------------------------------------------------------

BUDGET = {"sparsity": 0.4, "batch_size": 3, "certify": True}
CASES = {
    "a budget": (lambda: tiny("llama-gqa", layers=1).double(), lambda: tokens(16, 24), BUDGET),
    "images": (small_net, images, {"sparsity": 0.4, "residual": 0.75, "batch_size": 12}),
    "experts": (
        lambda: mixture("mixtral", num_hidden_layers=1),
        lambda: tokens(16, 24),
        {"neurons": 0.5, "batch_size": 3},
    ),
}


def summary(name: str, ranks: Ranks = ALONE) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Prune in a case; return what it comes to."""
    model, data, asked = CASES[name]
    result = prune_as_asked(model(), data(), PruningRequest(device="cpu", **asked), ranks=ranks)
    found = {
        "loss": {layer.name: layer.loss for layer in result.layers},
        "divergence": result.distance.value,
        "curves": {} if result.budget is None else result.budget.curves,
        "support": {layer.name: list(layer.support) for layer in result.layers},
        "damp": [layer.damp for layer in result.layers],
        "batch_norms": result.batch_norms,
        "skipped": [group.name for group in result.skipped],
    }
    weights = {name: x.detach().clone() for name, x in result.model.state_dict().items()}
    return json.loads(json.dumps(found)), weights


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("images", 2), ("experts", 3))]


@pytest.mark.parametrize(("name", "size"), [("a budget", 2), *SLOW])
def test_ranks_come_to_what_one_process_does(name, size, tmp_path):
    def run() -> None:
        with together() as ranks:
            found, weights = summary(name, ranks)
            safetensors.torch.save_file(weights, tmp_path / f"{ranks.rank}.safetensors")
            (tmp_path / f"{ranks.rank}.json").write_text(json.dumps(found))

    expected, weights = summary(name)
    for process in ended([run] * size, tmp_path):
        assert process.status == 0, process.stderr
    assert len({(tmp_path / f"{rank}.safetensors").read_bytes() for rank in range(size)}) == 1
    for key, x in safetensors.torch.load_file(tmp_path / "0.safetensors").items():
        torch.testing.assert_close(x, weights[key], rtol=1e-6, atol=1e-6)
    for rank in range(size):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for key in ("loss", "divergence"):  # of sums that were added up in another order
            assert found.pop(key) == pytest.approx(expected[key], rel=1e-9, abs=1e-15)
        for group, losses in found.pop("curves").items():
            assert losses == pytest.approx(expected["curves"][group], rel=1e-9, abs=1e-15)
        assert found == {key: expected[key] for key in found}


def test_words_and_tensors_arrive_as_they_were(tmp_path):
    def tell() -> None:
        with together() as ranks:
            mine = f"of {ranks.rank}", torch.full((2, 3), ranks.rank + 0.5).bfloat16()
            everyone = ranks.all_gather("greetings", mine)
            text, x = ranks.broadcast("the first", lambda: mine)
            powers = torch.full((3,), 2.0**ranks.rank, dtype=torch.float64)
            sums = [torch.tensor(ranks.rank), powers]
            ranks.all_reduce("sums", sums)
            said = {
                "texts": [words for words, _ in everyone],
                "tensors": [tensor.tolist() for _, tensor in everyone],
                "first": [text, str(x.dtype)],
                "sums": [x.tolist() for x in sums],
            }
            (tmp_path / f"{ranks.rank}.json").write_text(json.dumps(said))

    for process in ended([tell] * 3, tmp_path):
        assert process.status == 0, process.stderr
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert said[0] == said[1] == said[2]
    assert said[0] == {
        "texts": ["of 0", "of 1", "of 2"],
        "tensors": [[[rank + 0.5] * 3] * 2 for rank in range(3)],
        "first": ["of 0", "torch.bfloat16"],
        "sums": [3, [7.0] * 3],
    }


@given(st.lists(st.floats(0.1, 100), max_size=30), st.integers(1, 6))
def test_work_is_shared_out_whole_and_evenly(costs, size):
    shares = [Ranks(rank, size).share(costs) for rank in range(size)]
    assert sorted(piece for share in shares for piece in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0.0) + 1e-9
    # One large piece weighs as much as many small ones.
    assert [Ranks(rank, 2).share([1, 1, 5, 1, 1]) for rank in (0, 1)] == [[2], [0, 1, 3, 4]]


# ---- what goes wrong ---------------------------------------------------------------------


def apart(ranks: Ranks) -> None:
    """Do different things on different ranks."""
    ranks.all_reduce("apples" if ranks.first else "pears", [torch.ones(2)])


def defect(ranks: Ranks) -> None:
    """Fail on rank 1 by a defect, while the others add up."""
    ranks.all_reduce("ones", [torch.ones(2)])
    if ranks.rank == 1:
        raise ZeroDivisionError("of rank 1")
    ranks.all_reduce("more ones", [torch.ones(2)])


def test_where_one_rank_overflows_all_leave_the_block_and_go_on(tmp_path):
    """Wherever the others are: at a sum, at what the first makes, or at the end of the block."""

    def fail(ranks: Ranks, steps: int) -> None:
        with ranks.alike("a block"):
            if ranks.rank == 1:
                raise NonFiniteError("too large", "use less")
            for step in range(steps):
                ranks.all_reduce(f"sum {step}", [torch.ones(2)])
                ranks.broadcast(f"text {step}", lambda: "x")

    def run() -> None:
        with together() as ranks:
            for steps in (0, 1, 2):
                with pytest.raises(NonFiniteError, match="too large"):
                    fail(ranks, steps)
                assert ranks.all_gather("numbers", ranks.rank) == [0, 1]

    for process in ended([run] * 2, tmp_path):
        assert process.status == 0, process.stderr


def guarded(run: Callable[[Ranks], None]) -> Callable[[], None]:
    """What a rank does that ends as a command does."""

    def guarded_run() -> None:
        with guard(), together() as ranks:
            run(ranks)

    return guarded_run


@pytest.mark.parametrize(
    ("run", "size", "message"),
    [
        (apart, 2, "rank 1 is at 'pears (torch.float32 [2])' and rank 0 at 'apples (torch"),
        (defect, 3, "rank 1: ZeroDivisionError: of rank 1"),
    ],
)
def test_the_first_rank_says_what_another_failed_of(run, size, message, tmp_path):
    processes = ended([guarded(run)] * size, tmp_path)
    assert all(process.status for process in processes)
    assert message in processes[0].stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path):
    more = ("--recover", "--set", "recovery.steps=2", "--out", "out", "--json", "said.json")
    log, asked = tmp_path / "out.run", (*PRUNE, *more)
    with ranks_of([command(*asked)] * 2, tmp_path) as (first, second):
        end = time.monotonic() + PATIENCE
        while not list(log.glob("0*.safetensors")) and time.monotonic() < end:
            time.sleep(0.01)
        second.kill()
        assert first.wait() == 2
    assert "rank 1 stopped without an error message" in first.stderr
    assert "run the same command again to continue" in first.stderr
    assert not (tmp_path / "out").exists()
    assert 1 <= len(list(log.glob("0*.safetensors"))) < 8

    process = torchrun(*asked, place=tmp_path)
    assert process.returncode == 0, process.stderr
    for line in ("parameters became", "recovered: ", "saved: "):
        assert process.stdout.count(line) == 1
    assert not log.exists()
    found = json.loads((tmp_path / "said.json").read_text())
    assert osscar.load(tmp_path / "out").num_parameters() == found["parameters_after"]
