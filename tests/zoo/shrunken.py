"""Tiny random models of transformers, from the names that the package maps: no family by hand.

The config of a family is taken as it comes, and its sizes are shrunk by rules on the names of its
fields.  Whether what comes of it is a model is found out by running it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo.case import Inputs, Made, NotBuilt, alive, check_size, first_that_runs

HEADS = (
    *("MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "CAUSAL_LM"),
    *("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION"),
    *("UNIVERSAL_SEGMENTATION", "VIDEO_CLASSIFICATION", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
)
"""Kinds of models, in order: a family is covered by the first that it has."""

_VOCABULARY, _HIDDEN, _HEADS, _HEAD, _NEURONS = 96, 64, 4, 16, 80
_POSITIONS, _WINDOW, _IMAGE, _PATCH = 64, 8, 32, 8


def families() -> dict[str, str]:
    """Return, for each family, the class that covers it; of families of one class only one."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, str] = {}
    for head in HEADS:
        for family, name in getattr(auto, f"MODEL_FOR_{head}_MAPPING_NAMES").items():
            found.setdefault(family, name if isinstance(name, str) else name[0])
    by_class: dict[str, str] = {}
    for family, name in found.items():
        if name not in by_class or _plain(name).startswith(_plain(family)):
            by_class[name] = family
    return {family: name for name, family in by_class.items()}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def make(family: str) -> Made:
    """Build a tiny model of a family, and inputs on which it runs.

    Raises NotBuilt if the rules do not lead to a model that runs.
    """
    return built(getattr(hf, families()[family]))


def built(
    kind: Any,
    fields: Mapping[str, Any] | None = None,
    inputs: Callable[[], list[Inputs]] | None = None,
) -> Made:
    """Build a tiny model of a class, with some fields of its config and inputs, if given."""
    first: NotBuilt | None = None
    for way in _WAYS:
        torch.manual_seed(0)
        try:
            config = kind.config_class(**{**smaller(kind.config_class(), way), **(fields or {})})
            with torch.device("meta"):
                check_size(kind(config))
            model = kind(config).eval()
            alive(model)
            tried = _candidates(model, config) if inputs is None else [inputs()]
            return Made(model, first_that_runs(model, tried), kind.__name__)
        except MemoryError:
            raise
        except Exception as error:  # whatever configs, constructors and sizes that do not fit raise
            first = first or (error if isinstance(error, NotBuilt) else NotBuilt.of(error))
    raise first or NotBuilt("there is no way to shrink it")


@dataclass(frozen=True)
class Way:
    """How a config is shrunk."""

    layers: int = 2
    """How many are left, if all kinds of layers are among them then."""
    grouped: bool = False
    """Whether several query heads share keys and values, also where they need not."""
    derived: bool = False
    """Whether numbers that the config would compute are shrunk and given, too."""
    widths: bool = True
    """Whether all sizes become smaller, rather than depth, vocabulary and lengths alone."""


_WAYS = (
    *(Way(2, grouped, derived) for derived in (False, True) for grouped in (True, False)),
    *(Way(layers, False, derived) for layers in (4, 8) for derived in (False, True)),
    Way(widths=False),
)
"""They are tried one after another, since no rule fits all families."""


# ---- sizes -------------------------------------------------------------------------------

