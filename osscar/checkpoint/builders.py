"""Where a dense model comes from, written so that no code from a checkpoint builds it again.

A checkpoint with a plan names a class of transformers and its config, or a model of torchvision or
timm and its options.  A model of a user's own has no origin; its user builds it.

transformers builds a model with the number format as torch's default and fills in the weights.  So
what its code computes in float32, such as rotary frequencies, stays in float32, and so do weights
that a family asks to keep.  `torch.nn.Module.to` would round all of it, and positions with it.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
import transformers
from pydantic import NonNegativeInt, with_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from osscar.base.errors import (
    CheckpointError,
    ModelError,
    import_timm,
    import_torchvision,
    warn,
)
from osscar.base.json_files import STRICT, validated
from osscar.checkpoint import modeling_pruned
from osscar.checkpoint.files import CONFIG_FILE, MANIFEST_FILE, Manifest
from osscar.checkpoint.hf_config import (
    DESCRIPTION_ERRORS,
    SHAPES,
    architecture,
    class_of,
    is_any_shape,
)
from osscar.checkpoint.validation import (
    EmptyOnMeta,
    check_config,
    check_room,
    check_tensors,
    offline,
    structure,
)
from osscar.network.detectors import DetectorNetwork
from osscar.network.modules import identity_of, number_format
from osscar.network.tensor_files import read_headers
from osscar.proof.lineage import Library, Origin, lineage_of, note, stored_dtype
from osscar.proof.plan import Number, PruningPlan
from osscar.proof.program import ProgramModule


@dataclass(frozen=True)
class TransformersOrigin:
    """A class of transformers, or an automatic one, and the dense model's config."""

    library: ClassVar[Library] = "transformers"

    kind: Any
    config: Any

    @classmethod
    def of_directory(cls, path: Path) -> TransformersOrigin:
        """Read the config in a directory."""
        described = check_config(path)
        if SHAPES in described:  # what makes these is ours, and not the file beside it
            validated(described[SHAPES], _Shapes, f"{SHAPES} in {path / CONFIG_FILE}")
            names = described.get("architectures")
            kind = getattr(modeling_pruned, str(names[0] if isinstance(names, list) else names))
            return cls(kind, kind.config_class.from_pretrained(path, local_files_only=True))
        try:
            with offline():
                # False, not None: without an answer transformers asks standard input for one.
                config = AutoConfig.from_pretrained(
                    path, local_files_only=True, trust_remote_code=False
                )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise CheckpointError(
                f"the config.json in {path} names Python code of the checkpoint, which osscar.load "
                "does not run; if the model is not pruned, use osscar.load_model with "
                "trust_remote_code=True"
            ) from error
        name = next(iter(config.architectures or ()), "")
        found = getattr(transformers, name, None)
        known = isinstance(found, type) and issubclass(found, PreTrainedModel)
        return cls(found if known else AutoModelForCausalLM, config)

    def read_stock(self, path: Path, dtype: torch.dtype | None) -> nn.Module:
        """Read a checkpoint that needs no plan, in evaluation mode."""
        model, loading = self.read_files(path, dtype)
        # transformers draws what is missing, leaves others out, and warns.
        stored = read_headers(path) or {}
        masks = {name for name, one in stored.items() if not one.dtype.is_floating_point}
        for key, reason in (("missing_keys", "are missing"), ("unexpected_keys", "are too many")):
            names = sorted(set(loading[key]) - masks)
            if names:
                raise CheckpointError(
                    f"the weights in {path} do not fit its config: {len(names)} {reason}, such as "
                    f"{names[0]!r}; download the checkpoint again"
                )
        read: nn.Module = model.eval()
        return read

    def read_files(self, path: Path, dtype: torch.dtype | None, *, trust: bool = False) -> Any:
        """Read a model as transformers does, and what it says of that; `trust` runs its code.

        What the config asks for is compared with the weights before any of it is allocated.
        """
        stored = None if trust else read_headers(path)
        if stored is not None:  # else transformers will say so
            empty = structure(self.build, stored)
            check_tensors(empty, stored, path)
            check_room(empty, path)
        return self.kind.from_pretrained(
            path,
            dtype=dtype or "auto",
            use_safetensors=True,
            local_files_only=not trust,
            trust_remote_code=trust,
            output_loading_info=True,
        )

    def build(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Build the model unfilled, in the number formats that ``from_pretrained`` gives it."""
        auto = self.kind is AutoModelForCausalLM
        make = self.kind.from_config if auto else self.kind._from_config
        options = {"trust_remote_code": False} if auto else {}
        config = copy.deepcopy(self.config)  # in which the library notes the format
        with no_init_weights():
            model: PreTrainedModel = make(config, dtype=dtype or config.dtype, **options)
        _keep_formats(model)
        model.tie_weights()
        return model

    def write(self, model: nn.Module, path: Path) -> None:
        """Write the config, and how the model generates."""
        config = copy.deepcopy(self.config)
        config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        config.architectures = [self.kind.__name__]
        config.save_pretrained(path)
        generation = getattr(model, "generation_config", None)
        if isinstance(generation, GenerationConfig):
            generation.save_pretrained(path)


_Numbers: TypeAlias = Number | list[Number]


@with_config(STRICT)
@dataclass(frozen=True)
class _Shapes:
    """A table of shapes in a config, as `modeling_pruned` reads it."""

    tensors: dict[str, list[NonNegativeInt]]
    numbers: dict[str, dict[str, _Numbers | dict[str, _Numbers]]]


def _keep_formats(model: PreTrainedModel) -> None:
    """Give stored tensors that a family wants in another number format that one, in place."""
    kept = model._get_dtype_plan(model.config.dtype or torch.get_default_dtype())
    if not kept:
        return
    pattern, globs, _ = build_glob_alternation(list(kept))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None and tensor.is_floating_point():
            tensor.data = tensor.data.to(kept[globs[found.lastgroup]])


_DETECTION = "torchvision.models.detection"


@dataclass(frozen=True)
class LibraryOrigin(Origin):
    """A model of torchvision or timm by name and options; of a detector its `DetectorNetwork`."""

    def check(self) -> None:
        """Refuse a name that the library does not list (ModelError): that of a hub, or a path."""
        name, bare = self.name, self.name.partition(".")[0]
        if self.library == "torchvision":
            known = import_torchvision("models").list_models()
        elif bare in (known := import_timm().list_models()) and name != bare:
            known = import_timm().list_pretrained(f"{bare}.*")  # behind the dot are weights
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "see its list_models()"
            raise ModelError(f"{self.library} has no model {name!r:.200}; {hint}")

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Build the model with random weights; none are fetched."""
        self.check()
        if self.library == "timm":
            model = import_timm().create_model(self.name, pretrained=False, **self.options)
        else:
            builder = import_torchvision("models").get_model_builder(self.name)
            # Of segmentation and detection models the backbone would be fetched.
            takes = inspect.signature(builder).parameters
            none = {"weights": None, **{key: None for key in takes if key.startswith("weights")}}
            model = builder(**none, **self.options)
            if builder.__module__.startswith(_DETECTION):
                model = DetectorNetwork(model)
        note(model, origin=Origin(**vars(self)))
        built: nn.Module = model if dtype is None else model.to(dtype)
        return built


Builder: TypeAlias = TransformersOrigin | LibraryOrigin
"""Builds a dense model."""


def builder_of(model: nn.Module) -> Builder | None:
    """Return what builds a model's dense original, or None if that is not known."""
    if isinstance(model, PreTrainedModel):
        return TransformersOrigin(class_of(type(model), model.config), model.config)
    if isinstance(model, ProgramModule) and model.built_by is not None:
        kind, config = model.built_by
        # Others are code of the user's own, which a directory does not name.
        own = architecture(kind)
        known = getattr(transformers, own.__name__, None) is own
        return TransformersOrigin(class_of(kind, config), config) if known else None
    origin = lineage_of(model).origin
    library = origin is not None and origin.library != TransformersOrigin.library
    return LibraryOrigin(**vars(origin)) if library else None


def read_builder(
    path: Path, manifest: Manifest | None
) -> tuple[Builder | None, tuple[PruningPlan, ...]]:
    """Return what builds a directory's model (None: code of a user's own), and the plans left."""
    origin = Origin(TransformersOrigin.library) if manifest is None else manifest.lineage.origin
    plans = () if manifest is None else manifest.lineage.replayed
    if origin is None:
        return None, plans
    if origin.library != TransformersOrigin.library:
        built = LibraryOrigin(**vars(origin))
        try:
            built.check()
        except ModelError as error:
            raise CheckpointError(f"{path / MANIFEST_FILE} names no model: {error}") from error
        return built, plans
    found = TransformersOrigin.of_directory(path)
    if manifest is None and is_any_shape(found.config):
        warn(
            f"{path} has no {MANIFEST_FILE}, as after save_pretrained of transformers: its shapes "
            f"are read from {CONFIG_FILE}, and its calibration and training data are not known, so "
            "that they are not refused as test data"
        )
    return found, plans


# ---- number formats ----------------------------------------------------------------------


M = TypeVar("M", bound=nn.Module)


def cast(model: M, dtype: torch.dtype) -> M:
    """Convert a model, in place, to a number format, as its library has it in that."""
    like = _as_built(model, dtype)
    own = _formats(like)
    formats = {id(tensor): own.get(name, dtype) for name, tensor in names_and_tensors(model)}

    def converted(tensor: Tensor) -> Tensor:
        kind = formats.get(id(tensor), dtype)  # gradients have no name
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    computed = {} if like is None else dict(_computed(model, like))
    model._apply(converted)  # type: ignore[no-untyped-call]
    for name, buffer in computed.items():
        path, _, attribute = name.rpartition(".")
        held = model.get_submodule(path)._buffers
        old = held[attribute]
        assert old is not None
        held[attribute] = buffer.to(old.device)
    return model


def saved_format(
    model: nn.Module, dtype: torch.dtype | None = None
) -> Callable[[str, Tensor], torch.dtype]:
    """Return what tells the format in which `save` writes a tensor, by default the stored one."""
    target = stored_dtype(model) if dtype is None else dtype
    if target == number_format(model):
        return lambda name, tensor: tensor.dtype
    kept = _formats(_as_built(model, target))
    return lambda name, t: kept.get(name, target) if t.is_floating_point() else t.dtype


def names_and_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _formats(model: nn.Module | None) -> dict[str, torch.dtype]:
    named = () if model is None else names_and_tensors(model)
    return {name: t.dtype for name, t in named if t.is_floating_point()}


def _as_built(model: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """Build a model without memory in a number format; None where nothing tells what it keeps."""
    builder = builder_of(model)
    if isinstance(builder, TransformersOrigin):
        # Code of somebody else's raises whatever it meets; it is converted as a whole.
        with suppress(*DESCRIPTION_ERRORS), EmptyOnMeta(), torch.random.fork_rng(devices=[]):
            like: nn.Module = builder.build(dtype)
            return like
    return None


def _computed(model: nn.Module, like: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers that no file holds as another model has them, if only rounding differs."""
    stored = model.state_dict(keep_vars=True).keys()
    fresh = dict(like.named_buffers(remove_duplicate=False))
    for name, old in model.named_buffers(remove_duplicate=False):
        new = fresh.get(name)
        if name in stored or new is None or new.is_meta or not old.is_floating_point():
            continue
        coarser = max(old.dtype, new.dtype, key=lambda kind: torch.finfo(kind).eps)
        if new.dtype != old.dtype and torch.equal(old.cpu().to(coarser), new.to(coarser)):
            yield name, new


def written_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that `save` writes of a model or program, each once.

    Tied ones have the name by which the model of transformers without its head knows them.
    """
    tensors = tensors_of(model)
    inner = f"{getattr(model, 'base_model_prefix', '')}."
    once: dict[object, str] = {}
    for name in sorted(tensors, key=lambda name: (not name.startswith(inner), name)):
        once.setdefault(identity_of(tensors[name]), name)
    return {name: tensors[name] for name in sorted(once.values())}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in a model's state by name, tied ones under each of their names."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
