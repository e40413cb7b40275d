"""Batches as trainers and processors make them, of encoders with decoders: labels are read."""

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

import osscar
from osscar.data.loaders import load_batches
from tests.osscar.masked import masked

VOCABULARY, PAD, START = 61, 0, 1
SIZES = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3,
    "decoder_start_token_id": START, "forced_eos_token_id": None, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip


def t5():
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=20, num_layers=1, num_heads=4,
        pad_token_id=PAD, decoder_start_token_id=START,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def bart():
    return hf.BartForConditionalGeneration(hf.BartConfig(**SIZES, max_position_embeddings=32))


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SIZES, **sizes))


def speech_to_text():
    """Return a speech model whose class has no method for it, and whose features have a mask."""
    sizes = {"input_feat_per_channel": 8, "max_source_positions": 64, "max_target_positions": 32}
    return hf.Speech2TextForConditionalGeneration(
        hf.Speech2TextConfig(
            **SIZES, **sizes, num_conv_layers=1, conv_kernel_sizes=(5,), conv_channels=16
        )
    )


def labels(generator):
    found = torch.randint(4, VOCABULARY, (12, 9), generator=generator)
    for row in range(12):
        found[row, 9 - row % 4 :] = -100
    return found


def texts():
    """Return what a DataCollatorForSeq2Seq makes of texts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (12, 14), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(12):
        ids[row, 14 - row % 3 :], mask[row, 14 - row % 3 :] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels(generator)}


def speech():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 8, 32, generator=generator)
    return {"input_features": features, "labels": labels(generator)}


def masked_speech():
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(12, 40, dtype=torch.int64)
    mask[::2, 32:] = 0
    features = torch.randn(12, 40, 8, generator=generator) * mask[..., None]
    return {"input_features": features, "attention_mask": mask, "labels": labels(generator)}


FAMILIES = {
    "t5": (t5, texts),
    "bart": (bart, texts),
    "whisper": (whisper, speech),
    "speech-to-text": (speech_to_text, masked_speech),
}


@pytest.fixture(
    params=[*list(FAMILIES)[:3], pytest.param("speech-to-text", marks=pytest.mark.slow)]
)
def family(request):
    build, batch = FAMILIES[request.param]
    torch.manual_seed(0)
    return build().double().eval(), batch()


def test_the_decoder_reads_what_the_model_makes_of_labels(family):
    model, batch = family
    with torch.no_grad():
        expected = model(
            **{n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
        )
    found = load_batches(batch, model)
    assert "labels" not in found.samples[0]
    for row, sample in enumerate(found.samples):
        kept = batch["labels"][row] != -100
        assert sample["decoder_input_ids"].shape == (1, kept.sum())
        with torch.no_grad():
            real = {n: x.double() if x.is_floating_point() else x for n, x in sample.items()}
            logits = model(**real).logits
        torch.testing.assert_close(logits[0], expected.logits[row, kept], rtol=1e-6, atol=1e-6)


def test_a_batch_calibrates_and_scores_by_its_labels(family):
    model, batch = family
    with pytest.warns(UserWarning, match="labels set aside to score by; padding cut off|to score"):
        result = osscar.prune(model, batch, heads=0.5, neurons=0.5, device="cpu", round_to=1)
    assert result.distance.measure == "nats"
    assert {"heads", "neurons"} == {group.name.rpartition(".")[2] for group in result.plan.groups}
    twin, loss, count = masked(model, result), 0.0, 0
    for sample, row in zip(load_batches(batch, model).samples, batch["labels"], strict=True):
        real = {n: x.double() if x.is_floating_point() else x for n, x in sample.items()}
        with torch.no_grad():
            expected, mine = twin(**real).logits, result.model(**real).logits
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        loss += float(F.cross_entropy(mine[0], row[row != -100], reduction="sum"))
        count += int((row != -100).sum())
    with pytest.warns(UserWarning, match="labels set aside"):
        quality = osscar.evaluate(result.model, batch, repetitions=1).quality
    assert quality.predictions == count
    assert quality.perplexity == pytest.approx(torch.tensor(loss / count).exp().item())


def test_labels_without_padding_and_inputs_of_a_decoder_at_hand():
    torch.manual_seed(0)
    model, batch = t5().eval(), texts()
    whole = {name: x[:1].repeat(4, 1) for name, x in batch.items()}
    found = load_batches([whole, whole], model)
    assert isinstance(found, osscar.TensorSet)
    assert found.labels.shape == found.tensors["decoder_input_ids"].shape == (8, 9)
    own = {**batch, "decoder_input_ids": batch["labels"].clamp(min=0)}
    kept = load_batches(own, model).samples[1]["decoder_input_ids"]
    assert torch.equal(kept[0], own["decoder_input_ids"][1, :8])
    longer = {**batch, "labels": F.pad(batch["labels"], (0, 3), value=7)}
    several = load_batches([batch, longer], model)
    assert several.labels.shape == (24, 12)
    assert osscar.evaluate(model, several, repetitions=1).quality.predictions == int(
        (batch["labels"] != -100).sum()
        + 144 - sum(int((row[:9] == -100).sum()) for row in longer["labels"])
    )  # fmt: skip
