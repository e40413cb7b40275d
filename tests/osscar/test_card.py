"""The model card of a checkpoint: what it says is so, and the code in it reads the checkpoint."""

import re

import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import OutputError
from osscar.checkpoint.card import CARD_FILE, PICTURE_FILE
from osscar.proof.lineage import note
from tests.osscar.families import tiny, tokens


class Perceptron(nn.Module):
    """A network of code that is not known to the package."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def pruned(model, data, **keep):
    return osscar.prune(model, data, backend="magnitude", device="cpu", **keep)


CASES = {
    "stock": lambda: (tiny("llama-gqa"), pruned(tiny("llama-gqa"), tokens(), neurons="1/2")),
    "any shape": lambda: (tiny("opt"), pruned(tiny("opt"), tokens(), heads="2/3", neurons="1/2")),
    "own code": lambda: ((d := Perceptron()), pruned(d, torch.rand(32, 6), neurons=4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_code_of_a_card_reads_its_checkpoint(name, tmp_path):
    dense, result = CASES[name]()
    data = torch.rand(4, 6) if name == "own code" else tokens()
    result.save(tmp_path / "small", report=result.document(dense, data))
    card = (tmp_path / "small" / CARD_FILE).read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (2 if name == "any shape" else 1)
    for block in blocks:
        found = {"dense": dense}
        code = block.replace("DIRECTORY", str(tmp_path / "small")).replace("= ...", "= dense")
        exec(code, found)
        mine = dict(result.model.named_parameters())
        for key, tensor in found["model"].named_parameters():
            assert torch.equal(tensor, mine[key])


def test_a_card_tells_what_was_removed_over_all_runs_and_shows_it(tmp_path, drawn):
    dense = tiny("opt")
    once = pruned(dense, tokens(), heads="2/3", neurons="1/2")
    twice = pruned(once.model, tokens(), neurons=8)
    twice.save(tmp_path / "small", report=twice.document(once.model, tokens()))
    card = (tmp_path / "small" / CARD_FILE).read_text()
    units = {
        kind: [group.units for group in once.plan.groups if group.kind == kind]
        for kind in ("heads", "neurons")
    }
    left = sum(len(group.kept) for group in once.plan.groups if group.kind == "heads")
    assert f"| heads | {len(units['heads'])} | {sum(units['heads'])} | {left} |" in card
    count = len(units["neurons"])
    assert f"| neurons | {count} | {sum(units['neurons'])} | {8 * count} |" in card
    assert f"| parameters | {twice.parameters_before:,} | {twice.parameters_after:,} |" in card
    assert f"({PICTURE_FILE})" in card
    assert (tmp_path / "small" / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_a_report_a_card_tells_what_the_model_carries(tmp_path):
    result = pruned(tiny("opt"), tokens(), heads="2/3", neurons="1/2")
    note(result.model, source="directory models/someone/a|b`*[x](y)*")
    osscar.save(result.model, tmp_path / "small", report={"schema": "mine", "settings": 1})
    card = (tmp_path / "small" / CARD_FILE).read_text()
    assert "someone" not in card
    assert r"# a\|b\`\*\[x\](y)\*, pruned" in card
    assert PICTURE_FILE not in card


def test_the_hub_reads_the_head_of_a_card(tmp_path):
    from huggingface_hub import ModelCard

    result = pruned(tiny("opt"), tokens(), neurons="1/2")
    result.save(tmp_path / "small")
    data = ModelCard.load(tmp_path / "small" / CARD_FILE).data
    assert (data.library_name, data.tags) == ("transformers", ["pruned", "osscar"])


def test_a_readme_of_somebody_elses_is_not_replaced(tmp_path):
    result = pruned(tiny("opt"), tokens(), neurons="1/2")
    place = tmp_path / "small"
    place.mkdir()
    (place / CARD_FILE).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            result.save(place, overwrite=overwrite)
    assert [(path.name, path.read_text()) for path in place.iterdir()] == [(CARD_FILE, "mine")]
