"""Whether a checkpoint asks for what it holds: told before anything of it is allocated.

A config is a few numbers, and a library builds whatever they say.  So these are looked at first,
then a model is built of them on the device 'meta', where tensors have no memory, with an eye on how
much it becomes, and its tensors are compared with those that the headers of the weights name.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from osscar.base.errors import CheckpointError, FileError
from osscar.base.json_files import read_object
from osscar.base.messages import warn
from osscar.base.printable import listed
from osscar.checkpoint.hf_config import COUNTS, SHAPES
from osscar.checkpoint.manifest import CONFIG_FILE
from osscar.checkpoint.stored import INDEX_FILE, WEIGHTS_FILE, Stored, read_stored
from osscar.network.modules import number_kind
from osscar.proof.lineage import Origin, Scalar

# ---- the numbers in a config -------------------------------------------------------------

_NEVER_ZERO = frozenset(
    {
        *("hidden_size", "d_model", "n_embd", "vocab_size", "word_embed_proj_dim"),
        *("num_hidden_layers", "n_layer", "n_layers", "num_attention_heads", "n_head"),
        *("num_key_value_heads", "ffn_dim", "max_position_embeddings", "n_positions"),
    }
)
"""What no language model has none of, in families that name it so."""

_COUNT = re.compile(
    r"^(num|n)_|^(max_position_embeddings|d_model|d_ff|ffn_dim|n_inner)$"
    r"|_(size|dim|layers|heads|experts|blocks|labels|positions)$"
)
_SIGNED = re.compile(
    r"beam|return_sequences|ngram|window|images|index|chunk|relative_positions|_id$|_token"
)
"""Names of counts in which some families write -1 or nothing for "none"."""

_SHARE = re.compile(r"drop(out|path)?(_|$)")
_ADDED_TO_A_VARIANCE = re.compile(r"(^|_)eps(ilon)?$")
"""Names of numbers that need not be whole."""

_BUILT_ONE_BY_ONE = re.compile(r"layers?$|blocks?$|stages?$|depths?$|hidden_groups$")
_MOST_LAYERS = 10_000
_MOST = 2**40
"""No dimension of a weight has as many entries."""

_MOST_LABELS = 10**6
"""Libraries make a name for each."""

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")

_REFUSED = {
    "quantization_config": "its weights are quantized, which cannot be pruned: dequantize it first",
    "transformers_weights": "it names another file of weights; rename that to model.safetensors",
}


def check_config(path: Path) -> dict[str, Any]:
    """Return what ``config.json`` in a directory says; refuse one that libraries would choke on."""
    file, config = path / CONFIG_FILE, _read_config(path)
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path} holds an adapter; merge it into its model first")
    for name, why in _REFUSED.items():
        if config.get(name) is not None:
            raise CheckpointError(f"{file} has a {name}: {why}")
    if config.get("return_dict") is False:
        raise CheckpointError(f"{file} has return_dict false: its models would give no logits")
    for place, name, value in _scalars(config, ""):
        reason = _wrong(name, value, whole=place == name)
        if reason is not None:
            raise CheckpointError(f"{file} has {place} {value!r:.40}, {reason}; get it anew")
    return config


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{path} holds no config.json; it is not a checkpoint")
    try:
        return read_object(file)
    except FileError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read: its config.json is damaged "
            f"({error.reason})"
        ) from error


def _scalars(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Yield what is no container: where it stands, the name nearest to it, and itself."""
    for key, inside in value.items():
        where = f"{place}{key}"
        if key == "id2label" and isinstance(inside, dict):
            yield f"{where} of length", "num_labels", len(inside)
        elif isinstance(inside, dict):
            yield from _scalars(inside, f"{where}.")
        elif isinstance(inside, list):
            for number, member in enumerate(inside):
                if isinstance(member, dict):
                    yield from _scalars(member, f"{where}.{number}.")
                else:
                    yield f"{where}.{number}", key, member
        else:
            yield where, key, inside


