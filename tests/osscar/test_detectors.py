"""Detectors of transformers and ultralytics lose operations, and the rest trains and is exported.

All have random weights, and batch-norm statistics of noise; nothing is downloaded.
"""

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils import _pytree as pytree

import osscar
from benchmarks.coverage.case import alive


def images(count, seed):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def yolo():
    """A model of ultralytics, of its yaml, whose anchors follow inputs of any shape."""
    from ultralytics.nn.tasks import SegmentationModel

    model = SegmentationModel("yolov8n-seg.yaml", verbose=False)
    model.model[-1].dynamic = True
    return model


def detr():
    """A DETR whose stem has as many channels as its first stage, so that shortcuts add them up."""
    backbone = hf.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], out_features=["stage4"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_ffn_dim=512, decoder_ffn_dim=512, encoder_layers=2, decoder_layers=2,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def rt_detr():
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


def built(make):
    """A model in evaluation mode, its batch norms with the statistics of some passes."""
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3
    with torch.no_grad():
        for seed in range(8):
            model(images(8, 1 + seed))
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [yolo, rt_detr, detr])
def test_a_detector_is_pruned_trained_and_exported(make, monkeypatch, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    if make is yolo:
        monkeypatch.setenv("YOLO_OFFLINE", "true")  # before the import, which looks for both
        monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
        pytest.importorskip("ultralytics")
    result = osscar.prune(built(make), images(8, 0), flops=0.6, form="eager")
    assert result.parameters_after < 0.8 * result.parameters_before
    assert result.certificate.structure, result.certificate.unproved
    assert result.certificate.error < 1e-9
    check_exported(result.model, tmp_path)
    found = pytree.tree_leaves(result.model.train()(images(4, 20)))
    sum(one.square().mean() for one in found if one.requires_grad).backward()
    parameters = [one for one in result.model.parameters() if one.requires_grad]
    reached = sum(one.grad is not None and bool(one.grad.isfinite().all()) for one in parameters)
    assert reached > 0.8 * len(parameters)


def check_exported(model, place):
    """ONNX Runtime returns the same on fresh images."""
    import onnxruntime

    written = osscar.export_onnx(model, place / "it.onnx", example_inputs=images(2, 0))
    session = onnxruntime.InferenceSession(written.path)
    (name,) = written.inputs
    found = session.run(None, {name: images(3, 30).numpy()})
    with torch.no_grad():
        outputs = pytree.tree_leaves(model(images(3, 30)))
    outputs = [one for one in outputs if isinstance(one, torch.Tensor)]
    for a, b in zip(map(torch.from_numpy, found), outputs, strict=True):
        assert float((a - b).abs().max()) < 1e-3 * float(b.abs().max().clamp(min=1e-6))
