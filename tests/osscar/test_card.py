"""The model card of a checkpoint: what it says is so, and the code in it reads the checkpoint."""

import re

import pytest
import torch

import osscar
from osscar.base.errors import OutputError
from osscar.checkpoint.card import CARD_FILE, PICTURE_FILE
from osscar.network.modules import copied
from osscar.proof.lineage import note
from tests.osscar.families import tokens


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("llama", 1), ("opt", 2), ("mixture", 1), ("own code", 1), ("program", 1)],
)
def test_the_code_of_a_card_reads_its_checkpoint(name, blocks, runs, tmp_path):
    dense, data, result = runs[name].dense, runs[name].data, runs[name].result
    result.save(tmp_path / "small", report=result.document(dense, data))
    card = (tmp_path / "small" / CARD_FILE).read_text()
    found = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(found) == blocks
    for block in found:
        names = {"dense": dense}
        code = block.replace("DIRECTORY", str(tmp_path / "small")).replace("= ...", "= dense")
        exec(code, names)
        mine = dict(result.model.named_parameters())
        for key, tensor in names["model"].named_parameters():
            assert torch.equal(tensor, mine[key])


def test_a_card_tells_what_was_removed_over_all_runs_and_shows_it(runs, tmp_path, drawn):
    once, few = runs["opt"].result, {"backend": "magnitude", "device": "cpu"}
    twice = osscar.prune(once.model, tokens(), neurons=4, **few)
    twice.save(tmp_path / "small", report=twice.document(once.model, tokens()))
    card = (tmp_path / "small" / CARD_FILE).read_text()
    units = {
        kind: [group.units for group in once.plan.groups if group.kind == kind]
        for kind in ("heads", "neurons")
    }
    left = sum(len(group.kept) for group in once.plan.groups if group.kind == "heads")
    assert f"| heads | {len(units['heads'])} | {sum(units['heads'])} | {left} |" in card
    count = len(units["neurons"])
    assert f"| neurons | {count} | {sum(units['neurons'])} | {4 * count} |" in card
    assert f"| parameters | | {twice.parameters_before:,} | {twice.parameters_after:,} |" in card
    assert f"({PICTURE_FILE})" in card
    assert (tmp_path / "small" / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_without_a_report_a_card_tells_what_the_model_carries(runs, tmp_path):
    model = copied(runs["opt"].result.model)
    note(model, source="directory models/someone/a|b`*[x](y)*")
    osscar.save(model, tmp_path / "small", report={"schema": "mine", "settings": 1})
    card = (tmp_path / "small" / CARD_FILE).read_text()
    assert "someone" not in card
    assert r"# a\|b\`\*\[x\](y)\*, pruned" in card
    assert PICTURE_FILE not in card


def test_the_hub_reads_the_head_of_a_card(runs, tmp_path):
    from huggingface_hub import ModelCard

    runs["opt"].result.save(tmp_path / "small")
    data = ModelCard.load(tmp_path / "small" / CARD_FILE).data
    assert (data.library_name, data.tags) == ("transformers", ["pruned", "osscar"])


def test_a_readme_of_somebody_elses_is_not_replaced(runs, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    (place / CARD_FILE).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            runs["opt"].result.save(place, overwrite=overwrite)
    assert [(path.name, path.read_text()) for path in place.iterdir()] == [(CARD_FILE, "mine")]
