"""GGUF, the file format of llama.cpp, for models of the LLaMA graph with layers of any width.

llama.cpp has one width for all layers in its architectures ``llama`` and ``qwen3``, and one for
each in two others that compute the same: ``deci`` what ``llama`` does, and ``openelm`` what
``qwen3`` does, which normalizes queries and keys.  There ``attention.head_count``,
``attention.head_count_kv`` and ``feed_forward_length`` are arrays over the layers.  The rest is in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

``llama`` and ``deci`` rotate neighbouring features of a head together, transformers and the others
those half a head apart, so that for these two the rows of the query and key projections are put in
another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from osscar.base.devices import default_torch
from osscar.base.errors import EquivalenceError, ModelError, optional
from osscar.base.files import atomic_write
from osscar.base.inputs import checked
from osscar.checkpoint.files import checkpoint_directory
from osscar.checkpoint.reading import load
from osscar.export.gguf_tokens import add_value, vocabulary_fields
from osscar.export.open_program import Exported, checked_target

Format: TypeAlias = Literal["f32", "f16", "bf16"]
"""Number formats of the matrices; vectors are float32 always, as llama.cpp wants them."""


_LLAMA, _QWEN3 = ("llama", "deci"), ("qwen3", "openelm")
"""Architectures that compute the same, of one width for all layers and of one for each.

`_LLAMA` rotate neighbouring features, take other positions than the plain ones, and have a place
for biases.  ``openelm`` wants queries, keys and values in one matrix, and reads its output matrix
from the embedding.
"""

_FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _QWEN3,
}

_BLOCK = 32
"""Numbers of a row that llama.cpp quantizes together.

