"""Train a small mixture of experts, from scratch, on the text of the model that ships with OSSCAR.

    python -m benchmarks.train_mixture OUT [--steps 1500]

Eight experts a layer, of which each token is sent to two; a loss of balance (0.01 of the one that
Mixtral has) spreads tokens over them.  The result is a stock Mixtral checkpoint.

Takes half an hour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from benchmarks.train_demo_model import (
    SEED,
    SEQLEN,
    VOCABULARY,
    model_perplexity,
    train,
    train_tokenizer,
    training_paragraphs,
    unigram_perplexity,
)
from osscar.data.text import encode
from osscar.models.names import DEMO_HELD_OUT


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--steps", type=int, default=1500)
    options = arguments.parse_args()
    torch.manual_seed(SEED)
    text = "\n\n".join(training_paragraphs())
    tokenizer = train_tokenizer(text)
    tokens = encode(tokenizer, text)
    held_out = encode(tokenizer, DEMO_HELD_OUT.read_text())
    model = MixtralForCausalLM(mixture_config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, tokens, options.steps)
    perplexity = model_perplexity(model, held_out)
    unigram = unigram_perplexity(tokens, held_out)
    print(f"held-out perplexity per token: model {perplexity:.2f}, unigram {unigram:.2f}")
    model.config.output_router_logits = False
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def mixture_config(tokenizer: PreTrainedTokenizerFast) -> MixtralConfig:
    """Describe the architecture: 4.3 million parameters, of which a token reads a third."""
    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=240,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=SEQLEN,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


if __name__ == "__main__":
    main()
