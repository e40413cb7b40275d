"""Detectors that people bring: what leaves of them, and that the rest trains and is exported.

    python -m benchmarks.detectors [NAME ...]

Models of ultralytics are built from their yaml, DETR and RT-DETR from small configs of theirs, all
with random weights and with batch-norm statistics of noise; nothing is downloaded.  So the table
says what follows, trains and exports, and nothing of accuracy.  ``at least`` is the share of the
operations that stays with one unit of each group, for images of this size; in brackets where the
residual channels of convolutions are down to one, too.  ``ONNX`` is the largest
difference between what ONNX Runtime and the pruned model put out, relative to each output's
largest entry.  Ends with a Markdown table.

Takes minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import osscar
from benchmarks.coverage.case import alive
from osscar.allocation.costs import Cost, count
from osscar.allocation.widths import asked_groups
from osscar.request import PruningRequest
from osscar.run.chain import prepare_for
from osscar.run.feasibility import feasible_groups

SIDE, SAMPLES = 64, 8
_PASSES, _MOMENTUM = 8, 0.3
_NEARLY_ZERO = 1e-6
"""What an output is larger than, if its difference counts relative to it."""


def yolo(name: str) -> nn.Module:
    """Return a model of ultralytics, of its yaml, whose anchors follow inputs of any shape."""
    from ultralytics.nn.tasks import DetectionModel, SegmentationModel

    kind = SegmentationModel if name.endswith("-seg") else DetectionModel
    model = kind(f"{name}.yaml", verbose=False)
    model.model[-1].dynamic = True
    return model


def detr(stem: int) -> nn.Module:
    """Return a DETR of small widths, whose first convolution has so many channels.

    Where these are as many as the 32 of the first stage, shortcuts add them up.
    """
    backbone = hf.ResNetConfig(
        embedding_size=stem, hidden_sizes=[32, 64, 128, 256], out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_ffn_dim=512, decoder_ffn_dim=512, encoder_layers=2, decoder_layers=2,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    """Return an RT-DETR of small widths."""
    widths = [32, 48, 64]
    backbone = hf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, *widths], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=widths, encoder_hidden_dim=32, d_model=32,
        encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_layers=2, num_queries=10,
        decoder_in_channels=[32, 32, 32], encoder_attention_heads=4, decoder_attention_heads=4,
        num_denoising=0,
    )  # fmt: skip
    model = hf.RTDetrForObjectDetection(config)
    alive(model)  # else all places score alike, and rounding chooses among them
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: partial(yolo, name)
        for name in ("yolov5n", "yolov8n", "yolo11n", "yolo26n", "yolov8n-seg")
    },
    "RT-DETR": rt_detr,
    "DETR": lambda: detr(16),
    "DETR, wide stem": lambda: detr(32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS), metavar="NAME")
    rows = []
    for name in parser.parse_args().names:
        rows.append(row(name))
        print(rows[-1], flush=True)
    heads = list(rows[0])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *(line.values() for line in rows)]
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


def images(count: int, seed: int) -> Tensor:
    """Return noise, (count, 3, SIDE, SIDE), between 0 and 1."""
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def built(name: str) -> nn.Module:
    """Return a model in evaluation mode, its batch norms with the statistics of some passes."""
    torch.manual_seed(0)
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = _MOMENTUM
    with torch.no_grad():
        for seed in range(_PASSES):
            model(images(SAMPLES, 1 + seed))
    return model.eval()


def row(name: str) -> dict[str, str]:
    """Prune a model to 0.6 of its operations, train a step, export, and return a row."""
    model = built(name)
    asked = PruningRequest(flops=0.6, form="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(rank-deficient|cannot follow)")
        least, with_residual = floors(model, asked)
        result = osscar.prune(model, images(SAMPLES, 0), flops=0.6, form="eager")
    return {
        "model": f"`{name}`",
        "parameters": f"{result.parameters_before:,}",
        "pruned": f"{result.parameters_after:,}",
        "share": f"{result.parameters_after / result.parameters_before:.2f}x",
        "operations, at least": f"{least:.2f}x ({with_residual:.2f}x)",
        "skipped": str(len(result.skipped)),
        "program": "proved" if result.certificate.structure else result.certificate.unproved,
        "proof": f"{result.certificate.error:.0e}",
        "gradients": trained(result.model),
        "ONNX": f"{exported(result.model):.0e}",
    }


def floors(model: nn.Module, asked: PruningRequest) -> tuple[float, float]:
    """Return the share of the operations that stays at least, and that with residual channels."""
    with prepare_for(model, images(SAMPLES, 0), asked) as prepared:
        _, skipped = feasible_groups(prepared, asked)
        left = {group.name for group in skipped}
        _, keep, shared = asked_groups(prepared, asked, left)
        cost = count(Cost.FLOPS, prepared.model, prepared.groups, prepared.sample)
        fewest = {**keep, **{group.name: group.step for group in shared}}
        every = {g.name: g.step for g in prepared.groups if g.prunable and g.name not in left}
        return cost.of(fewest) / cost.dense, cost.of({**every, **fewest}) / cost.dense


def trained(model: nn.Module) -> str:
    """Take a step in training mode, and return how many parameters had a gradient, of all."""
    found = pytree.tree_leaves(model.train()(images(4, 20)))
    loss = sum(one.square().mean() for one in found if one.requires_grad)
    loss.backward()
    parameters = [one for one in model.parameters() if one.requires_grad]
    reached = sum(one.grad is not None and bool(one.grad.isfinite().all()) for one in parameters)
    model.zero_grad(set_to_none=True)
    model.eval()
    return f"{reached} of {len(parameters)}"


def exported(model: nn.Module) -> float:
    """Write a model as ONNX, and return how far ONNX Runtime is from it on fresh images."""
    import onnxruntime

    x = images(3, 30)
    with tempfile.TemporaryDirectory() as place:
        written = osscar.export_onnx(model, Path(place) / "it.onnx", example_inputs=images(2, 0))
        session = onnxruntime.InferenceSession(written.path)
        (name,) = written.inputs
        found = session.run(None, {name: x.numpy()})
    with torch.no_grad():
        expected = [one for one in pytree.tree_leaves(model(x)) if isinstance(one, Tensor)]
    pairs = zip(found, expected, strict=True)
    return max(
        float((torch.from_numpy(a) - b).abs().max() / b.abs().max().clamp(min=_NEARLY_ZERO))
        for a, b in pairs
    )


if __name__ == "__main__":
    main()
