"""What errors and warnings say: where they point, and by which names they call options."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.base.errors import (
    FileError,
    NonFiniteError,
    OptionError,
    RequestError,
    for_reader,
    on_command_line,
)
from tests.osscar.families import tiny, tokens


@pytest.mark.parametrize(
    ("message", "in_python"),
    [
        ("omit --max-memory", "omit max_memory="),
        ("give --dtype float32, or raise --damp", "give dtype=float32, or raise damp="),
        ("--size 1.50GB cannot be met", "size=1.50GB cannot be met"),
        ("leave it out (--skip 'h.0.*').", "leave it out (skip='h.0.*')."),
        ("give --inputs FILE (example_inputs= in Python), two", "give example_inputs=, two"),
        ("omit --mean and --std (preprocessing= in Python)", "omit preprocessing="),
        ("begin anew with --restart", "begin anew with --restart"),
        ("run `osscar prune --max-memory 8GB`", "run `osscar prune --max-memory 8GB`"),
    ],
)
def test_options_have_the_names_that_their_reader_gives(message: str, in_python: str) -> None:
    assert for_reader(message) == str(OptionError(message)) == in_python
    assert str(FileError("a.npz", message)) == f"a.npz: {in_python}"
    with on_command_line():
        assert str(OptionError(message)) == re.sub(r" \(\S+ in Python\)", "", message)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval()


def singular() -> None:
    X = torch.randn(4, 8, dtype=torch.float64)
    solvers.SubsetProblem.from_gram(X.T @ X / 4, torch.randn(8, 3).double(), keep=4, damp=0)


WARNING = {
    "of the walk": lambda: osscar.prune(tiny("opt"), tokens(1, 16), neurons=0.5, device="cpu"),
    "of the groups": lambda: osscar.prune(wide(), torch.zeros(64, 6), neurons=0.5, device="cpu"),
    "of solvers through prune": lambda: osscar.prune(
        wide(), torch.randn(16, 6), neurons=0.5, damp=0.0, target="weights", device="cpu"
    ),
    "of solvers": singular,
    "of loaders": lambda: osscar.prune(
        wide(), [(torch.randn(64, 6), torch.zeros(64))], neurons=0.5, device="cpu"
    ),
}


@pytest.mark.parametrize("warned", WARNING.values(), ids=[*WARNING])
def test_a_warning_points_at_the_line_that_called(warned) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warned()
    own = [one for one in seen if issubclass(one.category, UserWarning)]
    assert own
    assert {Path(one.filename) for one in own} == {Path(__file__)}


def test_a_keyword_that_is_almost_one_is_suggested() -> None:
    for ask, name, meant in (
        (osscar.prune, "sparcity", "sparsity"),
        (osscar.estimate, "batchsize", "batch_size"),
        (osscar.recover, "learnin_rate", "learning_rate"),
    ):
        with pytest.raises(TypeError, match=f"'{name}'; did you mean '{meant}'"):
            ask(wide(), wide(), None, **{name: 1})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'xyz'$"):
        osscar.prune(wide(), torch.randn(8, 6), xyz=1)


def test_a_model_in_memory_is_no_checkpoint() -> None:
    model = wide()
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1 of 240 .*'0\.weight'") as caught:
        osscar.prune(model, torch.randn(64, 6), neurons=0.5)
    assert "checkpoint" not in str(caught.value)
    with pytest.raises(RequestError, match=r"a budget \(sparsity=, params=, size=, memory="):
        osscar.prune(wide(), torch.randn(64, 6))
