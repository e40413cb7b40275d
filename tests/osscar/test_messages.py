"""What `import osscar` offers and costs, and what errors and warnings say and point at."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import osscar
import solvers
from osscar.base.errors import FileError, OptionError, OsscarError
from osscar.cli.commands import app
from osscar.cli.settings import known_names
from osscar.recovery.request import RecoveryRequest
from osscar.request import PruningRequest
from tests.osscar.families import tiny, tokens


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["sweep", "demo", "--sparsity", "0.2,0.3", "--out", "x"], 7),
    ],
)
def test_help_loads_no_numerics_and_a_command_says_what_it_does_before_it_does(words, status):
    script = (
        "import sys, osscar.cli\n"
        "class Ends:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'numpy', 'transformers', 'matplotlib'): sys.exit(7)\n"
        "sys.meta_path.insert(0, Ends())\n"
        f"sys.argv = ['osscar', *{words}]\n"
        "osscar.cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = "progress: loading torch, which takes seconds\n" if status else ""
    assert (ended.returncode, ended.stderr, bool(ended.stdout)) == (status, said, not status)


def test_a_message_is_the_same_on_the_command_line_and_in_python(run):
    """What looks like an option in a name is none, and both forms stand where it advises."""
    name = "my --seed 3/w.npz"
    assert str(OptionError(f"no {name!r}")) == f"no {name!r}"
    assert str(FileError(name, "is empty")) == f"{name}: is empty"
    with pytest.raises(OsscarError, match=r"context=4096 in Python") as told:
        osscar.prune(wide(), torch.randn(8, 6), memory=0.5)
    assert str(told.value) in " ".join(
        run("prune", "demo", "--memory", 0.5, "--out", "x")[2].split()
    )


BEFORE_LOADING = {
    "sweep": "a sweep needs a list of values for a budget, and none is given; give one, such as",
    "prune --memory 0.5": "give the context, too",
    "prune --max-top1-drop 2% --max-divergence 0.1": "takes one quality target",
    "prune": "nothing to prune: give a budget",
    "prune --params 0.8 --params 0.7": "--params is given more than once",
    "prune --max-top1-drop 2% --samples 500": "596 different calibration .* are 500, 96 too few",
    "prune --params 0.5 --set recovery.steps=4": "steps is 4; give --recover, too, or omit it",
    "prune --params 0.5 --calibration none.npz": "there is no file 'none.npz'; check the path",
    "sweep --params 0.5,1.5": "1.5",
    "recover --steps 0 --dense net.py:build": "steps is 0; it must be greater than or equal to 1",
}


@pytest.mark.parametrize("words", BEFORE_LOADING)
def test_what_the_arguments_decide_is_said_before_the_model_is_built(
    words, run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("raise RuntimeError('built')")
    command, *options = words.split()
    status, out, err = run(command, "net.py:build", *options, "--out", "small")
    assert (status, out) == (2, "")
    assert re.search(BEFORE_LOADING[words], " ".join(err.split())), err
    assert [one.name for one in tmp_path.iterdir()] == ["net.py"]


def messages(file):
    """Yield the texts of a file that are no docstrings, with {} for what is filled in."""
    tree = ast.parse(file.read_text())
    bodies = (getattr(node, "body", ()) for node in ast.walk(tree))
    statements = [one for body in bodies if isinstance(body, list) for one in body]
    parts = [x for x in ast.walk(tree) if isinstance(x, ast.JoinedStr)]
    inside = {id(one.value) for one in statements if isinstance(one, ast.Expr)}
    inside |= {id(x) for one in parts for x in ast.walk(one) if x is not one}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in inside:
            yield "".join(
                getattr(one, "value", "") if isinstance(one, ast.Constant) else "{}"
                for one in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield node.value


def test_messages_of_the_library_name_fields_beside_options():
    """Those of commands alone, and of pages that commands write, name options."""
    package = Path(osscar.__file__).parent
    files = [f for f in package.rglob("*.py") if "cli" not in f.parts and "page" not in f.stem]
    # In Python what is written, and how many samples there are, is no field; nor are there logs.
    own = "--out", "--samples", "--seqlen", "--restart", "--only-binary", "--head"
    found = 0
    fields = {*known_names(PruningRequest), *known_names(RecoveryRequest)}
    commands = [app[name] for name in app if name.isalpha()]
    options = {
        name
        for one in commands
        if one.default_command
        for it in one.assemble_argument_collection()
        for name in it.names
    }
    for file in files:
        for text in messages(file):
            for option in re.findall(r"(?<![\w-])--(?:set [a-z]|[a-z])[a-z0-9_-]*", text):
                if " " not in text or option in own:
                    continue
                found += 1
                assert option.partition(" ")[0] in options, f"{file.name}: {text}"
                field = option.removeprefix("--").removeprefix("set ").replace("-", "_")
                assert field in fields or " " not in option, f"{file.name}: {text}"
                rest = text.replace(option, "")
                assert re.search(rf"\b{field}\b|in Python", rest), f"{file.name}: {text}"
    assert found > 50


def wide():
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval()


def singular():
    X = torch.randn(4, 8, dtype=torch.float64)
    solvers.SubsetProblem.from_gram(X.T @ X / 4, torch.randn(8, 3).double(), keep=4, damp=0)


FEW = {"neurons": 0.5, "device": "cpu"}
WARNING = {
    "of the walk": lambda: osscar.prune(
        tiny("opt", layers=1), tokens(1, 16), backend="magnitude", **FEW
    ),
    "of the groups": lambda: osscar.prune(wide(), torch.zeros(64, 6), **FEW),
    "of solvers": singular,
    "of loaders": lambda: osscar.prune(wide(), [(torch.randn(64, 6), torch.zeros(64))], **FEW),
}


@pytest.mark.parametrize("warned", WARNING.values(), ids=[*WARNING])
def test_a_warning_points_at_the_line_that_called(warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warned()
    own = [one for one in seen if issubclass(one.category, UserWarning)]
    places = {one.filename.partition(":")[0] for one in own}
    assert {Path(place) for place in places} == {Path(__file__)}
    for one in own:  # the caller's line itself is not echoed
        shown = warnings.formatwarning(one.message, one.category, one.filename, one.lineno)
        assert shown.count("\n") == 1, shown


def test_warnings_of_one_kind_are_one_with_the_list_of_layers():
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 6))]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        osscar.prune(nn.Sequential(*layers).eval(), torch.randn(8, 6), neurons=0.5, damp=0.1)
    (told,) = [str(one.message) for one in seen if "rank-deficient" in str(one.message)]
    assert re.search(r"of 2 \(\d calibration positions for 40 inputs\); 5 .* and 2 more; ", told)
