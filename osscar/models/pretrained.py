"""Models of transformers in a directory: language models, and image classifiers.

Weights are read from safetensors only, never from pickles, and remote code runs only when asked.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from osscar.base.errors import ModelError, OptionError, OsscarError, first_line, warn
from osscar.base.inputs import parse_size
from osscar.base.memory import FOR_MODELS, attempt, memory_for
from osscar.base.printable import pluralize, published
from osscar.checkpoint import reading as checkpoint
from osscar.checkpoint.builders import TransformersOrigin
from osscar.checkpoint.files import read_manifest
from osscar.checkpoint.hf_config import SHAPES
from osscar.checkpoint.streamed import number_format_of, read_streamed
from osscar.checkpoint.validation import (
    OTHERS,
    check_causal,
    check_config,
    check_fields,
    note_manifest,
    offline,
    readable,
)
from osscar.data.preprocessing import LARGEST_SIDE, Transform
from osscar.models.loaded import LoadedModel
from osscar.models.names import directory_of
from osscar.network.modules import check_finite_weights, check_usable, example_length
from osscar.network.tensor_files import read_headers
from osscar.offload.places import DAMAGED, WeightCache
from osscar.proof.lineage import lineage_of, note

_MOST_PADDED = 0.9
"""The least share of a model's tokens that its own tokenizer has: tables are padded by a little."""

_PROCESSOR_FILE, _TOKENIZER_FILE = "preprocessor_config.json", "tokenizer_config.json"


# ---- language models ---------------------------------------------------------------------


def load_language_model(
    name: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
    max_memory: str | int | None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer; a dtype of None is the one stored."""
    cache = None if max_memory is None else WeightCache(parse_size(max_memory), device)
    # True alone: of anything but an answer transformers makes a question to standard input.
    trust_remote_code = trust_remote_code is True
    path, source = directory_of(name)
    manifest = read_manifest(path)
    lists_shapes = SHAPES in check_config(path)
    if lists_shapes and manifest is None:
        source += ", pruned on data that are not known"
    if cache is not None:
        if trust_remote_code:
            raise OptionError(
                "code that a checkpoint brings along is not run on a model that is read from disk; "
                "omit trust_remote_code (`--trust-remote-code`) or max_memory (`--max-memory`)"
            )
        model: Any = read_streamed(path, cache, dtype)
        stored = _stored_format(path)
    elif lists_shapes if manifest is None else not manifest.stock:
        model, stored = checkpoint.load(path, dtype=dtype), _stored_format(path)
    else:
        model, stored = _load_stock(path, source, trust_remote_code, dtype)
        note_manifest(model.eval(), manifest, source)
    known = {"config": model.config} if lists_shapes else {}  # which names the family
    tokenizer = _load_tokenizer(path, source, trust_remote_code=trust_remote_code, **known)
    check_usable(model)
    check_finite_weights(model, DAMAGED)
    note(
        model,
        source=lineage_of(model).source or published(source),
        stored_dtype=str(stored).removeprefix("torch."),
    )
    with memory_for(f"the weights of {name} on {device}", FOR_MODELS):
        model = model.to(device).eval()
        with readable(source):
            check_causal(model, source)
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) < _MOST_PADDED * size:
        warn(
            f"the tokenizer of {source} has {len(tokenizer):,} tokens and the model "
            f"{size:,} embeddings; check that they belong together"
        )
    ids = torch.zeros(2, example_length(model), dtype=torch.int64, device=model.device)
    return LoadedModel(model, source, path, stored, tokenizer, example={"input_ids": ids})


def _stored_format(path: Path) -> torch.dtype:
    """Return the number format of a directory's weights, whichever it is read in."""
    config = TransformersOrigin.of_directory(path).config
    return number_format_of(config, read_headers(path) or {})


def _load_stock(
    path: Path, source: str, trust_remote_code: bool, dtype: torch.dtype | None
) -> tuple[nn.Module, torch.dtype]:
    """Read a model as transformers does; return the number format in which it lies there, too."""
    # A config whose numbers make no sense raises whatever it meets.
    with nullcontext() if trust_remote_code else offline(), attempt(OsscarError) as tried:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
        )
        origin = TransformersOrigin(transformers.AutoModelForCausalLM, config)
        model, loading = origin.read_files(path, dtype, trust=trust_remote_code)
    if tried.failed:
        raise _explained(source, tried.error) from tried.error
    missing, more = (sorted(loading[f"{which}_keys"]) for which in ("missing", "unexpected"))
    if more:  # it would be another model without them
        named = next(iter(model.config.architectures or ()), "")
        left = f"{pluralize(len(more), 'tensor')} in its files, such as {more[0]!r:.60}"
        if named != type(model).__name__:
            raise ModelError(
                f"{source} holds a {named or 'model of another class'}, and as a "
                f"{type(model).__name__} it would lose {left}; {OTHERS}"
            )
        warn(f"{source}: {left}, left out, as {named} has no weights of that name")
    if missing:  # transformers fills these with random numbers, and warns
        raise ModelError(
            f"{source} lacks {len(missing)} of the model's weights, such as {missing[0]!r}; "
            "download the checkpoint again, or one of a causal language model"
        )
    return model, number_format_of(config, read_headers(path) or {})


def _load_tokenizer(path: Path, source: str, *, trust_remote_code: bool, **options: Any) -> Any:
    if (path / _TOKENIZER_FILE).is_file():
        check_fields(path / _TOKENIZER_FILE)
    with nullcontext() if trust_remote_code else offline(), attempt() as tried:
        # The library of tokenizers raises plain exceptions, and panics.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, **options
        )
        if tokenizer("text")["input_ids"]:  # without files, transformers builds an empty one
            return tokenizer
    reason = first_line(tried.error) if tried.failed else "it gives no tokens"
    raise ModelError(
        f"{source} has no tokenizer that transformers can read: {reason:.300}. Copy the "
        "tokenizer's files of the original model into its directory"
    )


def _explained(source: str, error: Exception) -> ModelError:
    """Say what ``from_pretrained`` raised, and what to do where that is known."""
    message = str(error)
    if "trust_remote_code" in message:
        return ModelError(
            f"{source} brings its own code; if you trust its author, allow it with "
            "`--trust-remote-code` (trust_remote_code=True in Python)"
        )
    if "Unrecognized configuration class" in message:
        return ModelError(f"{source} is no causal language model; {OTHERS}")
    advice = "; convert pickled weights first, which can run code and are not read"
    return ModelError(
        f"cannot load {source} as a causal language model: {first_line(error):.500}"
        f"{advice if 'safetensors' in message else ''}"
    )


# ---- image classifiers -------------------------------------------------------------------


def image_processor(path: Path) -> Any:
    """Return the image processor of a classifier in a directory; None if there is none."""
    if not (path / _PROCESSOR_FILE).is_file():
        return None
    check_fields(path / _PROCESSOR_FILE, most=LARGEST_SIDE)
    with readable(path / _PROCESSOR_FILE):
        return transformers.AutoImageProcessor.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )


def transform_of(processor: Any) -> Transform:
    """Return what an image processor does to an image."""

    def processed(image: Any) -> Tensor:
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    steps = " ".join(processor.to_json_string().split())
    return Transform(processed, type(processor).__name__, f"{steps:.500}")


def class_names(model: Any) -> tuple[str, ...]:
    """Return the names of a classifier's classes; none if they are numbers."""
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    numbered = any(name == f"LABEL_{i}" for i, name in enumerate(names))
    return () if numbered else tuple(names)
