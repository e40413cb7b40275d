"""Batches as trainers and processors make them, of encoders with decoders: labels are read."""

import pytest
import torch
from torch.nn import functional as F

import osscar
from osscar.data.loaders import load_batches
from tests.osscar.masked import masked
from tests.zoo import transformers_case


def labels(generator):
    found = torch.randint(4, 61, (12, 9), generator=generator)
    for row in range(12):
        found[row, 9 - row % 4 :] = -100
    return found


def texts():
    """Return what a DataCollatorForSeq2Seq makes of texts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 61, (12, 14), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(12):
        ids[row, 14 - row % 3 :], mask[row, 14 - row % 3 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels(generator)}


def speech():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 8, 32, generator=generator)
    return {"input_features": features, "labels": labels(generator)}


ONE = {"encoder_layers": 1, "decoder_layers": 1}
FAMILIES = {
    "t5": ({"num_layers": 1, "num_decoder_layers": 1}, texts),
    "bart": (ONE, texts),
    "whisper": (ONE, speech),
}
"""How each has one layer, and what its batches are."""


def made(family):
    layers, batch = FAMILIES[family]
    return transformers_case(family, **layers).build().double(), batch()


def real(inputs):
    return {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_reads_what_the_model_makes_of_labels(family):
    model, batch = made(family)
    with torch.no_grad():
        expected = model(**real(batch))
    found = load_batches(batch, model)
    assert "labels" not in found.samples[0]
    for row, sample in enumerate(found.samples):
        kept = batch["labels"][row] != -100
        assert sample["decoder_input_ids"].shape == (1, kept.sum())
        with torch.no_grad():
            logits = model(**real(sample)).logits
        torch.testing.assert_close(logits[0], expected.logits[row, kept], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_calibrates_and_scores_by_its_labels(family):
    model, batch = made(family)
    with pytest.warns(UserWarning, match="labels set aside to score by; padding cut off|to score"):
        result = osscar.prune(model, batch, heads=0.5, neurons=0.5, device="cpu", round_to=1)
    assert result.distance.measure == "nats"
    assert {"heads", "neurons"} == {group.name.rpartition(".")[2] for group in result.plan.groups}
    twin, loss, count = masked(model, result), 0.0, 0
    for sample, row in zip(load_batches(batch, model).samples, batch["labels"], strict=True):
        with torch.no_grad():
            expected, mine = (one(**real(sample)).logits for one in (twin, result.model))
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        loss += float(F.cross_entropy(mine[0], row[row != -100], reduction="sum"))
        count += int((row != -100).sum())
    with pytest.warns(UserWarning, match="labels set aside"):
        quality = osscar.evaluate(result.model, batch, repetitions=1).quality
    assert quality.predictions == count
    assert quality.perplexity == pytest.approx(torch.tensor(loss / count).exp().item())
