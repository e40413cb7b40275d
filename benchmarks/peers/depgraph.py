"""Torch-Pruning (Fang et al., "DepGraph", CVPR 2023, arXiv 2301.12900), by its own examples.

Images: its CIFAR scripts (`reproduce/main.py` and `reproduce/scripts/prune/cifar` of its
repository): channels of all layers are ranked together, and leave in 400 small steps until the
operations are few enough; magnitude is the l1 norm, and group norm is divided by its maximum, after
sparse training with ``reg=5e-4``.  Taylor importance does better with the same share of each layer,
which is the default; its gradients are of the calibration images with their labels.  Batch-norm
statistics are then taken anew.

Text: its example for language models (`examples/LLMs/prune_llm.py`): equal shares of each layer,
whole heads, the head of the vocabulary ignored; where the stream keeps its width, what writes to
it is ignored, too.  LLM-Pruner's importance (Ma et al., NeurIPS 2023, arXiv 2305.11627, the
first-order term ``|w dL/dw|``) is the one that Torch-Pruning calls Taylor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks.case import Case, Smaller
from benchmarks.peers.decoders import Decoder

STEPS = 400
"""In which all channels would leave."""

MOST = 0.8
"""Share of a layer that may leave; 1 is the default, and half of the operations of ResNet-20 then
leave single channels: top-1 of 49.8 % in the place of 54.0 %."""

SPARSE_STEPS, SPARSE_RATE, SPARSE_REG = 64, 0.01, 5e-4
"""Of the training that makes groups sparse, by stochastic gradient descent with momentum 0.9."""


@dataclass(frozen=True)
class Importance:
    """One of Torch-Pruning's criteria, made from its module, with the settings of its examples."""

    make: Callable[[Any], Any]
    gradients: int = 0
    """In how many steps the loss's gradients are taken anew; 0: it needs none."""
    together: bool = True
    """Whether the channels of all layers are ranked together, or the same share of each leaves."""
    sparse: bool = False
    """Whether groups are trained to be sparse before."""
    everything: bool = False
    """Whether the stream that blocks add to is made narrower, too."""


IMAGES = {
    "magnitude": Importance(lambda i: i.GroupMagnitudeImportance(p=1)),
    "Taylor": Importance(lambda i: i.GroupTaylorImportance(), gradients=8, together=False),
    "group norm": Importance(
        lambda i: i.GroupMagnitudeImportance(p=2, normalizer="max"), sparse=True
    ),
}
TEXT = {
    "magnitude": Importance(lambda i: i.GroupMagnitudeImportance(p=2)),
    "Taylor": Importance(lambda i: i.GroupTaylorImportance(), gradients=1),
    "magnitude, every layer": Importance(
        lambda i: i.GroupMagnitudeImportance(p=2), everything=True
    ),
}
"""Group norm differs from magnitude in its sparse training alone, which the example lacks."""


def prune_images(case: Case, name: str) -> Smaller:
    """Remove channels until the operations are few enough."""
    import torch_pruning as tp

    asked = IMAGES[name]
    model: Any = copy.deepcopy(case.model)
    importance = asked.make(tp.importance)
    example = next(iter(case.batches[0].values()))[:1]
    pruner = (tp.pruner.GroupNormPruner if asked.sparse else tp.pruner.BasePruner)(
        model,
        example,
        importance=importance,
        global_pruning=asked.together,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        max_pruning_ratio=MOST,
        ignored_layers=ignored(model),
        **({"reg": SPARSE_REG} if asked.sparse else {}),
    )
    images = torch.cat([next(iter(batch.values())) for batch in case.batches])
    assert case.labels is not None
    if asked.sparse:
        train_sparse(model, pruner, images, case.labels, case.seed)
    for step in range(STEPS):
        if asked.gradients and step % asked.gradients == 0:
            model.zero_grad()
            F.cross_entropy(model(images), case.labels).backward()
        if step_down(case, model, pruner):
            break
    model.zero_grad()
    update_bn(images.split(64), model)
    return Smaller(model.eval())


