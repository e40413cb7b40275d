"""FLAP, SliceGPT and ShortGPT, from the formulas of their papers, for OPT and Llama."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Form, Smaller
from benchmarks.peers.backends import with_counts
from osscar.network.modules import count_parameters


@dataclass(frozen=True)
class Half:
    """Attention or the feed-forward part of a decoder block.

    Its readers read the stream that the norm, a name in the block, has normalized; its writer adds
    to the stream.
    """

    block: Any
    norm: str
    readers: tuple[nn.Linear, ...]
    writer: nn.Linear


@dataclass(frozen=True)
class Decoder:
    """The parts of an OPT or a Llama that methods for decoders name.

    The embeddings write the first of the stream, the head reads the last of it, from a norm whose
    name in the stack is `last`; attention and feed-forward parts take turns.
    """

    stack: Any
    last: str
    embeddings: tuple[nn.Embedding, ...]
    head: nn.Linear
    halves: tuple[Half, ...]

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """Find them."""
        if hasattr(model.model, "decoder"):
            stack, last = model.model.decoder, "final_layer_norm"
            embeddings = (stack.embed_tokens, stack.embed_positions)
            halves = [half for block in stack.layers for half in _opt(block)]
        else:
            stack, last, embeddings = model.model, "norm", (model.model.embed_tokens,)
            halves = [half for block in stack.layers for half in _llama(block)]
        return cls(stack, last, embeddings, model.lm_head, tuple(halves))


def _opt(block: Any) -> Iterator[Half]:
    inner = block.self_attn
    yield Half(block, "self_attn_layer_norm", _qkv(inner), inner.out_proj)
    yield Half(block, "final_layer_norm", (block.fc1,), block.fc2)


def _llama(block: Any) -> Iterator[Half]:
    mlp = block.mlp
    yield Half(block, "input_layernorm", _qkv(block.self_attn), block.self_attn.o_proj)
    yield Half(block, "post_attention_layernorm", (mlp.gate_proj, mlp.up_proj), mlp.down_proj)


def _qkv(attention: Any) -> tuple[nn.Linear, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj


# ---- FLAP and ShortGPT -------------------------------------------------------------------


@torch.no_grad()
def flap(case: Case) -> Smaller:
    """Compare heads and neurons of all layers by how much their outputs fluctuate.

    An et al., "Fluctuation-based adaptive structured pruning for large language models", AAAI 2024,
    arXiv 2312.11983: an input j of a layer with weights W scores ``var(x_j) |W_j|^2`` on the dense
    model, a head the mean of its inputs; scores of a layer are standardized, and the highest of all
    layers stay until the size is reached.  Means of what leaves are added to biases, so that there
    have to be some.
    """
    halves = Decoder.of(case.model).halves
    if any(half.writer.bias is None for half in halves):
        raise NotImplementedError("FLAP adds biases to layers that have none, which is not done")
    inputs: list[list[Tensor]] = [[] for _ in halves]
    case.observe(
        case.model,
        [half.writer for half in halves],
        lambda index, x, _: inputs[index].append(x.flatten(0, -2)),
    )
    heads = case.model.config.num_attention_heads
    names = {module: name for name, module in case.model.named_modules()}
    units: list[tuple[float, str, float]] = []  # score, group, parameters
    for index, (half, seen) in enumerate(zip(halves, inputs, strict=True)):
        group = f"{names[half.block]}.{'neurons' if index % 2 else 'self_attn.heads'}"
        scores = torch.cat(seen).var(0) * half.writer.weight.square().sum(0)
        scores = scores if index % 2 else scores.view(heads, -1).mean(1)
        scores = (scores - scores.mean()) / scores.std()
        owned = half.writer.weight.numel() + sum(map(count_parameters, half.readers))
        units += [(score, group, owned / len(scores)) for score in scores.tolist()]
    left = case.allowed - count_parameters(case.model) + sum(cost for *_, cost in units)
    counts = dict.fromkeys((group for _, group, _ in units), 0)
    for _, group, cost in sorted(units, reverse=True):
        if cost > left:
            break
        counts[group] += 1
        left -= cost
    return with_counts(case, {group: max(1, count) for group, count in counts.items()})


@torch.no_grad()
def short_gpt(case: Case) -> Smaller:
    """Remove whole blocks that turn the stream least, as many as come nearest to the size.

    Men et al., "ShortGPT: layers in large language models are more redundant than you expect",
    arXiv 2403.03853: the influence of block i is ``1 - mean(cos(x_i, x_i+1))`` over all tokens, of
    what it reads and what it puts out; blocks of the least influence leave at once.
    """
    model: Any = copy.deepcopy(case.model)
    stack = Decoder.of(model).stack
    similar = torch.zeros(len(stack.layers), dtype=torch.float64)

    def see(index: int, x: Tensor, y: Tensor) -> None:
        similar[index] += torch.cosine_similarity(x, y, dim=-1).double().sum()

    case.observe(model, stack.layers, see)
    each = count_parameters(stack.layers[0])
    count = round((count_parameters(model) - case.allowed) / each)
    gone = set(similar.argsort(descending=True)[:count].tolist())
    stack.layers = nn.ModuleList(b for i, b in enumerate(stack.layers) if i not in gone)
    for index, block in enumerate(stack.layers):
        block.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(stack.layers)
    return Smaller(model, Form.PRETRAINED)


# ---- SliceGPT ----------------------------------------------------------------------------


@torch.no_grad()
def slice_gpt(case: Case) -> Smaller:
    """Turn the stream to its principal components, and keep the first of them.

    Ashkboos et al., "SliceGPT: compress large language models by deleting rows and columns", ICLR
    2024, arXiv 2401.15024.  A root-mean-square norm commutes with a rotation Q, so that weights
    that read the stream may be W Q and those that write it Q'W; LayerNorm becomes one as its mean
    is taken from what is written, and its scale and bias go into what reads.  Each norm has a Q of
    its own, eigenvectors of X'X of what it reads (here of the dense model), which is why the
    stream is multiplied by Q_i'Q_i+1 where it passes by.  Input and output embeddings are turned
    by different Q, so that they are no longer tied.
    """
    model: Any = copy.deepcopy(case.model)
    parts = Decoder.of(model)
    halves, head = parts.halves, parts.head
    head.weight = nn.Parameter(head.weight.clone())
    model.config.tie_word_embeddings = False
    width = head.in_features
    make_root_mean_square(parts)
    turns = principal_components(model, parts, case)
    across = [one.T @ after for one, after in itertools.pairwise(turns)]
    linear = sum(m.weight.numel() for m in (*parts.embeddings, head))
    linear += sum(w.weight.numel() for half in halves for w in (*half.readers, half.writer))
    linear += sum(half.writer.out_features for half in halves if half.writer.bias is not None)
    fixed = count_parameters(model) - linear
    sizes = (fixed + linear * k / width + len(halves) * k * k for k in range(width + 1))
    kept = max(k for k, size in enumerate(sizes) if size <= case.allowed)
    cut = [turn[:, :kept] for turn in turns]
    for one in parts.embeddings:
        one.weight = nn.Parameter(one.weight @ cut[0])
    for i, half in enumerate(halves):
        for reader in half.readers:
            reader.weight = nn.Parameter(reader.weight @ cut[i])
        half.writer.weight = nn.Parameter(cut[i + 1].T @ half.writer.weight)
        if half.writer.bias is not None:
            half.writer.bias = nn.Parameter(cut[i + 1].T @ half.writer.bias)
    head.weight = nn.Parameter(head.weight @ cut[-1])
    passing = [nn.Parameter(one[:kept, :kept].clone()) for one in across]
    for i in range(len(parts.stack.layers)):
        two = slice(2 * i, 2 * i + 2)
        parts.stack.layers[i] = SlicedBlock(halves[two], passing[two])
    return Smaller(model)


class RootMeanSquare(nn.Module):
    """Divide by the root of the mean square over what was the width before it was cut."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().sum(-1, keepdim=True) / self.width + self.eps).rsqrt()