def _wrong(name: str, value: Any, *, whole: bool) -> str | None:
    """Say why a number in a config can be none, or return None.

    One of a part, or of a single layer (not `whole`), may be zero, where that has nothing of it.
    """
    if name in _KERNELS and isinstance(value, str) and "/" in value:
        return "code of somebody else's that would be fetched and run"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if _SHARE.search(name) and not 0 <= value <= 1:
            return "where a share from 0 to 1 is needed"
        if _ADDED_TO_A_VARIANCE.search(name) and not 0 <= value < math.inf:
            return "where a small number from 0 is needed"
    if isinstance(value, bool) or not isinstance(value, int) or not _COUNT.search(name):
        return None
    least = 1 if whole and name in _NEVER_ZERO else 0
    if value < least and not _SIGNED.search(name):
        return f"where a number from {least} is needed"
    most = _MOST_LAYERS if _BUILT_ONE_BY_ONE.search(name) else _MOST
    most = _MOST_LABELS if name.endswith("labels") else most
    return None if value <= most else f"more than any model has ({most:,})"


# ---- whether it is as it was saved --------------------------------------------------------

_NUMBERS = f"{SHAPES}.numbers."

_NO_MATTER = re.compile(
    r"^_|^(transformers_version|architectures|auto_map|torch_dtype|dtype|use_cache)$"
    r"|initializer|^init_|label|drop|^(bos|eos|sep|decoder_start)_token_id$"
)
"""Fields that nothing which a model computes rests on, or that libraries write as they please."""


def config_fields(path: Path) -> dict[str, Scalar]:
    """Return what a directory's ``config.json`` says of how its model computes.

    They are by where they stand, such as ``rope_parameters.rope_theta``.
    """
    fields: dict[str, Scalar] = {}
    for place, name, value in _scalars(_read_config(path), ""):
        numeric = isinstance(value, int | float) and abs(value) < 2**63
        known = (numeric or isinstance(value, str)) and not any(
            _NO_MATTER.search(part) for part in (place.partition(".")[0], name)
        )
        # Of the table of shapes the numbers: what else it says, the weights have to fit.
        if known and (place.startswith(_NUMBERS) or not place.startswith(f"{SHAPES}.")):
            fields[place] = value
    return fields


def check_unchanged(path: Path, origin: Origin | None) -> None:
    """Compare a directory's ``config.json`` with what it said when the model was saved.

    Other counts of heads or layers than those of the weights are refused, and of other edits, which
    may be meant, a warning says that outputs are no longer those of the model that was saved.
    Nothing is compared where the origin has no options, which are the fields as `config_fields`
    returned them then.
    """
    if origin is None or origin.library != "transformers" or not origin.options:
        return
    saved, now = origin.options, config_fields(path)
    if not any(place.startswith(_NUMBERS) for place in saved):  # earlier versions kept none
        now = {place: value for place, value in now.items() if not place.startswith(_NUMBERS)}
    edits = []
    for place in sorted(saved.keys() | now.keys()):
        before, after = saved.get(place), now.get(place)
        if before == after:
            continue
        told = f"{place} {_or_none(after)} where {_or_none(before)} was saved"
        if COUNTS.search(place) and int in (type(before), type(after)):
            raise CheckpointError(
                f"{path / CONFIG_FILE} has {told}, with the weights beside it; set it back"
            )
        edits.append(told)
    if edits:
        warn(
            f"{path / CONFIG_FILE} was edited since the model was saved, which may now compute "
            f"something else: it has {listed(edits)}"
        )


def _or_none(value: Scalar) -> str:
    return "none" if value is None else f"{value!r:.40}"


# ---- the tensors of a model --------------------------------------------------------------

_SPARE = 2**20
"""Numbers that a small model may have and not store: in tests, most of it."""

_SPARE_BYTES = 2**30
"""Of tables that are computed and not stored, such as masks and positions."""

_MOST_CUT = 64
"""How many times smaller a pruned model may be than the dense one, which has to be built."""


class EmptyOnMeta(TorchFunctionMode):
    """Give tensors that wait for weights no memory, and compute with all others."""

    _WAITING = frozenset({torch.empty, torch.zeros, torch.ones, torch.full})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        return func(*args, **(options | {"device": "meta"} if func in self._WAITING else options))


