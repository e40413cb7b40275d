"""Detectors of transformers and ultralytics, pruned as `benchmarks.detectors` does."""

import pytest

from benchmarks.detectors import row


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["yolov8n-seg", "RT-DETR", "DETR, wide stem"])
def test_a_detector_is_pruned_trained_and_exported(name, monkeypatch, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    if name.startswith("yolo"):
        monkeypatch.setenv("YOLO_OFFLINE", "true")  # before the import, which looks for both
        monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
        pytest.importorskip("ultralytics")
    found = row(name)
    assert float(found["share"].rstrip("x")) < 0.8
    assert found["program"] == "proved"
    assert float(found["proof"]) < 1e-9
    assert float(found["ONNX"]) < 1e-3
    reached, count = map(int, found["gradients"].split(" of "))
    assert reached > 0.8 * count
