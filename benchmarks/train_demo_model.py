"""Train the model that ships with OSSCAR, from scratch, on text that every Python has.

    python -m benchmarks.train_demo_model [--steps 1500] [--out osscar/data/demo]

The text is the training part of ``benchmarks.prose`` and the docstrings of the standard library,
less every paragraph that shares eight words in a row with the calibration or held-out parts. The
result is a stock OPT checkpoint. The script prints the held-out perplexity of the model and of a
unigram model over the same tokens, and saves nothing unless they are at least five times
apart.

Takes five minutes of two cores.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from benchmarks import prose as topics
from benchmarks.prose import Split, builtin_text, split_paragraphs
from osscar.data.text import encode
from osscar.models.names import DEMO_CALIBRATION, DEMO_DIRECTORY, DEMO_HELD_OUT

VOCABULARY = 2048
SEQLEN = 512
SHORT = 256
SHORT_SHARE = 0.75
BATCH_TOKENS = 2048
PEAK_RATE = 4e-3
WARMUP = 0.03
DROPOUT = 0.1
BALANCE = 0.01
SEED = 20240312
REQUIRED_RATIO = 5.0
BOS, PAD, EOS = "<s>", "<pad>", "</s>"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=1500)
    arguments.add_argument("--out", type=Path, default=DEMO_DIRECTORY)
    options = arguments.parse_args()
    torch.manual_seed(SEED)

    text = "\n\n".join(training_paragraphs())
    tokenizer = train_tokenizer(text)
    tokens = encode(tokenizer, text)
    held_out = encode(tokenizer, builtin_text(Split.HELD_OUT))
    print(
        f"{len(text):,} characters, {len(tokens):,} training and {len(held_out):,} held-out tokens"
    )

    model = OPTForCausalLM(demo_config(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokens, options.steps)
    model.to(torch.float16).float()  # what is stored is what is measured
    perplexity = model_perplexity(model, held_out)
    unigram = unigram_perplexity(tokens, held_out)
    print(f"held-out perplexity per token: model {perplexity:.2f}, unigram {unigram:.2f}")
    print(f"ratio {unigram / perplexity:.1f}")
    if unigram < REQUIRED_RATIO * perplexity:
        raise SystemExit(
            f"the model must beat the unigram model {REQUIRED_RATIO:g} times: not saved"
        )
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


def demo_config(tokenizer: PreTrainedTokenizerFast) -> OPTConfig:
    """Describe the architecture: small enough to ship, with heads and neurons worth choosing."""
    return OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        word_embed_proj_dim=160,
        num_hidden_layers=4,
        num_attention_heads=8,
        ffn_dim=640,
        max_position_embeddings=SEQLEN,
        dropout=DROPOUT,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


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
    began = time.monotonic()
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
            epochs = (step + 1) * BATCH_TOKENS / len(tokens)
            minutes = (time.monotonic() - began) / 60
            print(
                f"step {step + 1}, {epochs:.1f} epochs, {minutes:.1f} min, loss {loss.item():.3f}",
                flush=True,
            )


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


def unigram_perplexity(tokens: Tensor, held_out: Tensor) -> float:
    """Score the same tokens by their training frequency, with add-one smoothing."""
    counts = torch.bincount(tokens, minlength=VOCABULARY).double() + 1
    scored = torch.cat([window[1:] for window in torch.split(held_out, SEQLEN)])
    return math.exp(-(counts / counts.sum()).log()[scored].mean().item())


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint, and the texts that it has not seen."""
    model.to(torch.float16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # the saver leaves it readable to its owner alone
    tokenizer.save_pretrained(out)
    (out / DEMO_CALIBRATION.name).write_text(builtin_text(Split.CALIBRATION) + "\n")
    (out / DEMO_HELD_OUT.name).write_text(builtin_text(Split.HELD_OUT) + "\n")


if __name__ == "__main__":
    main()