def step_down(case: Case, model: nn.Module, pruner: Any) -> bool:
    """Take one step, group by group, and tell whether the model became small enough in it."""
    for group in pruner.step(interactive=True):
        group.prune()
        if case.used(model) <= case.allowed:
            return True
    return False


def ignored(model: Any) -> list[nn.Module]:
    """Return the layers that stay as wide as they are: the classifier, and what writes the stream.

    In ResNet-20 that is the last convolution of each block, and the first of all.  Blocks of
    MobileNetV2 can follow, so that only its classifier stays.
    """
    if not hasattr(model, "layer1"):
        return [model.classifier]
    stages = (model.layer1, model.layer2, model.layer3)
    return [model.linear, model.conv1, *(block.conv2 for stage in stages for block in stage)]


def train_sparse(model: nn.Module, pruner: Any, images: Tensor, labels: Tensor, seed: int) -> None:
    """Train with the pruner's own regularization, as its README says."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=SPARSE_RATE, momentum=0.9)
    model.train()
    pruner.update_regularizer()
    for _ in range(SPARSE_STEPS):
        drawn = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[drawn]), labels[drawn]).backward()
        pruner.regularize(model)
        optimizer.step()
    model.eval()


# ---- text --------------------------------------------------------------------------------


def prune_text(case: Case, name: str) -> Smaller:
    """Remove the same share of heads in each layer, and of neurons until the model is small.

    The share of neurons is the least of hundredths that makes it so; where the stream gives, it is
    that of all.
    """
    import torch_pruning as tp

    asked = TEXT[name]
    dense: Any = copy.deepcopy(case.model)
    dense.config.use_cache = False
    importance = asked.make(tp.importance)
    if asked.gradients:
        for tokens in (tokens for batch in case.batches for tokens in batch["input_ids"].split(1)):
            dense(input_ids=tokens, labels=tokens).loss.backward()
    count = dense.config.num_attention_heads
    heads = math.floor((1 - case.setting.units["heads"]) * count) / count
    low, high, found = 0, 100, None
    while high - low > 1:
        share = (low + high) // 2
        model = copy.deepcopy(dense)
        for new, old in zip(model.parameters(), dense.parameters(), strict=True):
            new.grad = old.grad
        taken = share / 100
        cut(model, importance, case, taken if asked.everything else heads, taken, asked.everything)
        if case.used(model) <= case.allowed:
            high, found = share, model
        else:
            low = share
    if found is None:
        raise ValueError("no share of neurons makes it small enough")
    found.zero_grad()
    return Smaller(found)


def cut(
    model: Any,
    importance: Any,
    case: Case,
    heads: float,
    neurons: float,
    everything: bool,
) -> None:
    """Remove shares of each layer, and tell the attention how many heads it has."""
    import torch_pruning as tp

    parts = Decoder.of(model)
    width = model.config.num_attention_heads
    counts = (width, *2 * (getattr(model.config, "num_key_value_heads", width),))
    writers = [half.writer for half in parts.halves]
    frozen = [*writers, *parts.embeddings, parts.head]
    pruner = tp.pruner.BasePruner(
        model,
        {"input_ids": case.batches[0]["input_ids"][:1, :16]},
        importance=importance,
        global_pruning=False,
        pruning_ratio=neurons,
        head_pruning_ratio=heads,
        num_heads={
            m: n for half in parts.halves[::2] for m, n in zip(half.readers, counts, strict=True)
        },
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[parts.head] if everything else frozen,
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    for half in parts.halves[::2]:
        attention = half.block.self_attn
        query, key = (getattr(attention, f"{name}_proj").out_features for name in "qk")
        attention.num_heads = query // attention.head_dim
        attention.embed_dim = query
        attention.num_key_value_groups = query // key
