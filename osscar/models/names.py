"""What a model's name stands for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from osscar.base.errors import CheckpointError, ModelError
from osscar.checkpoint.manifest import read_manifest
from osscar.models.wheels import PACKAGED_MODELS

PREFIX = "torchvision:"

DEMO = "demo"

REGISTERED = (DEMO, *PACKAGED_MODELS)
"""Names that stand for what comes with OSSCAR, whatever directories there are."""


class ModelKind(Enum):
    """What a name stands for; the value says it in words.

    `LANGUAGE` is whatever is left: the names of language models, their directories, ids of a hub,
    and names that stand for nothing, which `osscar.load_model` refuses.
    """

    TORCHVISION = "a model of torchvision"
    CODE = "code of your own"
    TORCHVISION_DIRECTORY = "a directory with a pruned model of torchvision"
    CODE_DIRECTORY = "a directory with a pruned model of your own code"
    PROGRAM_DIRECTORY = "a directory with the exported program of a model of transformers"
    LANGUAGE = "a language model"

    @property
    def takes_weights(self) -> bool:
        """Whether a file of weights can fill it; all others bring their own."""
        return self in (ModelKind.TORCHVISION, ModelKind.CODE)


def kind_of(name: str | Path) -> ModelKind:
    """Tell what a name stands for; nothing is imported, fetched or built.

    What exists as a file or directory is no code.

    Examples
    --------
    >>> kind_of("torchvision:resnet18"), kind_of("net.py:build").takes_weights
    (<ModelKind.TORCHVISION: 'a model of torchvision'>, True)
    """
    text = str(name)
    if not text or text in REGISTERED:
        return ModelKind.LANGUAGE
    if text.startswith(PREFIX):
        return ModelKind.TORCHVISION
    place, colon, function = text.rpartition(":")
    try:
        path = Path(text).expanduser()
        if colon and place and function.isidentifier() and not path.exists():
            return ModelKind.CODE
        manifest = read_manifest(path)
    except (OSError, RuntimeError, ValueError, CheckpointError):
        return ModelKind.LANGUAGE  # whoever opens it will say what is wrong
    if manifest is None or manifest.stock:
        return ModelKind.LANGUAGE
    origin = manifest.lineage.origin
    if origin is None:
        return ModelKind.CODE_DIRECTORY
    if origin.library == "transformers" and any(p.traced for p in manifest.lineage.plans):
        return ModelKind.PROGRAM_DIRECTORY
    if origin.library == "torchvision":
        return ModelKind.TORCHVISION_DIRECTORY
    return ModelKind.LANGUAGE


def check_no_program(name: str | Path) -> None:
    """Refuse a directory with a program of transformers, as a ModelError."""
    kind = kind_of(name)
    if kind is ModelKind.PROGRAM_DIRECTORY:
        raise ModelError(
            f"{str(name)!r} is {kind.value}: it has no code that could generate, "
            "and no modules that could be refitted, so that no command scores or prunes it; "
            "osscar.load runs it in Python, `osscar export --format pt2` hands it on, and "
            "`osscar prune --form eager` makes a model of the same family instead"
        )