class SlicedBlock(nn.Module):
    """A decoder block whose stream is turned where it passes by attention and feed-forward part."""

    def __init__(self, halves: tuple[Half, ...], passing: list[nn.Parameter]) -> None:
        super().__init__()
        self.block, self.passing = halves[0].block, nn.ParameterList(passing)
        self.norms = [half.norm for half in halves]

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        first, second = (getattr(self.block, name) for name in self.norms)
        attended, _ = self.block.self_attn(hidden_states=first(x), **given)
        x = x @ self.passing[0] + attended
        y = second(x)
        if hasattr(self.block, "mlp"):
            return x @ self.passing[1] + self.block.mlp(y)
        return x @ self.passing[1] + self.block.fc2(self.block.activation_fn(self.block.fc1(y)))


def make_root_mean_square(parts: Decoder) -> None:
    """Give what norms multiply, add and subtract to the layers around them."""
    centred = False
    readers = [(half.block, half.norm, half.readers) for half in parts.halves]
    for owner, name, linears in (*readers, (parts.stack, parts.last, (parts.head,))):
        norm: Any = getattr(owner, name)
        shift = getattr(norm, "bias", None)
        centred |= isinstance(norm, nn.LayerNorm)
        for linear in linears:
            if shift is not None:
                old = 0 if linear.bias is None else linear.bias
                linear.bias = nn.Parameter(old + linear.weight @ shift)
            linear.weight = nn.Parameter(linear.weight * norm.weight)
        eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        setattr(owner, name, RootMeanSquare(parts.head.in_features, eps))
    if not centred:
        return
    for embedding in parts.embeddings:
        embedding.weight = nn.Parameter(embedding.weight - embedding.weight.mean(1, keepdim=True))
    for half in parts.halves:
        half.writer.weight = nn.Parameter(half.writer.weight - half.writer.weight.mean(0))
        half.writer.bias = nn.Parameter(half.writer.bias - half.writer.bias.mean())


def principal_components(model: Any, parts: Decoder, case: Case) -> list[Tensor]:
    """Return eigenvectors of X'X at each norm, the largest first, (width, width) each."""
    norms = [getattr(half.block, half.norm) for half in parts.halves]
    norms.append(getattr(parts.stack, parts.last))
    width = parts.head.in_features
    squares = [torch.zeros(width, width, dtype=torch.float64) for _ in norms]

    def see(index: int, x: Tensor, _: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        squares[index] += rows.T @ rows

    case.observe(model, norms, see)
    return [torch.linalg.eigh(one).eigenvectors.flip(1).float() for one in squares]
