"""Families of transformers: heads and neurons found, shrunk, proved, saved, reloaded elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from osscar.checkpoint import directory as checkpoint
from osscar.proof.equivalence import proof_outputs
from tests import collected
from tests.zoo import FAMILIES, transformers_case

from .measure import LEAST_EFFECT, shrink_by_half

pytestmark = pytest.mark.slow

_EXPECTED = {
    # Blocks share their position bias, and so their heads: of encoder, decoder, and in between.
    "t5": {"heads": 3, "neurons": 4},
    "bart": {"heads": 6, "neurons": 4},
    "whisper": {"heads": 6, "neurons": 4, "channels": 1},
    "wav2vec2": {"heads": 2, "neurons": 2, "channels": 1},
    "clip": {"heads": 4, "neurons": 4},
    "swin": {"heads": 4, "neurons": 4},
    "bloom": {"neurons": 2},  # heads have slopes that the code makes (ALiBi)
    "convnext": {"neurons": 8},
    "detr": {"heads": 6, "neurons": 6, "channels": 12},
}
_TWO_LAYERS = {"heads": 2, "neurons": 2}
_STOCK = {"llama", "llama-multi-query", "qwen3", "gemma2", "phi3", "mixtral", "t5", "vit"}
"""Families whose config can express the shapes."""


def _shrunk(family: str, attention: str | None = None) -> tuple[Any, list[Any]]:
    """Return a family's model without half of each group, and its inputs."""
    case = transformers_case(family, attention)
    model, inputs = case.build(), case.make_inputs()
    dependencies, _, effect = shrink_by_half(model, inputs)
    kinds = Counter(str(group.kind) for group in dependencies.prunable)
    assert kinds == _EXPECTED.get(family, _TWO_LAYERS)
    assert effect > LEAST_EFFECT
    return model, inputs


_READER = """
import json
import sys
import torch
import transformers
import osscar
from osscar.proof.equivalence import proof_outputs

for directory in sys.argv[1:]:
    inputs = torch.load(f"{directory}.inputs", weights_only=True)
    outputs = [proof_outputs(osscar.load(directory), inputs)]
    with open(f"{directory}/config.json") as file:
        config = json.load(file)
    for auto, name in config.get("auto_map", {}).items():
        if name.endswith("." + config["architectures"][0]):
            reader = getattr(transformers, auto)
            model = reader.from_pretrained(directory, trust_remote_code=True).eval()
            outputs.append(proof_outputs(model, inputs))
            break
    torch.save(outputs, f"{directory}.outputs")
"""


@pytest.fixture(scope="module")
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Any, Any]]:
    """Shrink and save every family that is tested, and let one other process read them all.

    Of each there is how it was written, what it computes, and what each reader's copy does.
    """
    place, found = tmp_path_factory.mktemp("families"), {}
    for family in collected.values(request, "family"):
        model, inputs = _shrunk(family)
        written = checkpoint.save(model, place / family, example_inputs=inputs[0])
        torch.save(inputs, f"{place / family}.inputs")
        found[family] = written, proof_outputs(model, inputs)
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
    command = [sys.executable, "-c", _READER, *(str(place / family) for family in found)]
    subprocess.run(command, check=True, env=environment)
    return {
        family: (*of, torch.load(Path(f"{place / family}.outputs"), weights_only=True))
        for family, of in found.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_shrunk_proved_saved_and_reloaded(
    family: str, saved: dict[str, tuple[Any, Any, Any]]
) -> None:
    written, outputs, readers = saved[family]
    assert written.stock == (family in _STOCK)
    assert written.with_code is not written.stock
    assert len(readers) == (2 if written.with_code else 1)
    for again in readers:
        for before, after in zip(outputs, again, strict=True):
            atol = 1e-5 * float(before.abs().max())
            torch.testing.assert_close(after, before, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert", "t5", "swin", "clip"])
def test_written_out_attention_is_shrunk_too(name: str) -> None:
    _shrunk(name, "eager")


@pytest.mark.parametrize("name", ["llama-multi-query", "gpt2", "bloom", "falcon-grouped", "t5"])
def test_numbers_off_the_traced_path_follow_too(name: str) -> None:
    """A mask, a cache, or another kernel of attention reads what the traced path does not."""
    model, inputs = _shrunk(name)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    padded = {**inputs[0], "attention_mask": mask}
    expected = proof_outputs(model, [padded])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    ids = torch.randint(3, 64, (2, 5))
    with_cache, without = (model.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(with_cache, without)
    if name != "bloom":  # which has one implementation
        model.set_attn_implementation("eager")
        torch.testing.assert_close(proof_outputs(model, [padded]), expected, rtol=1e-4, atol=1e-4)
