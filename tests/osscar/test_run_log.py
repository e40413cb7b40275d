"""Runs that are killed go on, and end with the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import osscar
from osscar.base.errors import BusyError, RunError
from osscar.base.locks import LOCK_FILE, file_lock
from osscar.preparation.fingerprint import sha256_of
from osscar.pruning.prune import prune_as_asked
from osscar.pruning.run_log import RunLog
from osscar.request import PruningRequest
from tests.osscar.families import tiny, tokens
from tests.osscar.networks import Concat, images, small_net

REQUEST = PruningRequest(sparsity=0.5, device="cpu")


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture
def killing(monkeypatch):
    """Let the run end when the n-th record has been written."""

    def after(count):
        original = RunLog.append

        def append(self, index, record):
            original(self, index, record)
            if index + 1 == count:
                raise Killed

        monkeypatch.setattr(RunLog, "append", append)

    return after


CASES = {
    "language": (lambda: tiny("llama-gqa"), tokens),
    "vision": (small_net, images),  # with a walk that sets out again, and batch norm
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_that_was_killed_ends_with_the_same_bits(name, count, killing, tmp_path, monkeypatch):
    build_model, data = CASES[name]
    whole = prune_as_asked(build_model(), data(), REQUEST)
    killing(count)
    log = RunLog(tmp_path / "log")
    with pytest.raises(Killed):
        prune_as_asked(build_model(), data(), REQUEST, log)
    monkeypatch.undo()
    assert log.committed == count
    again = prune_as_asked(build_model(), data(), REQUEST, log)
    assert again.plan == whole.plan
    assert [layer.name for layer in again.layers] == [layer.name for layer in whole.layers]
    assert [layer.loss for layer in again.layers] == [layer.loss for layer in whole.layers]
    found = again.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, found[key]), key


def test_what_is_recorded_is_not_solved_again(killing, tmp_path, monkeypatch):
    killing(3)
    log = RunLog(tmp_path / "log")
    with pytest.raises(Killed):
        prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    monkeypatch.undo()
    solved = []
    original = osscar.pruning.groups._prune_group

    def spy(site, *rest):
        solved.append(site.group.name)
        return original(site, *rest)

    monkeypatch.setattr(osscar.pruning.groups, "_prune_group", spy)
    result = prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    assert solved == [layer.name for layer in result.layers][3:]


def other_model():
    return tiny("opt", seed=1), tokens(), REQUEST


def other_data():
    return tiny("opt"), tokens(seed=2), REQUEST


def other_request():
    return tiny("opt"), tokens(), PruningRequest(sparsity=0.5, damp=0.02, device="cpu")


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (other_model, "the model's weights are others"),
        (other_data, "the calibration data are others"),
        (other_request, "damp was None and is 0.02"),
    ],
)
def test_another_run_is_refused_with_the_difference(changed, message, tmp_path):
    log = RunLog(tmp_path / "log")
    prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    with pytest.raises(RunError, match=f"{message}.*--restart"):
        prune_as_asked(*changed(), log)
    log.remove()
    assert not log.directory.exists()
    prune_as_asked(*changed(), log)


def cut(log):
    file = log.directory / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def forged(log):
    file = log.directory / "00000.safetensors"
    tensors = safetensors.torch.load_file(file)
    words = {"index": 0, "plan": {"name": "x"}, "report": {}, "weights": 10**9}
    safetensors.torch.save_file(tensors, file, {"record": json.dumps(words)})


def swapped(log):
    first, second = (log.directory / f"0000{i}.safetensors" for i in range(2))
    first.write_bytes(second.read_bytes())


def unreadable_manifest(log):
    (log.directory / "log.json").write_text("[" * 10**5)


@pytest.mark.parametrize("damage", [cut, forged, swapped, unreadable_manifest])
def test_a_damaged_log_is_refused(damage, tmp_path):
    log = RunLog(tmp_path / "log")
    prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    damage(log)
    with pytest.raises(RunError, match="--restart"):
        prune_as_asked(tiny("opt"), tokens(), REQUEST, log)


def test_foreign_files_in_a_log_survive_its_removal(tmp_path):
    log = RunLog(tmp_path / "log")
    prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    (log.directory / "thesis.tex").write_text("years of work")
    log.remove()
    assert [path.name for path in log.directory.iterdir()] == ["thesis.tex"]


def test_a_log_in_use_and_a_directory_of_someone_else_are_not_removed(tmp_path):
    log = RunLog(tmp_path / "log")
    prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    with file_lock(log.directory / LOCK_FILE, log.directory), pytest.raises(BusyError):
        log.remove()
    assert log.committed > 0
    foreign = RunLog(tmp_path / "mine")
    foreign.directory.mkdir()
    (foreign.directory / "00001.safetensors").write_bytes(b"weights of someone else")
    with pytest.raises(RunError, match="and no run; move that away"):
        foreign.remove()
    assert (foreign.directory / "00001.safetensors").exists()


def test_weights_that_were_changed_are_refused(tmp_path):
    log = RunLog(tmp_path / "log")
    prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    file = log.directory / "00000.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        words = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["0"] = tensors["0"] + 1
    safetensors.torch.save_file(tensors, file, words)
    with pytest.raises(RunError, match=r"not those that were written.*--restart"):
        prune_as_asked(tiny("opt"), tokens(), REQUEST, log)


def test_weights_of_another_form_are_refused(tmp_path):
    log = RunLog(tmp_path / "log")
    prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    file = log.directory / "00000.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        words = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["0"] = tensors["0"][:1].contiguous()
    record = json.loads(words["record"])
    record["digest"] = sha256_of(sorted(tensors.items()))
    safetensors.torch.save_file(tensors, file, {**words, "record": json.dumps(record)})
    with pytest.raises(RunError, match=r"of another form.*--restart"):
        prune_as_asked(tiny("opt"), tokens(), REQUEST, log)


def test_a_removal_that_was_interrupted_leaves_what_a_run_goes_on_from(tmp_path, monkeypatch):
    log = RunLog(tmp_path / "log")
    result = prune_as_asked(tiny("opt"), tokens(), REQUEST, log)
    unlink, left = Path.unlink, [2]

    def some(self, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", some)
    with pytest.raises(Killed):
        log.remove()
    monkeypatch.undo()
    assert log.committed == len(result.layers) - 2
    again = prune_as_asked(tiny("opt"), tokens(), REQUEST, RunLog(log.directory))
    assert again.plan == result.plan
    RunLog(log.directory).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_log_in_which_nothing_is_recorded_goes_again(tmp_path):
    log = RunLog(tmp_path / "deep" / "log")
    with log.held():
        assert (log.directory / LOCK_FILE).exists()
    assert list(tmp_path.iterdir()) == []
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "log.json").write_text("notes of someone else")
    with RunLog(foreign).held():
        pass
    assert [path.name for path in foreign.iterdir()] == ["log.json"]


def test_groups_that_share_a_consumer_go_on_to_the_same_bits(tmp_path):
    """The dense weights of a consumer are those before the first of its groups was committed."""
    torch.manual_seed(0)
    model, x = Concat().eval(), torch.randn(64, 6)
    request = PruningRequest(sparsity=0.5, allocation="uniform")
    whole = prune_as_asked(model, x, request, RunLog(tmp_path / "whole"))
    count = len(list((tmp_path / "whole").glob("0*.safetensors")))
    assert count > 4
    for kept in range(1, count):
        log = RunLog(tmp_path / f"log{kept}")
        shutil.copytree(tmp_path / "whole", log.directory)
        for file in sorted(log.directory.glob("0*.safetensors"))[kept:]:
            file.unlink()
        again = prune_as_asked(model, x, request, log)
        for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep", {"model.decoder.layers.0.neurons": 10**6}),
        ("keep", {"model.decoder.layers.0.neurons": 0}),
        ("keep", {"nowhere": 1}),
        ("budget.curves", {"nowhere": [1.0, 0.0]}),
        ("budget.curves", {"model.decoder.layers.0.neurons": []}),
        ("budget.reached", -1.0),
        ("budget.dense", 0.0),
        ("budget.predicted", 1e-9),
        ("run", "0" * 64),
    ],
)
def test_what_a_log_says_that_groups_keep_is_not_believed(key, value, tmp_path):
    log = RunLog(tmp_path / "log")
    request = PruningRequest(sparsity=0.5, backend="wanda")
    prune_as_asked(tiny("opt"), tokens(), request, log)
    file = log.directory / "allocation.json"
    content = json.loads(file.read_text())
    allocated = content["allocated"]
    place = {"budget": allocated["budget"], "keep": allocated, "run": content}[
        key.partition(".")[0]
    ]
    place[key.rpartition(".")[2]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"begin anew with --restart"):
        prune_as_asked(tiny("opt"), tokens(), request, log)
