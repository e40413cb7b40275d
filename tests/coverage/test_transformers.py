"""Families of transformers: heads and neurons found, shrunk, proved, saved, reloaded elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from osscar.checkpoint import directory as checkpoint
from osscar.proof.equivalence import proof_outputs
from tests import collected
from tests.zoo import FAMILIES, transformers_case

from .measure import LEAST_EFFECT, Coverage, measure, shrink_by_half

_EXPECTED = {
    # Blocks share their position bias, and so their heads: of encoder, decoder, and in between.
    "t5": {"heads": 3, "neurons": 4},
    "t5-gated": {"heads": 3, "neurons": 4},
    "bart": {"heads": 6, "neurons": 4},
    "whisper": {"heads": 6, "neurons": 4, "channels": 1},
    "wav2vec2": {"heads": 2, "neurons": 2, "channels": 1},
    "clip": {"heads": 4, "neurons": 4},
    "swin": {"heads": 4, "neurons": 4},
    "bloom": {"neurons": 2},  # heads have slopes that the code makes (ALiBi)
    "convnext": {"neurons": 5},
    "detr": {"heads": 6, "neurons": 6, "channels": 12},
}
_TWO_LAYERS = {"heads": 2, "neurons": 2}


@dataclass(frozen=True)
class Saved:
    """A shrunk model on disk, and what it computes."""

    coverage: Coverage
    stock: bool
    with_code: bool
    outputs: list[Tensor]


_READER = """
import json
import sys
import torch
import transformers
import osscar
from osscar.proof.equivalence import proof_outputs

for directory in sys.argv[1:]:
    inputs = torch.load(f"{directory}.inputs", weights_only=True)
    outputs = proof_outputs(osscar.load(directory), inputs)
    with open(f"{directory}/config.json") as file:
        config = json.load(file)
    for auto, name in config.get("auto_map", {}).items():
        if name.endswith("." + config["architectures"][0]):
            reader = getattr(transformers, auto)
            model = reader.from_pretrained(directory, trust_remote_code=True).eval()
            outputs += proof_outputs(model, inputs)
            break
    torch.save(outputs, f"{directory}.outputs")
"""


@pytest.fixture(scope="module")
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Saved | Exception]:
    """Shrink and save every family that is tested, and let one other process read them all."""
    place = tmp_path_factory.mktemp("families")
    results: dict[str, Saved | Exception] = {}
    for name in collected.values(request, "family"):
        try:
            results[name] = _save(name, place / name)
        except Exception as error:  # raised again by the test of that family
            results[name] = error
    written = [str(place / name) for name, result in results.items() if isinstance(result, Saved)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
    subprocess.run([sys.executable, "-c", _READER, *written], check=True, env=environment)
    for name, result in results.items():
        if isinstance(result, Saved):
            result.outputs.extend(torch.load(place / f"{name}.outputs", weights_only=True))
    return results


def _save(name: str, directory: Path) -> Saved:
    case = transformers_case(name)
    model, inputs = case.build(), case.make_inputs()
    coverage = measure(model, inputs)
    written = checkpoint.save(model, directory, example_inputs=inputs[0])
    torch.save(inputs, f"{directory}.inputs")
    return Saved(coverage, written.stock, written.with_code, proof_outputs(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_shrunk_proved_saved_and_reloaded(
    family: str, saved: dict[str, Saved | Exception]
) -> None:
    result = saved[family]
    if isinstance(result, Exception):
        raise result
    assert result.coverage.kinds == _EXPECTED.get(family, _TWO_LAYERS)
    assert result.coverage.effect > LEAST_EFFECT
    assert result.stock == ("stock" in transformers_case(family).tags)
    assert result.with_code is not result.stock
    readers = 2 if result.with_code else 1
    own = len(result.outputs) // (1 + readers)
    for before, after in zip(result.outputs[:own] * readers, result.outputs[own:], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_written_out_attention_is_shrunk_too(name: str) -> None:
    case = transformers_case(name, "eager")
    coverage = measure(case.build(), case.make_inputs())
    assert coverage.kinds == _EXPECTED.get(name, _TWO_LAYERS)
    assert coverage.effect > LEAST_EFFECT


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llama", "llama-multi-query", "gpt2", "bloom", "falcon-grouped"])
def test_numbers_off_the_traced_path_follow_too(name: str) -> None:
    """A mask, or another implementation of attention, reads what the traced path does not."""
    case = transformers_case(name)
    model = case.build()
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    padded = {"input_ids": torch.randint(3, 64, (2, 7)), "attention_mask": mask}
    shrink_by_half(model, [*case.make_inputs(), padded])
    expected = proof_outputs(model, [padded])
    if name != "bloom":  # which has one implementation
        model.set_attn_implementation("eager")  # type: ignore[operator]
        torch.testing.assert_close(proof_outputs(model, [padded]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama-multi-query", "bloom", "falcon-grouped", "t5"])
def test_generation_with_a_cache_follows(name: str) -> None:
    case = transformers_case(name)
    model = case.build()
    shrink_by_half(model, case.make_inputs())
    assert _generated(model, use_cache=True) == _generated(model, use_cache=False)


def _generated(model: nn.Module, *, use_cache: bool) -> list[list[int]]:
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (2, 5))
    tokens = model.generate(  # type: ignore[operator]
        ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=None
    )
    return tokens.tolist()  # type: ignore[no-any-return]
