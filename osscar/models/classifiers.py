"""Image classifiers of transformers: of a directory, or of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.checkpoint import directory as checkpoint
from osscar.data.preprocessing import Transform
from osscar.models.loaded import LoadedModel
from osscar.models.names import hub_is_reachable
from osscar.models.preprocessing import of_directory, recorded_example
from osscar.proof.lineage import lineage_of, stored_dtype

_PROCESSOR_FILE = "preprocessor_config.json"


def load_classifier(name: str) -> LoadedModel:
    """Load an image classifier of transformers with its image processor.

    It has the number format that is stored.
    """
    path = Path(name).expanduser()
    local = path.is_dir()
    if local:
        model: Any = checkpoint.load(path)
        processor = _processor(name, True) if (path / _PROCESSOR_FILE).is_file() else None
    else:
        offline = not hub_is_reachable()
        model, processor = _of_hub(name, offline), _processor(name, offline)
    lineage = lineage_of(model)
    transform = None if processor is None else _transform(processor)
    names = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    numbered = any(name == f"LABEL_{i}" for i, name in enumerate(names))
    return LoadedModel(
        model=model,
        source=f"directory {path}" if local else f"Hugging Face {name}",
        path=path if local else None,
        stored_dtype=stored_dtype(model),
        example=recorded_example(path, lineage.inputs) if local else None,
        preprocessing=of_directory(path, lineage, transform) if local else transform,
        processor=processor,
        classes=lineage.classes or (() if numbered else tuple(names)),
    )


def _of_hub(name: str, offline: bool) -> Any:
    options: dict[str, Any] = {"local_files_only": offline, "trust_remote_code": False}
    try:
        # Without its config the model would be asked for in vain for half a minute.
        config = transformers.AutoConfig.from_pretrained(name, **options)
        model, loading = transformers.AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a config whose numbers make no sense raises whatever it meets
        let_shortage_pass(error)
        raise ModelError(
            f"cannot load Hugging Face {name} as an image classifier: {first_line(error):.500}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers fills these with random numbers, and warns
        raise ModelError(
            f"Hugging Face {name} lacks {len(missing)} of the model's weights, such as "
            f"{missing[0]!r}; give a checkpoint of a classifier"
        )
    return model.eval()


def _processor(name: str, offline: bool) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            name, local_files_only=offline, trust_remote_code=False
        )
    except Exception as error:  # of a file that is damaged, whatever it meets
        let_shortage_pass(error)
        raise ModelError(
            f"the image processor of {name} ({_PROCESSOR_FILE}) cannot be read: "
            f"{first_line(error):.500}; get the checkpoint anew"
        ) from error


def _transform(processor: Any) -> Transform:
    def processed(image: Any) -> Tensor:
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    steps = " ".join(processor.to_json_string().split())
    return Transform(processed, type(processor).__name__, f"{steps:.500}")
