"""A loaded model: what it reads, where it comes from, and data for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osscar.base.errors import DataError, OptionError
from osscar.data.batches import Batch, needed_arguments
from osscar.data.images import ImageSet, has_images, load_images
from osscar.data.loaders import DEFAULT_SAMPLES, DEFAULT_WINDOWS, load_batches
from osscar.data.preprocessing import OPTIONS, AnyPreprocessing, OwnTransform, Preprocessing
from osscar.data.samples import SampleSet, TensorSet, columns_of
from osscar.data.tensor_files import holds_images, load_tensors
from osscar.data.text import DEFAULT_SEQLEN, TextSet, load_text
from osscar.data.tokens import CalibrationSet, load_calibration
from osscar.models.names import DEMO_SOURCE
from osscar.models.preprocessing import image_of, no_images
from osscar.network.modules import context_length, count_parameters
from osscar.proof.lineage import lineage_of


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model, ready to run.

    Attributes
    ----------
    model
        In evaluation mode, on its device.
    source
        Where it comes from, in words.
    path
        Its directory, or None.
    stored_dtype
        Number format of its weights on disk.
    tokenizer
        The tokenizer that a language model was trained with; None of any other model.
    processor
        The image processor of a classifier of transformers; None of any other model.
    example
        Inputs to trace it with; None where nothing tells what they look like.
    stated
        The example inputs that code of the user's own gave, which data have to be like; None where
        there are none.
    preprocessing
        What is done to an image before the model sees it, as far as it is stated; None of a model
        whose inputs are no images.
    states_images
        Whether the caller stated what is done to an image.
    classes
        The names of its classes; empty where they are not known, and of a language model.
    drawn
        The share of its parameters that its code draws anew in each call, so that nothing has
        trained them; 1 where a library built it without weights, and 0 where they come from a file.
    """

    model: nn.Module
    source: str
    path: Path | None
    stored_dtype: torch.dtype
    tokenizer: Any = None
    processor: Any = None
    example: Batch | None = None
    stated: Batch | None = None
    preprocessing: AnyPreprocessing | None = None
    states_images: bool = False
    classes: tuple[str, ...] = ()
    drawn: float = 0.0

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
        spec: Any,
        *,
        samples: int | None = None,
        seqlen: int | None = None,
        seed: int = 0,
    ) -> CalibrationSet | SampleSet:
        """Draw what calibrates the model: windows of text, images, or samples of tensors.

        Parameters
        ----------
        spec
            For a language model as `osscar.load_calibration` takes it; None, which is the built-in
            text, only for the demo.  For any other a directory of images, or an ``.npz`` file, or
            ``FILE.npz:PART`` for a part of one; or a file of tensors, as `osscar.load_tensors`
            takes it.  Or what is at hand: a ``datasets.Dataset`` of text, a data set of images of
            PIL, or anything that `osscar.load_batches` takes.
        samples
            How many; by default 32 windows, or 256 images or samples.
        seqlen
            Tokens in each window; by default 512, or as many as the model can take if those are
            fewer.  None for a model that reads no text.
        seed
            Of the draw.

        Raises
        ------
        DataError
            If text is missing, unreadable, or shorter than one window; if there are no images, or
            one of them cannot be decoded; or if this Python lacks the built-in text.
        FileError
            If tensors cannot be read, or do not fit the model.
        OptionError
            If a length is given for what is no text, nothing states what is done to an image, or
            something does and the data are tensors.
        MissingDependency
            If ``datasets`` is needed and not installed.
        """
        if not (spec is None or isinstance(spec, str | Path)):
            return self._at_hand(spec, samples, seqlen, seed)
        if self.tokenizer is not None:
            self.check_text(spec, "--calibration")
            samples = DEFAULT_WINDOWS if samples is None else samples
            length = self._window_length() if seqlen is None else seqlen
            return load_calibration(spec, self.tokenizer, samples=samples, seqlen=length, seed=seed)
        if seqlen is not None:
            raise OptionError(f"{self.source} reads no text, which --seqlen is for; omit it")
        if spec is None:
            raise DataError(
                f"{self.source} reads no text: give --calibration a directory of images, an .npz "
                f"file of them, or {self._tensors_in_words()}"
            )
        images = holds_images(spec, self.model, self.stated)
        data: SampleSet = self.images(spec) if images else self.tensors(spec)
        return data.sample(DEFAULT_SAMPLES if samples is None else samples, seed)

    def _at_hand(
        self, data: Any, samples: int | None, seqlen: int | None, seed: int
    ) -> CalibrationSet | SampleSet:
        """Read data that are no name: the text of a data set, images, or batches."""
        if self.tokenizer is not None and "text" in columns_of(data):
            count = DEFAULT_WINDOWS if samples is None else samples
            length = self._window_length() if seqlen is None else seqlen
            return load_calibration(data, self.tokenizer, samples=count, seqlen=length, seed=seed)
        if seqlen is not None:
            raise OptionError(
                f"seqlen is {seqlen}, and a {type(data).__name__} has samples of its own length; "
                "omit it"
            )
        if has_images(data):
            images = self.images(data)
            return images.sample(DEFAULT_SAMPLES if samples is None else samples, seed)
        self._check_no_images_stated(f"a {type(data).__name__}")
        return load_batches(data, self.model, samples=samples, seed=seed)

    def training(
        self,
        *,
        text: str | Path | None = None,
        images: str | Path | None = None,
        inputs: str | Path | None = None,
        windows: int,
        samples: int | None = None,
        seqlen: int | None = None,
        seed: int,
    ) -> CalibrationSet | SampleSet:
        """Draw what trains the model: windows of text that do not overlap, images, or tensors.

        Parameters
        ----------
        text
            As `osscar.load_calibration` takes it, for a language model.
        images, inputs
            For any other: as `osscar.load_images` and `osscar.load_tensors` take them.
        windows
            How many windows there are unless the caller says otherwise; fewer where the text has no
            room for them.
        samples
            How many there are; by default all images or samples.
        seqlen
            Tokens in each window; by default as many as when the model was calibrated, and where
            that is not known, as for `calibration`.
        seed
            Of the draw.

        Raises
        ------
        DataError, FileError, OptionError, MissingDependency
            As of `calibration`.
        """
        if self.tokenizer is not None:
            self._check_text_alone(images, inputs)
            if seqlen is None:
                known = (one.seqlen for one in reversed(lineage_of(self.model).calibration))
                seqlen = next(filter(None, known), self._window_length())
            return load_calibration(
                text,
                self.tokenizer,
                samples=windows if samples is None else samples,
                seqlen=seqlen,
                seed=seed,
                overlapping=False,
            )
        if text is not None or seqlen is not None:
            raise OptionError(f"{self.source} reads no text: omit text and --seqlen")
        data = self._samples(images, inputs)
        if data is None:
            raise DataError(
                f"{self.source} reads no text: give --images a directory of images or an .npz file "
                f"of them, or --inputs {self._tensors_in_words()}"
            )
        return data if samples is None else data.sample(samples, seed)

    def held_out(
        self,
        *,
        text: str | Path | None = None,
        images: str | Path | None = None,
        inputs: str | Path | None = None,
        windows: int | None = None,
        seqlen: int | None = None,
    ) -> TextSet | SampleSet | None:
        """Find what the model is scored on; None if it reads no text and nothing is given.

        Parameters
        ----------
        text, windows, seqlen
            As `osscar.load_text` takes them, for a language model.
        images
            Images, as `osscar.load_images` takes them.
        inputs
            A file of tensors, as `osscar.load_tensors` takes it.

        Raises
        ------
        DataError
            If the text is missing, unreadable, or too short; or if there are no images, or one of
            them cannot be decoded.
        FileError
            If tensors cannot be read, or do not fit the model.
        OptionError
            If something is given that the model does not read, or two things are; or nothing states
            what is done to an image, or something does and the data are tensors.
        """
        if self.tokenizer is not None:
            self._check_text_alone(images, inputs)
            return load_text(text, self.tokenizer, windows=windows, seqlen=seqlen)
        if text is not None or windows is not None or seqlen is not None:
            raise OptionError(f"{self.source} reads no text: omit --text, --windows and --seqlen")
        return self._samples(images, inputs)

    def _window_length(self) -> int:
        return min(DEFAULT_SEQLEN, context_length(self.model) or DEFAULT_SEQLEN)

    def _check_text_alone(self, images: object, inputs: object) -> None:
        if images is not None or inputs is not None:
            raise OptionError(f"{self.source} reads text, not images: omit --images and --inputs")

    def _samples(self, images: str | Path | None, inputs: str | Path | None) -> SampleSet | None:
        """Read samples of one sort or the other; None if none are given."""
        if images is not None and inputs is not None:
            raise OptionError("--images and --inputs are both given; give one of them")
        if images is not None:
            return self.images(images)
        return None if inputs is None else self.tensors(inputs)

    def _tensors_in_words(self) -> str:
        needed = ", ".join(needed_arguments(self.model, self.stated))
        return f"an .npz or .safetensors file of tensors for {needed}"

    def tensors(self, spec: str | Path) -> TensorSet:
        """Read samples that are fed as they are.

        Parameters
        ----------
        spec
            As for `osscar.load_tensors`.

        Raises
        ------
        FileError
            If they cannot be read, or do not fit the model.
        OptionError
            If the caller stated what is done to an image.
        """
        found = load_tensors(spec, self.model, self.stated)
        self._check_no_images_stated(spec)  # of a file that is there
        return found

    def check_text(self, text: Any, option: str) -> None:
        """Refuse to do without a text; only the demo has its own."""
        if text is None and self.source != DEMO_SOURCE:
            raise DataError(
                f"give {option} a text like what {self.source} will read, such as train.txt; "
                "'builtin' is documentation of Python, with which most models get far worse"
            )

    def _check_no_images_stated(self, source: str | Path) -> None:
        if self.states_images:
            raise OptionError(
                f"{source} is for tensors, which are fed as they are, and no images; omit {OPTIONS}"
            )

    def images(self, spec: Any) -> ImageSet:
        """Find images, which become what the model reads.

        Parameters
        ----------
        spec
            As for `osscar.load_images`.

        Raises
        ------
        DataError
            If there are none; or the model, by its example, reads no images.
        OptionError
            If nothing states what is done to an image.
        """
        preprocessing = self.preprocessing
        own = isinstance(preprocessing, OwnTransform)
        if self.example is not None and not own and image_of(self.example) is None:
            raise no_images(self.example, self.source)
        return load_images(spec, preprocessing or Preprocessing(), reader=self.source)
