"""What a model is worth, alone or beside its dense original: quality, speed and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osscar.base.printable import engineering, in_bytes
from osscar.data.loaders import read_once
from osscar.data.samples import SampleSet
from osscar.evaluation.quality import SAMPLES_AT_ONCE, Windows, arguments, score
from osscar.evaluation.speed import (
    Footprint,
    count_disk_bytes,
    count_parameter_bytes,
    measure_speed,
    sample_speeds,
)
from osscar.network.modules import count_parameters, device_of, evaluating
from osscar.network.operations import count_flops
from osscar.proof.lineage import check_dense
from osscar.report.sections import Section, Table
from osscar.report.shown import Shown

_COMPARED = (
    *("parameters", "perplexity", "top1", "top5"),
    *("prefill_tokens_per_second", "decode_tokens_per_second", "samples_per_second"),
    *("flops", "parameter_bytes", "disk_bytes"),
)
"""The numbers whose ratio says something; what the settings were, and what both share, is not."""


@dataclass(frozen=True)
class Evaluation(Shown):
    """Quality, speed and size of one model; ``dataclasses.asdict`` makes it JSON.

    Attributes
    ----------
    sample
        What its floating-point operations are counted for: ``"token"``, ``"image"`` or
        ``"sample"``.
    quality
        How well it does: a `TextQuality`, or a `SampleQuality` of images and tensors.
    speed
        How fast it is, and with how much at once: a `Speed` of text, or a `SampleSpeed`.
    footprint
        How large it is.
    device, dtype
        Where and in which number format this was measured.
    """

    sample: str
    quality: Any
    speed: Any
    footprint: Footprint
    device: str
    dtype: str

    def sections(self) -> list[Section]:
        """Return its numbers as a table."""
        return [evaluation_table(asdict(self))]

    def numbers(self) -> dict[str, Any]:
        """Return all that was measured by its name."""
        return {**vars(self.quality), **vars(self.speed), **vars(self.footprint)}


@dataclass(frozen=True)
class Comparison(Shown):
    """The evaluations of a model and of its dense model.

    Attributes
    ----------
    model, dense
        What was measured of each.
    ratios
        The model's numbers divided by those of the dense one, by name; more speed is above 1. None
        where either is not known, or the dense one is zero.
    """

    model: Evaluation
    dense: Evaluation
    ratios: Mapping[str, float | None]

    def sections(self) -> list[Section]:
        """Return the numbers of both, with their ratios, as a table."""
        return [comparison_table(asdict(self))]

    @classmethod
    def of(cls, model: Evaluation, dense: Evaluation) -> Comparison:
        """Divide one evaluation by another."""
        mine, theirs = model.numbers(), dense.numbers()
        return cls(
            model,
            dense,
            {
                name: mine[name] / theirs[name] if mine[name] is not None and theirs[name] else None
                for name in _COMPARED
                if name in mine
            },
        )


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int | None = None,
    new_tokens: int = 32,
    repetitions: int = 5,
    path: str | Path | None = None,
) -> Evaluation:
    """Measure quality, speed and size of a model.

    Parameters
    ----------
    model
        A causal language model for text; for anything else any model.  Of its outputs that one is
        scored which is called `logits`, or is the only floating-point one (see `docs/vision.md`).
    data
        What neither trained nor calibrated it: a `TextSet`, or a `CalibrationSet` whose windows are
        scored as they are; an `ImageSet` or a `TensorSet`, with or without labels.  Folders of
        images are recognized by the names of classes that `osscar.load_model` has found.
    batch_size
        Samples at once; by default 4 windows, or 32 images or samples.
    new_tokens
        Of text: tokens to write when speed is measured; the prompt is the first window, and at most
        half of its length is written.
    repetitions
        Times that the model is timed, at the least.
    path
        The model's directory, whose size is reported.

    Raises
    ------
    DataError
        If the model fails on the data, an image cannot be decoded, or the labels are not its
        classes.
    ModelError
        If the model returns nothing that could be scored, or two passes over the same data differ;
        or if it is asked about text and is no causal language model, has no key-value cache, or
        lacks tokens of it.
    NonFiniteError
        If an output is NaN or infinite; of text the message says in which window.
    OptionError
        If a number is out of range.
    """
    return _evaluate_all([(model, path)], data, batch_size, new_tokens, repetitions)[0]


def compare(
    model: nn.Module,
    dense: nn.Module,
    data: Any,
    *,
    batch_size: int | None = None,
    new_tokens: int = 32,
    repetitions: int = 5,
    path: str | Path | None = None,
    dense_path: str | Path | None = None,
    other_dense: bool = False,
) -> Comparison:
    """Measure a model and its dense original on the same data, and time them in turns.

    Parameters
    ----------
    model, dense
        Two models with the same outputs; of text, with the same tokenizer.
    data, batch_size, new_tokens, repetitions
        As `evaluate` takes them; windows of text fit both models.
    path, dense_path
        The directories of the models, whose sizes are reported.
    other_dense
        Whether to compare with a model that the first one was not pruned from, as far as that is
        known.

    Raises
    ------
    OsscarError
        As `evaluate`; and a ModelError if the two return other tensors, or the first was pruned
        from another model than the second.
    """
    check_dense(model, dense, other=other_dense)
    pair = [(model, path), (dense, dense_path)]
    mine, theirs = _evaluate_all(pair, data, batch_size, new_tokens, repetitions)
    return Comparison.of(mine, theirs)


def _evaluate_all(
    candidates: Sequence[tuple[nn.Module, str | Path | None]],
    data: Any,
    batch_size: int | None,
    new_tokens: int,
    repetitions: int,
) -> list[Evaluation]:
    models: list[Any] = [model for model, _ in candidates]
    data = read_once(models[-1], data, whole=True)
    size = SAMPLES_AT_ONCE if batch_size is None else batch_size
    text = None if isinstance(data, SampleSet) else Windows.of(models, data)
    speeds: Sequence[Any]
    with evaluating(*models), torch.no_grad():
        dense = models[-1] if len(models) > 1 else None
        qualities = score(models, data, dense=dense, batch_size=batch_size)
        if text is None:
            ones, positions = [arguments(model, next(data.batches(1))) for model in models], 1
            batches = [arguments(model, next(data.batches(size))) for model in models]
            samples = 1 if data.alone else min(size, len(data))
            speeds = sample_speeds(models, batches, samples, repetitions)
        else:
            prompt = text.windows[0]
            ones = [{"input_ids": prompt[None].to(device_of(model))} for model in models]
            positions = len(prompt)
            speeds = measure_speed(models, prompt, new_tokens=new_tokens, repetitions=repetitions)
        flops = [count_flops(m, one) / positions for m, one in zip(models, ones, strict=True)]
    return [
        Evaluation(
            sample="token" if text else data.sample_name,
            quality=quality,
            speed=speed,
            footprint=Footprint(
                parameters=count_parameters(model),
                parameter_bytes=count_parameter_bytes(model),
                flops=operations,
                disk_bytes=count_disk_bytes(path),
            ),
            device=str(device_of(model)),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        )
        for (model, path), quality, speed, operations in zip(
            candidates, qualities, speeds, flops, strict=True
        )
    ]


# ---- tables ------------------------------------------------------------------------------


_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "parameters": ("parameters", "{:,}".format),
    "perplexity": ("perplexity", "{:.3f}".format),
    "top1": ("top-1", "{:.2%}".format),
    "top5": ("top-5", "{:.2%}".format),
    "agreement": ("agreement with dense", "{:.2%}".format),
    "kl": ("KL from dense, nats", "{:.4f}".format),
    "prefill_tokens_per_second": ("prefill, tokens/s", "{:,.0f}".format),
    "decode_tokens_per_second": ("decode, tokens/s", "{:,.1f}".format),
    "samples_per_second": ("{sample}s/s ({batch_size} at once)", "{:,.1f}".format),
    "flops": ("FLOPs per {sample}", engineering),
    "parameter_bytes": ("weights in memory", in_bytes),
    "disk_bytes": ("weights on disk", in_bytes),
}
"""What a table shows of an evaluation, in this order: by name, how it is called and written."""


def evaluation_table(evaluation: Mapping[str, Any], name: str = "model") -> Table:
    """Return the numbers of one model, an `Evaluation` as JSON."""
    rows = _shown(evaluation)
    return Table("", ("", f"{name} >"), tuple((label, value) for _, label, value in rows))


def comparison_table(comparison: Mapping[str, Any], name: str = "pruned") -> Table:
    """Return a model beside its dense original, with ratios: a `Comparison` as JSON."""
    rows = comparison_rows(comparison)
    return Table("", ("", "dense >", f"{name} >", "ratio >"), tuple(rows))


def comparison_rows(comparison: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield label, dense, pruned and ratio of each number of a `Comparison` as JSON."""
    dense = {name: text for name, _, text in _shown(comparison["dense"])}
    for name, label, text in _shown(comparison["model"]):
        ratio = comparison["ratios"].get(name)
        yield label, dense.get(name, ""), text, "" if ratio is None else f"{ratio:.2f}x"


def _shown(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, label and text of each number that is known of an `Evaluation` as JSON."""
    numbers = {**evaluation["quality"], **evaluation["speed"], **evaluation["footprint"]}
    for name, (label, written) in _ROWS.items():
        if numbers.get(name) is not None:
            yield name, label.format(sample=evaluation["sample"], **numbers), written(numbers[name])
    for output, error in (numbers.get("errors") or {}).items():
        said = "dense is 0" if error is None else f"{error:.2g}"
        yield f"errors.{output}", f"squared error of {output}, relative", said