def stored_in(path: Path) -> dict[str, Stored] | None:
    """Return what weights a directory holds; None if none are in safetensors."""
    if not (path / WEIGHTS_FILE).exists() and not (path / INDEX_FILE).exists():
        return None
    try:
        return read_stored(path)
    except FileError as error:
        raise CheckpointError(f"the weights cannot be read: {error}; get them anew") from error


def structure(
    build: Callable[[], nn.Module],
    stored: Mapping[str, Stored],
    path: Path,
    *,
    pruned: bool,
    computed: bool = False,
) -> nn.Module:
    """Build a model without memory for its weights, and refuse one that is much more than these.

    `pruned` tells whether the weights are those of a smaller model than this, `computed` whether
    what the model computes, such as rotary frequencies, has values: what waits for weights is on
    the device 'meta', or all of it.
    """
    elements = sum(tensor.elements for tensor in stored.values())
    times = _MOST_CUT if pruned else 1
    most = times * max(elements, _SPARE)

    def too_much(of: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is not a checkpoint that can be read: its config asks for {of}, and the "
            f"weights are {elements:,} numbers in {len(stored):,} tensors"
        )

    def check(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter) and value.numel() > most:
            raise too_much(f"a {name!r} of {type(module).__name__} of {tuple(value.shape)}")

    def built(place: AbstractContextManager[object]) -> nn.Module:
        allowed = 1000 + 20 * len(stored)
        with _watched(check, allowed, too_much), place:
            return build()

    if computed:
        model = built(EmptyOnMeta())
    else:
        try:
            model = built(torch.device("meta"))
        except NotImplementedError:  # RegNet computes its widths with tensors, which need values
            model = built(EmptyOnMeta())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if not numbers <= 2 * most:
        raise too_much(f"{numbers:,} parameters")
    for name, buffer in model.named_buffers():
        if not buffer.numel() * buffer.element_size() <= times * (_SPARE_BYTES + 8 * elements):
            raise too_much(f"a table {name!r} of {tuple(buffer.shape)}")
    return model


@contextmanager
def _watched(
    check: Callable[[nn.Module, str, Any], None],
    allowed: int,
    too_much: Callable[[str], CheckpointError],
) -> Iterator[None]:
    """Check what this thread gives to modules in the block, of which so many are allowed."""
    thread, registered = threading.get_ident(), itertools.count(1)

    def given(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == thread and value is not None:
            if next(registered) > allowed:
                raise too_much(f"more than {allowed:,} modules and tensors")
            check(module, name, value)

    with ExitStack() as hooks:
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
            registration.register_module_module_registration_hook,
        ):
            hooks.callback(register(given).remove)
        yield


def check_tensors(model: nn.Module, stored: Mapping[str, Stored], path: Path) -> None:
    """Refuse weights that are of other shapes than a model's, or of another sort of number.

    The model may be on 'meta'. Names that it does not know are no matter here: who fills it will
    miss what they should be.
    """
    prefix = getattr(model, "base_model_prefix", "")
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, tensor in stored.items():
        mine = next((own[n] for n in names_of(name, prefix) if n in own), None)
        if mine is None:
            # Old checkpoints hold masks of whole numbers, which are computed anew.
            if tensor.kind == "complex" or (tensor.kind == "whole" and name.endswith("weight")):
                raise _unlike(path, name, tensor, "a tensor of real numbers")
        elif tuple(mine.shape) != tensor.shape or number_kind(mine) != tensor.kind:
            raise _unlike(path, name, tensor, f"{mine.dtype} {tuple(mine.shape)}")


def names_of(name: str, prefix: str) -> tuple[str, ...]:
    """Return what a tensor may be called in the model: with the name of its base, or without."""
    return (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))


def _unlike(path: Path, name: str, tensor: Stored, due: str) -> CheckpointError:
    return CheckpointError(
        f"the weights in {path} do not fit its config: {name!r} is {tensor.dtype} "
        f"{tensor.shape}, where {due} is due; get the checkpoint anew, or, if it was written by "
        "save_pretrained of a pruned model, write it with osscar.save"
    )