Where other rows are, its program leaves the matrix as it is (``Q4_K_M``) or fails (``Q8_0``).
"""


@default_torch()
def export_gguf(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "f16",
    overwrite: bool = False,
) -> Exported:
    """Write a checkpoint as one GGUF file, which is kept only if what is read back is equal.

    Parameters
    ----------
    directory
        A checkpoint of a language model, pruned or not, with its tokenizer.
    out
        The file; by default beside the directory, such as ``smaller-f16.gguf`` for ``smaller``.
    dtype
        ``f32``, ``f16`` or ``bf16``; vectors, of which there are few, are float32 always.
    overwrite
        Replace a GGUF file; nothing else is ever replaced.

    Raises
    ------
    CheckpointError, ModelError
        If the directory holds none that can be read; or llama.cpp has no graph for the model or no
        name for its tokenizer, with the reason.
    OutputError, EquivalenceError
        If the file is there already or cannot be written, or is not read back as it was written.
    """
    checked("dtype", Format, dtype)
    library = optional("gguf", "gguf", "writing GGUF")
    source = checkpoint_directory(directory)
    given = source.with_name(f"{source.name}-{dtype}.gguf") if out is None else out
    target = checked_target(given, ".gguf", overwrite=overwrite)
    graph = Graph(load(source), dtype, library)
    fields = graph.fields() | vocabulary_fields(source, graph.config.vocab_size, library)
    with atomic_write(target) as partial:
        _write(partial, graph, fields)
        _check_written(partial, graph, fields)
    return Exported(
        target, target.stat().st_size,
        architecture=graph.architecture, dtype=dtype, padding=graph.padding,
    )  # fmt: skip


# ---- the graph ---------------------------------------------------------------------------


class Graph:
    """A model as llama.cpp computes it, or a refusal.

    `library` is the package ``gguf``, `dtype` the number format of the matrices.  The model gets
    `padding` neurons of zeros in all, up to multiples of 32.
    """

    def __init__(self, model: Any, dtype: str, library: Any) -> None:
        reason = _why_not(model)
        if reason is not None:
            raise ModelError(f"the model cannot be written as GGUF: {reason}")
        self.model, self.dtype, self.library = model, dtype, library
        self.config, self.layers = model.config, model.model.layers
        self.padding = _pad_neurons(model)
        attentions = [layer.self_attn for layer in self.layers]
        self.head_width = width = attentions[0].head_dim
        self.heads = [one.q_proj.out_features // width for one in attentions]
        self.key_heads = [one.k_proj.out_features // width for one in attentions]
        self.neurons = [layer.mlp.down_proj.in_features for layer in self.layers]
        alike = all(len(set(of)) == 1 for of in (self.heads, self.key_heads, self.neurons))
        kind, self.alike = _FAMILIES[type(model).__name__], alike
        self.neighbours, self.architecture = kind is _LLAMA, kind[0 if alike else 1]
        if self.packed and not self._tied:
            raise ModelError(
                f"llama.cpp cannot run the model: its layers differ, and {self.architecture!r} has "
                "no output matrix beside the embedding, as this model has; prune all layers alike "
                "(allocation uniform, `--set allocation=uniform`)"
            )

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values are one matrix in the file."""
        return not self.neighbours and not self.alike

    @property
    def _tied(self) -> bool:
        return self.model.lm_head.weight is self.model.model.embed_tokens.weight

    def fields(self) -> dict[str, Any]:
        """Return the sizes that the file names, by key."""
        config, widths = self.config, (self.heads, self.key_heads, self.neurons)
        heads, key_heads, neurons = (of[0] if self.alike else of for of in widths)
        longest, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
        sizes = {
            "block_count": len(self.layers),
            # No more than a sliding window, since no architecture has one.
            "context_length": min(longest, window) if window else longest,
            "embedding_length": config.hidden_size,
            "feed_forward_length": neurons,
            "attention.head_count": heads,
            "attention.head_count_kv": key_heads,
            "attention.key_length": self.head_width,
            "attention.value_length": self.head_width,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": self.head_width,
            "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            "vocab_size": config.vocab_size,
        }
        return {f"{self.architecture}.{key}": size for key, size in sizes.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield each tensor with its name in the file, and how many rotated heads it has, or 0."""
        architecture = self.library.MODEL_ARCH[self.architecture.upper()]
        names = self.library.get_tensor_name_map(architecture, len(self.layers))
        for name, tensor in self._stored():
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            rotated = self.neighbours and (".q_proj." in name or ".k_proj." in name)
            yield found, tensor, tensor.shape[0] // self.head_width if rotated else 0
        factors = _rotary_factors(self.model)
        if factors is not None:
            yield "rope_freqs.weight", factors, 0

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the model, tied ones once."""
        tensors = self.model.state_dict()
        if self._tied:
            del tensors["lm_head.weight"]
        for name, tensor in tensors.items():
            if not self.packed or not any(f".{one}_proj." in name for one in "qkv"):
                yield name, tensor
            elif ".q_proj." in name:
                rows = [tensors[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"]
                yield name.replace(".q_proj.", ".qkv_proj."), torch.cat(rows)


@torch.no_grad()
def _pad_neurons(model: Any) -> int:
    """Add neurons of zeros to each layer, up to whole blocks if rows are such; return how many."""
    added = 0
    if model.config.hidden_size % _BLOCK:
        return 0
    for layer in model.model.layers:
        gate, up, down = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        count = -down.in_features % _BLOCK
        for linear in (gate, up):
            linear.weight = nn.Parameter(pad(linear.weight, (0, 0, 0, count)))
            if linear.bias is not None:
                linear.bias = nn.Parameter(pad(linear.bias, (0, count)))
            linear.out_features += count
        down.weight = nn.Parameter(pad(down.weight, (0, count)))
        down.in_features += count
        added += count
    return added


def _why_not(model: Any) -> str | None:
    """Say what about a model is in no graph that is known here; None if nothing."""
    kind = type(model).__name__
    graph = _FAMILIES.get(kind)
    if graph is None:
        return (
            f"it is a {kind}, and none of {', '.join(_FAMILIES)}, whose graphs are known here; if "
            "its checkpoint is a standard one, give that to llama.cpp's convert_hf_to_gguf.py"
        )
    biased = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if biased and graph is not _LLAMA:
        return f"it has {biased[0]!r}, for which {' and '.join(map(repr, graph))} have no place"
    if model.config.hidden_act != "silu":
        return f"its neurons have the activation {model.config.hidden_act!r} and not 'silu'"
    rotary = model.model.rotary_emb
    scaled = float(rotary.attention_scaling)
    taken = ("default", "linear", "llama3") if graph is _LLAMA else ("default",)
    if rotary.rope_type not in taken or scaled != 1:
        return f"its rotary positions are of the type {rotary.rope_type!r}"
    attentions = [layer.self_attn for layer in model.model.layers]
    widths = {one.head_dim for one in attentions}
    if len(widths) > 1 or any(one.scaling != one.head_dim**-0.5 for one in attentions):
        return f"its heads are {sorted(widths)} features wide, or not scaled by that"
    return None


def _rotary_factors(model: Any) -> Tensor | None:
    """Return by what each frequency is divided, (head width / 2,) float32; None by nothing."""
    rotary = model.model.rotary_emb
    if rotary.rope_type == "default":
        return None
    found: Tensor = rotary.inv_freq.double()
    exponents = torch.arange(len(found), dtype=torch.float64) / len(found)
    plain = float(model.config.rope_parameters["rope_theta"]) ** -exponents
    return (plain / found).float()


def _neighbours(rows: Tensor, heads: int, *, undo: bool = False) -> Tensor:
    """Put rows of each head that rotate together beside one another, or `undo` that."""
    parts = torch.unflatten(rows, 0, (heads, -1, 2) if undo else (heads, 2, -1))
    return parts.transpose(1, 2).flatten(0, 2)


# ---- the file ----------------------------------------------------------------------------

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _type_of(tensor: Tensor, dtype: str) -> str:
    return dtype.upper() if tensor.dim() > 1 else "F32"


def _write(path: Path, graph: Graph, fields: Mapping[str, Any]) -> None:
    """Write a file without the model's name, from which llama.cpp would conclude how it reads."""
    library = graph.library
    writer = library.GGUFWriter(path, graph.architecture)
    try:
        writer.add_file_type(library.LlamaFileType[_FILE_TYPES[graph.dtype]])
        for key, value in fields.items():
            add_value(writer, key, value)
        for key, tensor, _ in graph.tensors():
            kind = _type_of(tensor, graph.dtype)
            size = tensor.numel() * _TORCH[kind].itemsize
            of = library.GGMLQuantizationType[kind]
            writer.add_tensor_info(key, tensor.shape, np.dtype(np.float32), size, of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for key, tensor, heads in graph.tensors():
            ordered = _neighbours(tensor, heads) if heads else tensor
            stored = ordered.to(_TORCH[_type_of(tensor, graph.dtype)]).contiguous()
            if not bool(stored.isfinite().all()):
                raise ModelError(
                    f"{key!r} holds numbers that {graph.dtype} does not; give bf16 or f32"
                )
            if stored.dtype is torch.bfloat16:  # which numpy has not
                stored = stored.view(torch.int16)
            writer.write_tensor_data(stored.cpu().numpy())
    finally:
        writer.close()


def _check_written(path: Path, graph: Graph, fields: Mapping[str, Any]) -> None:
    """Read a file as any reader of GGUF does, and compare it with the model."""
    reader = graph.library.GGUFReader(path)
    same: dict[str, bool] = {}
    for key, value in fields.items():
        field = reader.get_field(key)
        due = float(np.float32(value)) if isinstance(value, float) else value
        same[key] = field is not None and field.contents() == due
    read = {tensor.name: tensor for tensor in reader.tensors}
    for key, tensor, heads in graph.tensors():
        found = read[key]
        values = torch.from_numpy(graph.library.dequantize(found.data, found.tensor_type).copy())
        rows = _neighbours(values, heads, undo=True) if heads else values
        kind = _TORCH[_type_of(tensor, graph.dtype)]
        same[key] = torch.equal(rows, tensor.to(kind).float().cpu())
    other = next((key for key, equal in same.items() if not equal), None)
    if other is not None:
        raise EquivalenceError(f"{other!r} was not read back as it was written")
