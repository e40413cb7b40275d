"""One-shot structured pruning of neural networks by combinatorial optimization.

>>> import osscar
>>> loaded = osscar.load_model("demo")
>>> calibration = osscar.load_calibration(None, loaded.tokenizer, samples=4, seqlen=64)
>>> result = osscar.prune(loaded.model, calibration, heads="3/4", neurons="1/2")
>>> result.parameters_after < result.parameters_before
True

Names are imported on first use, so that ``import osscar`` alone costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osscar.adapters import adapter, prepare
    from osscar.calibration import CalibrationSet, load_calibration, text_windows
    from osscar.checkpoint import SavedCheckpoint, load, save
    from osscar.errors import OsscarError
    from osscar.evaluation import Comparison, Evaluation, compare, evaluate
    from osscar.image_evaluation import compare_images, evaluate_images
    from osscar.images import ImageSet, load_images
    from osscar.models import LoadedModel, load_model
    from osscar.pipeline import LayerReport, PruningResult, prune
    from osscar.plan import PruningPlan
    from osscar.rows import Row
    from osscar.shrinking import Proof, shrink_proved
    from osscar.slicing import shrink
    from osscar.study import Study
    from osscar.study_design import StudyDesign
    from osscar.vision import VisionModel, load_vision_model

__version__ = "0.1.0"

__all__ = [
    "CalibrationSet",
    "Comparison",
    "Evaluation",
    "ImageSet",
    "LayerReport",
    "LoadedModel",
    "OsscarError",
    "Proof",
    "PruningPlan",
    "PruningResult",
    "Row",
    "SavedCheckpoint",
    "Study",
    "StudyDesign",
    "VisionModel",
    "adapter",
    "compare",
    "compare_images",
    "evaluate",
    "evaluate_images",
    "load",
    "load_calibration",
    "load_images",
    "load_model",
    "load_vision_model",
    "prepare",
    "prune",
    "save",
    "shrink",
    "shrink_proved",
    "text_windows",
]

_HOMES = {
    "CalibrationSet": "calibration",
    "Comparison": "evaluation",
    "Evaluation": "evaluation",
    "ImageSet": "images",
    "LayerReport": "pipeline",
    "LoadedModel": "models",
    "OsscarError": "errors",
    "Proof": "shrinking",
    "PruningPlan": "plan",
    "PruningResult": "pipeline",
    "Row": "rows",
    "SavedCheckpoint": "checkpoint",
    "Study": "study",
    "StudyDesign": "study_design",
    "VisionModel": "vision",
    "adapter": "adapters",
    "compare": "evaluation",
    "compare_images": "image_evaluation",
    "evaluate": "evaluation",
    "evaluate_images": "image_evaluation",
    "load": "checkpoint",
    "load_calibration": "calibration",
    "load_images": "images",
    "load_model": "models",
    "load_vision_model": "vision",
    "prepare": "adapters",
    "prune": "pipeline",
    "save": "checkpoint",
    "shrink": "slicing",
    "shrink_proved": "shrinking",
    "text_windows": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'osscar' has no attribute {name!r}")
    return getattr(import_module(f"osscar.{_HOMES[name]}"), name)