_MOST = {
    r"num_kv_shared_layers|num_(nextn|mtp)_.*|num_.*predict_layers": 0,
    r".*first_k_dense_replace|moe_layer_start_index": 1,
    r"(.*_)?(n|num)_group|n_groups|(.*_)?topk_group": 1,
    r".*(experts_per_tok(en)?|top_?k|moe_k|num_selected_experts).*": 2,
    r"(.*_)?(num|n)_(\w+_)?experts|moe_num_experts": 4,
    r"n_shared_experts|num_shared_experts": 1,
    r"(.*_)?(vocab_size|vocab)(_.*)?|n_words": _VOCABULARY,
    r".*(lora_rank|_rank|dt_rank).*": 24,
    r".*(qk_rope_head_dim|rotary_dim|rope_dim)": 8,
    r".*(d_ssm|d_inner)": _HIDDEN,
    r"qk_head_dim": _HEAD + 8,
    r".*(head_dim|head_size|d_head|d_kv|kv_channels|dim_head|attention_head_dim)": _HEAD,
    r".*num_key_heads": 2,
    r".*heads?(_\w+)?|nhead": _HEADS,
    r"(.*_)?expand(_v)?": 1,
    r".*(state_size|d_state|ssm_state).*": 16,
    r"moe_\w*(intermediate|hidden|ffn)\w*|.*expert\w*_(intermediate|ffn|hidden)\w*": 32,
    r".*(intermediate|ffn|feedforward|mlp_dim|d_ff|n_inner|filter_size|mlp_hidden).*": _NEURONS,
    r"(?!.*(fusion|per_|every|index|offset|period|freq|step|interval|start|end|first|last|replace))"
    r".*(layers?|depth|num_blocks|num_stages_text)": 2,
    r".*(max_position|n_positions|n_ctx|max_seq|max_target|max_source|max_length|context_len|"
    r"num_positions|seq_length|block_size|max_context).*": _POSITIONS,
    r".*(sliding_window|attention_window|window|chunk_size|local_attention).*": _WINDOW,
    r".*patch_size": _PATCH,
    r".*image_size|input_size": _IMAGE,
    r".*(hidden_size|d_model|n_embd|embed_dim|model_dim|hidden_dim|projection_dim|embedding_size"
    r"|emb_dim|_width|width|_dim|dim|_channels|features?|_size|n_embed|embed_proj_dim)": _HIDDEN,
}
"""What a whole number may be at most, by the first expression that matches its name."""

_KEY_HEADS = r".*(key_value_heads|kv_heads?|n_head_kv|multi_query_group_num)"
_NOT_WIDTHS = (
    r".*(layers?|layer_types?|n_layer|depths?|vocab_size|position_embeddings|n_positions|image_size"
    r"|experts|token_id|rope_parameters)"
)
_DEPTHS = r".*(depth|layers|num_blocks|blocks).*"
_WIDTHS = r".*(hidden_size|dims?|channels|width|filters|embed|sizes|planes).*"
_ID = r".*(_token_id|_token_index|_token_ids?|_id)"


def smaller(config: Any, way: Way) -> dict[str, Any]:
    """Return what a config is to be made with: every size smaller, as the rules say."""
    fields = {name: value for name, value in vars(config).items() if name[0] != "_"}
    kept = _layers_to_keep(fields, way.layers)
    new: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, hf.PreTrainedConfig):
            new[name] = type(value)(**smaller(value, way))
            continue
        is_number = type(value) is int
        if is_number and re.fullmatch(_KEY_HEADS, name) and value > 1:
            if way.grouped or (way.derived or not _is_derived(config, name)):
                every = value in (fields.get("num_attention_heads"), fields.get("n_head"))
                new[name] = _HEADS if every and not way.grouped else 2
            continue
        if is_number and not way.derived and _is_derived(config, name):
            continue
        if not (way.widths or re.fullmatch(_NOT_WIDTHS, name)):
            continue
        small = _shrunk(name, value, fields, kept)
        if small != value:
            new[name] = small
    return new


def _is_derived(config: Any, name: str) -> bool:
    """Whether a config computes a number from others where none is given."""
    known: Mapping[str, Any] = getattr(type(config), "__dataclass_fields__", {})
    return bool(known) and (name not in known or known[name].default is None)


def _layers_to_keep(fields: Mapping[str, Any], least: int) -> list[int]:
    """Return numbers of layers among which there is one of each kind."""
    count = _count(fields)
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == count > 4]
    kinds = [tuple(map(str, found)) for found in zip(*lists, strict=True)]
    firsts = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i][:4]
    others = [i for i in range(least) if i not in firsts]
    return sorted([*firsts, *others][: max(least, len(firsts))])


_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _count(fields: Mapping[str, Any]) -> int:
    return next((fields[n] for n in _COUNTS if isinstance(fields.get(n), int)), 0)


