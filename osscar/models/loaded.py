"""A loaded model: what it reads, where it comes from, and data for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osscar.base.errors import DataError, OptionError
from osscar.data.images import ImageSet, find_images, has_images
from osscar.data.loaders import (
    DEFAULT_SAMPLES,
    DEFAULT_WINDOWS,
    holds_images,
    load_batches,
    load_tensors,
)
from osscar.data.preprocessing import (
    OPTIONS,
    AnyPreprocessing,
    Transform,
    check_stated,
    image_of,
    no_images,
)
from osscar.data.reader import Batch, Reader
from osscar.data.samples import SampleSet, TensorSet
from osscar.data.text import (
    DEFAULT_SEQLEN,
    CalibrationSet,
    TextSet,
    is_text,
    load_calibration,
    load_text,
)
from osscar.models.names import DEMO_CALIBRATION, DEMO_HELD_OUT, DEMO_SOURCE
from osscar.network.modules import context_length, count_parameters
from osscar.proof.lineage import lineage_of


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model, ready to run.

    Attributes
    ----------
    model
        The model, in evaluation mode, on its device.
    source
        Where it comes from, in words.
    path
        Directory that it was read from, or None.
    stored_dtype
        Number format of its weights on disk.
    tokenizer
        Tokenizer of a language model; None of any other model.
    processor
        Image processor of a classifier of transformers; None of any other model.
    example
        Inputs to trace it with; None if nothing tells what they look like.
    preprocessing
        What is done to an image before the model sees it, as far as it is known; None of a model
        that reads no images.
    states_images
        Whether the caller stated what is done to an image.
    classes
        Names of its classes; empty if they are not known, and of a language model.
    """

    model: nn.Module
    source: str
    path: Path | None
    stored_dtype: torch.dtype
    tokenizer: Any = None
    processor: Any = None
    example: Batch | None = None
    preprocessing: AnyPreprocessing | None = None
    states_images: bool = False
    classes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"LoadedModel({self.source}: {type(self.model).__name__}, "
            f"{count_parameters(self.model):,} parameters)"
        )

    @property
    def companion(self) -> Any:
        """What transformers reads beside the weights, for `osscar.save` to write; or None."""
        return self.processor if self.tokenizer is None else self.tokenizer

    def calibration(
        self,
        spec: Any = None,
        *,
        samples: int | None = None,
        seqlen: int | None = None,
        seed: int = 0,
        overlapping: bool = True,
    ) -> CalibrationSet | SampleSet:
        """Draw calibration data: windows of text, images, or samples of tensors.

        Parameters
        ----------
        spec
            A name or data at hand, as `osscar.load_calibration`, `osscar.load_images`,
            `osscar.load_tensors` or `osscar.load_batches` takes them.  The demo, and what was
            pruned from it, have a text of their own.
        samples
            How many; by default 32 windows, or 256 images or samples.
        seqlen
            Tokens in each window; by default 512, or the model's context if that is shorter.
        seed
            Random seed of the draw.
        overlapping
            Whether windows of a short text may overlap; otherwise there are fewer.

        Raises
        ------
        DataError, FileError
            If data are missing, cannot be read, are too few, or do not fit the model.
        OptionError
            If options do not go with the data, or nothing states what is done to an image.
        """
        named = spec is None or isinstance(spec, str | Path)
        if self.tokenizer is not None and (named or is_text(spec)):
            length = self.window_length if seqlen is None else seqlen
            count = DEFAULT_WINDOWS if samples is None else samples
            return self._windows(spec, "--calibration", count, length, seed, overlapping)
        if seqlen is not None:
            raise OptionError(f"seqlen (`--seqlen`) is {seqlen}, and the data are no text; omit it")
        if spec is None:
            raise self._no_data("calibration (`--calibration`)")
        if has_images(spec) if not named else holds_images(spec, self.model):
            data: SampleSet = self.images(spec)
        elif named:
            data = self.tensors(spec)
        else:
            self._check_no_images_stated(f"a {type(spec).__name__}")
            return load_batches(spec, self.model, samples=samples)
        return data.sample(DEFAULT_SAMPLES if samples is None else samples, seed)

    def training(
        self,
        *,
        text: Any = None,
        images: Any = None,
        inputs: str | Path | None = None,
        windows: int,
        samples: int | None = None,
        seqlen: int | None = None,
        seed: int,
    ) -> CalibrationSet | SampleSet:
        """Draw training data: windows of text that do not overlap, images, or tensors.

        Parameters
        ----------
        text, images, inputs
            As `osscar.load_calibration`, `osscar.load_images` and `osscar.load_tensors` take them.
        windows
            How many windows, unless `samples` is given; fewer if the text has no room for them.
        samples
            How many; by default all images or samples.
        seqlen
            Tokens in each window; by default as many as when the model was calibrated.
        seed
            Random seed of the draw.
        """
        self._check_given(text or seqlen, images, inputs)
        if self.tokenizer is not None:
            if seqlen is None:
                known = (one.seqlen for one in reversed(lineage_of(self.model).calibration))
                seqlen = next(filter(None, known), self.window_length)
            count = windows if samples is None else samples
            return self._windows(text, "--text", count, seqlen, seed, False)
        data = self._samples(images, inputs)
        if data is None:
            raise self._no_data("images or inputs (`--images`, `--inputs`)")
        return data if samples is None else data.sample(samples, seed)

    def held_out(
        self,
        *,
        text: Any = None,
        images: Any = None,
        inputs: str | Path | None = None,
        windows: int | None = None,
        seqlen: int | None = None,
    ) -> TextSet | SampleSet | None:
        """Find test data; None if it reads no text and nothing is given.

        Parameters
        ----------
        text, windows, seqlen
            As `osscar.load_text` takes them; the demo, and what was pruned from it, have a text of
            their own.
        images, inputs
            As `osscar.load_images` and `osscar.load_tensors` take them.
        """
        self._check_given(text or windows or seqlen, images, inputs)
        if self.tokenizer is None:
            return self._samples(images, inputs)
        if text is not None:
            return load_text(text, self.tokenizer, windows=windows, seqlen=seqlen)
        file = self._own_text(DEMO_HELD_OUT, "--text")
        found = load_text(file, self.tokenizer, windows=windows, seqlen=seqlen)
        return replace(found, source="the demo's held-out text")

    def _windows(
        self, text: Any, option: str, samples: int, seqlen: int, seed: int, overlapping: bool
    ) -> CalibrationSet:
        """Cut windows from the text that is given, or from the demo's own."""
        spec = self._own_text(DEMO_CALIBRATION, option) if text is None else text
        found = load_calibration(
            spec, self.tokenizer, samples=samples, seqlen=seqlen, seed=seed, overlapping=overlapping
        )
        if text is not None:
            return found
        return replace(found, source=found.source.replace(str(spec), "the demo's calibration text"))

    def _own_text(self, text: Path, option: str) -> Path:
        """Return a text of the demo, or refuse to do without one for any other model."""
        if lineage_of(self.model).source != DEMO_SOURCE:
            raise DataError(
                f"give {option} a text like what {self.source} will read, such as text.txt"
            )
        return text

    @property
    def window_length(self) -> int:
        """Tokens in a window of text, unless the caller says otherwise."""
        return min(DEFAULT_SEQLEN, context_length(self.model) or DEFAULT_SEQLEN)

    def _check_given(self, text: object, images: object, inputs: object) -> None:
        """Refuse data of another kind than the model reads."""
        wrong = ""
        if self.tokenizer is not None and (images is not None or inputs is not None):
            wrong = "text, not images: omit images (`--images`) and inputs (`--inputs`)"
        elif self.tokenizer is None and text is not None:
            wrong = "no text: omit text (`--text`) and seqlen (`--seqlen`)"
        elif images is not None and inputs is not None:
            wrong = "one kind of samples: give images (`--images`) or inputs (`--inputs`)"
        if wrong:
            raise OptionError(f"{self.source} reads {wrong}")

    def _samples(self, images: Any, inputs: str | Path | None) -> SampleSet | None:
        """Read samples of one kind or the other; None if none are given."""
        if images is not None:
            return self.images(images)
        return None if inputs is None else self.tensors(inputs)

    def _no_data(self, option: str) -> DataError:
        needed = ", ".join(Reader.of(self.model).needs)
        return DataError(
            f"{self.source} reads no text: give {option} a directory of images, an .npz file of "
            f"them, or an .npz or .safetensors file of tensors for {needed}"
        )

    def tensors(self, spec: str | Path) -> TensorSet:
        """Read samples that are fed as they are, as `osscar.load_tensors` does."""
        found = load_tensors(spec, self.model)
        self._check_no_images_stated(spec)  # of a file that is there
        return found

    def _check_no_images_stated(self, source: str | Path) -> None:
        if self.states_images:
            raise OptionError(f"{source} holds tensors, which are not preprocessed; omit {OPTIONS}")

    def images(self, spec: Any) -> ImageSet:
        """Find images, which become what the model reads, as `osscar.load_images` does."""
        own = isinstance(self.preprocessing, Transform)
        if self.example is not None and not own and image_of(self.example) is None:
            raise no_images(self.example, self.source)
        if self.preprocessing is None:
            check_stated(None, self.source)
        assert self.preprocessing is not None
        return find_images(spec, self.preprocessing, self.source)
