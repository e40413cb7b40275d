"""The public names, each with the module from which it is imported on first use."""

from .checkpoint.directory import SavedCheckpoint as SavedCheckpoint, save as save
from .checkpoint.reading import load as load
from .export.gguf import export_gguf as export_gguf
from .export.traced import export_onnx as export_onnx
from .export.traced import export_pt2 as export_pt2
from .export.open_program import Exported as Exported
from .base.errors import OsscarError as OsscarError
from .data.loaders import load_batches as load_batches
from .data.images import ImageSet as ImageSet, load_images as load_images
from .data.preprocessing import Preprocessing as Preprocessing
from .data.samples import SampleList as SampleList, TensorSet as TensorSet
from .data.loaders import load_tensors as load_tensors
from .data.text import (
    CalibrationSet as CalibrationSet,
    TextSet as TextSet,
    load_calibration as load_calibration,
    load_text as load_text,
)
from .evaluation.evaluate import (
    Comparison as Comparison,
    Evaluation as Evaluation,
    compare as compare,
    evaluate as evaluate,
)
from .evaluation.quality import SampleQuality as SampleQuality, TextQuality as TextQuality
from .models.load import load_model as load_model
from .models.loaded import LoadedModel as LoadedModel
from .run.prune import prune as prune
from .recovery.recover import Recovery as Recovery, recover as recover
from .recovery.request import RecoveryRequest as RecoveryRequest
from .request import PruningRequest as PruningRequest
from .walk.layer_report import LayerReport as LayerReport
from .run.sweep import SweepResult as SweepResult, sweep as sweep
from .run.result import PruningResult as PruningResult
from .allocation.task import SkippedGroup as SkippedGroup
from .routing.declared import mixture as mixture
from .shrinking.slice import adapter as adapter
from .proof.plan import PruningPlan as PruningPlan
from .proof.program import ProgramModule as ProgramModule
from .proof.plan import Certificate as Certificate
from .proof.plan import Structure as Structure
from .shrinking.shrink import Proof as Proof
from .shrinking.shrink import prove as prove
from .shrinking.shrink import shrink as shrink
from .shrinking.shrink_program import (
    ShrunkProgram as ShrunkProgram,
    shrink_program as shrink_program,
)
from .shrinking.slice import slice_units as slice_units
from .study.records import StudyDesign as StudyDesign
from .study.directory import Study as Study
from .study.records import Record as Record

__version__: str