def _shrunk(name: str, value: Any, fields: Mapping[str, Any], kept: list[int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if re.fullmatch(_ID, name):
            return value if value < 8 else 3 + sum(map(ord, name)) % 40
        if name in _COUNTS:
            return min(value, len(kept))
        fitting = (most for names, most in _MOST.items() if re.fullmatch(names, name))
        return min(value, next(fitting, value))
    if isinstance(value, list | tuple):
        return type(value)(_shrunk_list(name, list(value), fields, kept))
    if isinstance(value, dict) and "rope" in name:
        return _shrunk_rope(value)
    return value


def _shrunk_list(
    name: str, values: list[Any], fields: Mapping[str, Any], kept: list[int]
) -> list[Any]:
    if len(values) == _count(fields) > 4:  # shorter ones are of stages
        return [_shrunk(name, values[i], fields, kept) for i in kept]
    numbers = all(type(value) is int for value in values)
    if not values or not numbers:
        return values
    if re.fullmatch(_ID, name):
        return [value if value < 8 else 3 + value % 40 for value in values]
    if "image_size" in name:
        return [min(value, _IMAGE) for value in values]
    if re.fullmatch(_DEPTHS, name):
        return [min(value, 2) for value in values]
    if "head" in name:  # powers of two divide every width
        return [min(_HEADS, 2 ** (value.bit_length() - 1)) if value else 0 for value in values]
    factor = max(1, max(values) // _HIDDEN)
    if re.fullmatch(_WIDTHS, name) and all(value % factor == 0 for value in values):
        return [value // factor for value in values]
    return values


def _shrunk_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink what says how positions turn: parts of half a head, and the positions trained on."""
    new = {k: _shrunk_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    for key, value in new.items():
        if key == "mrope_section":
            new[key] = [2, 3, 3]
        elif key.endswith("_factor") and isinstance(value, list):
            new[key] = [1.0] * (_HEAD // 2)
        elif key == "original_max_position_embeddings":
            new[key] = _POSITIONS // 2
    return new


# ---- inputs ------------------------------------------------------------------------------


def _candidates(model: nn.Module, config: Any) -> Iterator[list[Inputs]]:
    """Yield pairs of inputs that a model may run on, the most varied first."""
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if "pixel" in main or ("pixel_values" in takes and "input_ids" not in takes):
        name = main if main in takes else "pixel_values"
        yield from _images(name, config)
        return
    for one, two in ((7, 11), (16, 24), (32, 32), (64, 64)):
        texts = [_text(2, one, takes, config), _text(3, two, takes, config)]
        if config.model_type in _MASKED:
            for text in texts:
                text["attention_mask"] = torch.ones_like(text["input_ids"])
        yield texts
        if "pixel_values" in takes:
            size = _image_size(config)
            yield [
                {**text, "pixel_values": torch.randn(len(text["input_ids"]), 3, size, size)}
                for text in texts
            ]


_MASKED = ("longt5", "switch_transformers")
"""Their encoders make up a mask where none is given, but not while they are traced."""


def _text(batch: int, length: int, takes: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    end = min(_VOCABULARY, getattr(config, "vocab_size", None) or _VOCABULARY)
    found = {"input_ids": torch.randint(50, end, (batch, length))}
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = torch.randint(50, end, (batch, max(4, length - 2)))
    return found


def _images(name: str, config: Any) -> Iterator[list[Inputs]]:
    size = _image_size(config)
    for one, two in ((size, size * 3 // 2), (size, size), (64, 96), (64, 64), (128, 128)):
        yield [{name: torch.randn(2, 3, one, one)}, {name: torch.randn(3, 3, two, two)}]
    for frames in (getattr(config, "num_frames", 2), 2):
        yield [{name: torch.randn(b, frames, 3, size, size)} for b in (2, 3)]


def _image_size(config: Any) -> int:
    for holder in (config, getattr(config, "vision_config", None)):
        size = getattr(holder, "image_size", None)
        size = size[0] if isinstance(size, list | tuple) else size
        if isinstance(size, int):
            return size
    return 64
