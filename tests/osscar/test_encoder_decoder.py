"""Models of transformers with an encoder and a decoder in a directory, from the command line."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from osscar.models.load import load_model
from osscar.models.names import ModelKind, kind_of

MODELS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
            max_position_embeddings=32, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=32, decoder_ffn_dim=32,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_is_pruned_recovered_and_scored_by_its_name(name, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    MODELS[name]().save_pretrained("dense")
    assert kind_of("dense") is ModelKind.ENCODER_DECODER
    drawn = np.random.default_rng(0)
    for part in ("train", "test"):
        windows = {key: drawn.integers(5, 64, (24, 8)) for key in ("input_ids", "labels")}
        np.savez(f"{part}.npz", **windows)
    asked = ("--calibration", "train.npz", "--neurons", "0.5", "--device", "cpu")
    status, _, err = run("prune", "dense", *asked, "--backend", "wanda", "--out", "small")
    assert status == 0, err
    assert load_model("small").model.config.is_encoder_decoder
    training = ("--inputs", "train.npz", "--steps", 2, "--device", "cpu", "--out", "again")
    status, _, err = run("recover", "small", "--dense", "dense", *training)
    assert status == 0, err
    scoring = ("--inputs", "test.npz", "--dense", "dense", "--device", "cpu", "--json", "e.json")
    status, out, err = run("eval", "again", *scoring)
    assert status == 0, err
    assert "as scores of classes" in out
    quality = json.loads((tmp_path / "e.json").read_text())["model"]["quality"]
    assert None not in (quality["top1"], quality["agreement"])
