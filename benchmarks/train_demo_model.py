"""Train the model that ships with OSSCAR, from scratch, on text that every Python has.

    python -m benchmarks.train_demo_model
    python -m benchmarks.train_demo_model --mixture --out MIXTURE

The text is the training part of ``benchmarks.prose`` and the docstrings of the standard library,
less every paragraph that shares eight words in a row with the calibration or held-out parts.  The
result is a stock OPT checkpoint; the script prints its held-out perplexity.  With `--mixture` it is
a stock Mixtral checkpoint of eight experts a layer, of which each token is sent to two; a loss of
balance spreads tokens over them.

Takes five minutes of two cores, or half an hour.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks import prose as topics
from benchmarks.prose import Split, builtin_text, split_paragraphs
from osscar.data.text import encode
from osscar.models.names import DEMO_CALIBRATION, DEMO_DIRECTORY, DEMO_HELD_OUT

VOCABULARY, SEQLEN, BATCH_TOKENS = 2048, 512, 2048
SHORT, SHORT_SHARE = 256, 0.75
PEAK_RATE, WARMUP = 4e-3, 0.03
DROPOUT = 0.1
BALANCE = 0.01
SEED = 20240312
BOS, PAD, EOS = "<s>", "<pad>", "</s>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--mixture", action="store_true")
    parser.add_argument("--out", type=Path, default=DEMO_DIRECTORY)
    options = parser.parse_args()
    if options.mixture and options.out == DEMO_DIRECTORY:
        raise SystemExit("the demo is no mixture: give --out")
    torch.manual_seed(SEED)
    text = "\n\n".join(training_paragraphs())
    tokenizer = train_tokenizer(text)
    tokens, held_out = encode(tokenizer, text), encode(tokenizer, builtin_text(Split.HELD_OUT))
    model = (mixture if options.mixture else demo)(tokenizer)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(tokens):,} tokens train {count:,} parameters; {len(held_out):,} are held out")
    train(model, tokens, options.steps)
    model.to(torch.float16).float()  # what is stored is what is measured
    print(f"held-out perplexity per token: {model_perplexity(model, held_out):.2f}")
    if options.mixture:
        model.config.output_router_logits = False
    save(model, tokenizer, options.out)


def training_paragraphs() -> list[str]:
    """Collect the training text, without a word of what calibrates or scores."""
    claimed: set[str] = set()
    for part in (Split.HELD_OUT, Split.CALIBRATION):
        for paragraph in split_paragraphs(builtin_text(part)):
            claimed |= topics.shingles(paragraph)
    own = split_paragraphs(builtin_text(Split.TRAINING))
    documented = [p for doc in dict.fromkeys(docstrings()) for p in split_paragraphs(doc)]
    kept = topics.without_shared_prose(own + documented, claimed)
    print(f"{len(kept):,} paragraphs, {len(own) + len(documented) - len(kept)} dropped as shared")
    return kept


def docstrings() -> Iterator[str]:
    """Read the docstrings of the standard library's sources, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"site-packages", "test", "tests", "idle_test", "pydoc_data"} & set(parts):
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError, ValueError):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                if isinstance(node, documented) and (doc := ast.get_docstring(node)):
                    yield doc


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=SEQLEN,
        clean_up_tokenization_spaces=False,
    )


def demo(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Make a model that is small enough to ship, with heads and neurons worth choosing."""
    return OPTForCausalLM(
        OPTConfig(
            **shared(tokenizer),
            hidden_size=160,
            word_embed_proj_dim=160,
            num_hidden_layers=4,
            num_attention_heads=8,
            ffn_dim=640,
            dropout=DROPOUT,
            attention_dropout=0.0,
        )
    )


def mixture(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Make a mixture of 4.3 million parameters, of which a token reads a third."""
    return MixtralForCausalLM(
        MixtralConfig(
            **shared(tokenizer),
            hidden_size=160,
            intermediate_size=240,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=BALANCE,
            output_router_logits=True,
        )
    )


def shared(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the fields that both have."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    return {
        **ids,
        "pad_token_id": tokenizer.pad_token_id,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQLEN,
        "tie_word_embeddings": True,
    }


def train(model: nn.Module, tokens: Tensor, steps: int) -> None:
    """Train on random windows: short ones first, as attention is most of the cost."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    model.train()
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * schedule(step / steps)
        length = SHORT if step < SHORT_SHARE * steps else SEQLEN
        loss = window_loss(model, tokens, length, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}, loss {loss.item():.3f}", flush=True)


def window_loss(
    model: nn.Module, tokens: Tensor, length: int, generator: torch.Generator
) -> Tensor:
    """Predict a batch of random windows; short ones start anywhere, so all positions train."""
    count = BATCH_TOKENS // length
    starts = torch.randint(len(tokens) - length, (count, 1), generator=generator)
    batch = tokens[starts + torch.arange(length)]
    offsets = torch.randint(SEQLEN - length + 1, (count, 1), generator=generator)
    positions = offsets + torch.arange(length)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(input_ids=batch, position_ids=positions, use_cache=False)
    predicted = found.logits[:, :-1].flatten(0, 1).float()
    loss = nn.functional.cross_entropy(predicted, batch[:, 1:].flatten())
    balance = getattr(found, "aux_loss", None)  # of the experts of a mixture
    return loss if balance is None else loss + BALANCE * balance


def schedule(spent: float) -> float:
    """Warm up linearly, then decay as a cosine to a hundredth."""
    if spent < WARMUP:
        return spent / WARMUP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (spent - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def model_perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Score non-overlapping windows; the first token of each is context only."""
    model.eval()
    total, count = 0.0, 0
    for window in torch.split(tokens, SEQLEN):
        if len(window) > 1:
            logits = model(input_ids=window[None]).logits[0, :-1]
            total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    return math.exp(total / count)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint, and the texts that it has not seen."""
    model.to(torch.float16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # the saver leaves it readable to its owner alone
    tokenizer.save_pretrained(out)
    (out / DEMO_CALIBRATION.name).write_text(builtin_text(Split.CALIBRATION) + "\n")
    (out / DEMO_HELD_OUT.name).write_text(builtin_text(Split.HELD_OUT) + "\n")


if __name__ == "__main__":
    main()
