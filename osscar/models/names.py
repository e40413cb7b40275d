"""What a model's name stands for."""

from __future__ import annotations

import functools
import os
import re
import socket
import urllib.request
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from osscar.base.errors import CheckpointError, FileError, ModelError
from osscar.base.json_files import read_object
from osscar.checkpoint.manifest import CONFIG_FILE, read_manifest
from osscar.models.packaged import PACKAGED_MODELS

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""What ids of the hub look like; only old ones have no owner in front."""

_IMAGE_CLASSIFIER = "ForImageClassification"
"""How transformers ends the names of such classes."""

DEMO = "demo"
DEMO_SOURCE = "embedded demo model (OPT)"
DEMO_DIRECTORY = Path(__file__).parents[1] / "data" / "demo"
DEMO_CALIBRATION, DEMO_HELD_OUT = (
    DEMO_DIRECTORY / name for name in ("calibration.txt", "held_out.txt")
)
DEMO_COMMAND = "osscar demo"
"""Stands as source in a directory that the command wrote, and may replace."""

REGISTERED = (DEMO, *PACKAGED_MODELS)
"""Names that stand for what comes with OSSCAR."""


class ModelKind(Enum):
    """What a name stands for; the value says it in words.

    `LANGUAGE` is whatever is left: the names of language models, their directories, ids of a hub,
    and names that stand for nothing, which `osscar.load_model` refuses.
    """

    TORCHVISION = "a model of torchvision"
    TIMM = "a model of timm"
    CLASSIFIER = "an image classifier of transformers"
    CODE = "code of your own"
    LIBRARY_DIRECTORY = "a directory with a pruned model of torchvision or timm"
    CODE_DIRECTORY = "a directory with a pruned model of your own code"
    PROGRAM_DIRECTORY = "a directory with the exported program of a model of transformers"
    LANGUAGE = "a language model"

    @property
    def takes_weights(self) -> bool:
        """Whether a file of weights can fill it; all others bring their own."""
        return self in (*LIBRARIES.values(), ModelKind.CODE)


LIBRARIES = {"torchvision:": ModelKind.TORCHVISION, "timm:": ModelKind.TIMM}
"""By how the names of their models begin."""


def kind_of(name: str | Path) -> ModelKind:
    """Tell what a name stands for; nothing is imported or built.

    Names of models that come with OSSCAR or a library come before directories, which are meant by
    ``./demo``.  Of an id of the hub the config is fetched, which tells what the model reads.

    Examples
    --------
    >>> kind_of("torchvision:resnet18"), kind_of("net.py:build").takes_weights
    (<ModelKind.TORCHVISION: 'a model of torchvision'>, True)
    """
    text = str(name)
    if not text or text in REGISTERED:
        return ModelKind.LANGUAGE
    for prefix, kind in LIBRARIES.items():
        if text.startswith(prefix):
            return kind
    place, colon, function = text.rpartition(":")
    try:
        path = Path(text).expanduser()
        if colon and place and function.isidentifier() and not path.exists():
            return ModelKind.CODE
        manifest = read_manifest(path)
    except (OSError, RuntimeError, ValueError, CheckpointError):
        return ModelKind.LANGUAGE  # whoever opens it will say what is wrong
    if manifest is None or manifest.stock:
        return _of_transformers(path)
    origin = manifest.lineage.origin
    if origin is None:
        return ModelKind.CODE_DIRECTORY
    if origin.library == "transformers" and any(p.traced for p in manifest.lineage.plans):
        return ModelKind.PROGRAM_DIRECTORY
    if f"{origin.library}:" in LIBRARIES:
        return ModelKind.LIBRARY_DIRECTORY
    return _of_transformers(path)


def _of_transformers(path: Path) -> ModelKind:
    """Tell what a directory or an id of the hub holds by the class that its config names."""
    try:
        if path.is_dir():
            config = read_object(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
            classes = config.get("architectures")
        else:
            owned = "/" in str(path) and HUB_ID.fullmatch(str(path))
            classes = _on_hub(str(path)) if owned else None
    except (OSError, FileError):
        return ModelKind.LANGUAGE  # whoever opens it will say what is wrong
    named = classes[0] if isinstance(classes, list) and classes else ""
    found = str(named).endswith(_IMAGE_CLASSIFIER)
    return ModelKind.CLASSIFIER if found else ModelKind.LANGUAGE


@functools.cache
def _on_hub(name: str) -> object:
    """Return the classes that the config of an id of the hub names; None if there is none."""
    try:
        config = hf_hub_download(name, CONFIG_FILE, local_files_only=not hub_is_reachable())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        return None
    return read_object(Path(config)).get("architectures")


def hub_is_reachable() -> bool:
    """Look the hub's host up, as asking it in vain takes half a minute of retries.

    Behind a proxy the name need not resolve here, so the proxy is given its chance.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no"):
        return False
    if urllib.request.getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def check_no_program(name: str | Path) -> None:
    """Refuse a directory with a program of transformers, as a ModelError."""
    kind = kind_of(name)
    if kind is ModelKind.PROGRAM_DIRECTORY:
        raise ModelError(
            f"{str(name)!r} is {kind.value}: it has no code that could generate, "
            "and no modules that could be refitted, so that no command scores or prunes it; "
            "osscar.load runs it in Python, `osscar export --format onnx` (or pt2) hands it on, "
            "and `osscar prune --form eager` makes a model of the same family instead"
        )
