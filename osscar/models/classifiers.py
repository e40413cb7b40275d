"""Image classifiers of transformers: of a directory, or of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import let_shortage_pass
from osscar.checkpoint import directory as checkpoint
from osscar.data.preprocessing import AnyPreprocessing, OwnTransform, Preprocessing
from osscar.models.loaded import LoadedModel
from osscar.models.names import hub_is_reachable
from osscar.models.preprocessing import of_the_run, recorded_example
from osscar.proof.lineage import lineage_of, stored_dtype

_PROCESSOR_FILE = "preprocessor_config.json"

_TOLERANCE = 0.05
"""Of normalized pixels, in the mean: resizing differs between libraries by the rounding of pixels,
and other numbers by tenths."""


def load_classifier(name: str) -> LoadedModel:
    """Load an image classifier of transformers with the preprocessing of its image processor.

    It has the number format that is stored.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        return _of_hub(name)
    model: Any = checkpoint.load(path)
    lineage = lineage_of(model)
    has_processor = (path / _PROCESSOR_FILE).is_file()
    pruned_with = recorded_example(path, lineage.inputs)
    processor = _processor(name, local=True) if has_processor else None
    brought = None if processor is None else _steps_of(processor, name)
    return LoadedModel(
        model=model,
        example=pruned_with,
        source=f"directory {path}",
        path=path,
        stored_dtype=stored_dtype(model),
        preprocessing=of_the_run(path, lineage, brought, pruned_with),
        processor=processor,
        classes=lineage.classes or _classes(model),
    )


def _of_hub(name: str) -> LoadedModel:
    local = not hub_is_reachable()
    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
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
    processor = _processor(name, local)
    return LoadedModel(
        model=model.eval(),
        source=f"Hugging Face {name}",
        path=None,
        stored_dtype=stored_dtype(model),
        preprocessing=_steps_of(processor, name),
        processor=processor,
        classes=_classes(model),
    )


def _classes(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classes, where the config has more than numbers."""
    config: Any = model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return () if any(name == f"LABEL_{i}" for i, name in enumerate(names)) else tuple(names)


def _processor(name: str, local: bool) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            name, local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # of a file that is damaged, whatever it meets
        let_shortage_pass(error)
        raise ModelError(
            f"the image processor of {name} ({_PROCESSOR_FILE}) cannot be read: "
            f"{first_line(error):.500}; get the checkpoint anew"
        ) from error


def _steps_of(processor: Any, name: str) -> AnyPreprocessing:
    """Return what an image processor does: its numbers, if they say it all, else itself."""

    def processed(image: Any) -> Tensor:
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    known = _numbers(processor)
    if known is not None and _alike(known, processed):
        return known
    steps = " ".join(processor.to_json_string().split())
    return OwnTransform(processed, f"the {type(processor).__name__} of {name}", f"{steps:.500}")


def _numbers(processor: Any) -> Preprocessing | None:
    """Read the numbers of a processor; None where they are others than `Preprocessing` has."""
    from PIL import Image

    size, crop = (_side(getattr(processor, key, None)) for key in ("size", "crop_size"))
    cropped = getattr(processor, "do_center_crop", False)
    resized = getattr(processor, "do_resize", False)
    target = crop if cropped else size
    if target is None or not (size if resized else crop):
        return None
    normalized = getattr(processor, "do_normalize", False)
    mean, std = (
        tuple(getattr(processor, key)) if normalized else (number,)
        for key, number in (("image_mean", 0.0), ("image_std", 1.0))
    )
    resample = getattr(processor, "resample", None)
    return Preprocessing(
        resize=size if resized else crop,
        crop=target,
        mean=mean,
        std=std,
        interpolation=None if resample is None else Image.Resampling(int(resample)).name.lower(),
        channels=3,
    )


def _side(size: Any) -> Any:
    """Return a size as `Preprocessing` has it: the shorter side, or height and width."""
    if size is None:
        return None
    shorter, height, width = (_entry(size, key) for key in ("shortest_edge", "height", "width"))
    return shorter or ((height, width) if height and width else None)


def _entry(size: Any, key: str) -> int | None:
    found = size.get(key) if isinstance(size, dict) else getattr(size, key, None)
    return None if found is None else int(found)


def _alike(known: Preprocessing, processed: Any) -> bool:
    """Whether numbers lead to what a processor makes of an image."""
    from PIL import Image

    drawn = torch.rand(11, 9, 3, generator=torch.Generator().manual_seed(0)) * 255
    for size in ((300, 420), (64, 48)):
        image = Image.fromarray(drawn.byte().numpy()).resize(size, Image.Resampling.BICUBIC)
        mine, theirs = known.transform()(image), processed(image)
        if mine.shape != theirs.shape or not float((mine - theirs).abs().mean()) <= _TOLERANCE:
            return False
    return True
