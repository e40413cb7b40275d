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

from osscar.core.version import VERSION

if TYPE_CHECKING:
    from osscar.checkpoint.directory import SavedCheckpoint, load, save
    from osscar.core.errors import OsscarError
    from osscar.data.images import ImageSet, load_images
    from osscar.data.tokens import CalibrationSet, load_calibration, text_windows
    from osscar.evaluation.images import compare_images, evaluate_images
    from osscar.evaluation.language import Comparison, Evaluation, compare, evaluate
    from osscar.models.language import LoadedModel, load_model
    from osscar.models.vision import VisionModel, load_vision_model
    from osscar.pruning.prune import prune
    from osscar.pruning.request import PruningRequest
    from osscar.pruning.result import LayerReport, PruningResult
    from osscar.shrinking.follow import adapter, prepare
    from osscar.shrinking.plan import PruningPlan
    from osscar.shrinking.shrink import Proof, shrink_proved
    from osscar.shrinking.slice import shrink
    from osscar.study.design import StudyDesign
    from osscar.study.directory import Study
    from osscar.study.records import Record

__version__ = VERSION

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
    "PruningRequest",
    "PruningResult",
    "Record",
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
    "CalibrationSet": "data.tokens",
    "Comparison": "evaluation.language",
    "Evaluation": "evaluation.language",
    "ImageSet": "data.images",
    "LayerReport": "pruning.result",
    "LoadedModel": "models.language",
    "OsscarError": "core.errors",
    "Proof": "shrinking.shrink",
    "PruningPlan": "shrinking.plan",
    "PruningResult": "pruning.result",
    "PruningRequest": "pruning.request",
    "Record": "study.records",
    "SavedCheckpoint": "checkpoint.directory",
    "Study": "study.directory",
    "StudyDesign": "study.design",
    "VisionModel": "models.vision",
    "adapter": "shrinking.follow",
    "compare": "evaluation.language",
    "compare_images": "evaluation.images",
    "evaluate": "evaluation.language",
    "evaluate_images": "evaluation.images",
    "load": "checkpoint.directory",
    "load_calibration": "data.tokens",
    "load_images": "data.images",
    "load_model": "models.language",
    "load_vision_model": "models.vision",
    "prepare": "shrinking.follow",
    "prune": "pruning.prune",
    "save": "checkpoint.directory",
    "shrink": "shrinking.slice",
    "shrink_proved": "shrinking.shrink",
    "text_windows": "data.tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'osscar' has no attribute {name!r}")
    return getattr(import_module(f"osscar.{_HOMES[name]}"), name)
