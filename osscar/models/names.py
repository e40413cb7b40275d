"""What a model's name stands for, told in one place for all who open, build or refuse it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from osscar.checkpoint.directory import read_plan_file
from osscar.core.errors import CheckpointError
from osscar.shrinking.plan import PLAN_FILE

PREFIX = "torchvision:"


class Sort(Enum):
    """What a name stands for; the value says it in words.

    `LANGUAGE` is whatever is left: the names of language models, their directories, ids of a hub,
    and names that stand for nothing, which `osscar.load_model` refuses.
    """

    TORCHVISION = "a model of torchvision"
    CODE = "code of your own"
    TORCHVISION_DIRECTORY = "a directory with a pruned model of torchvision"
    CODE_DIRECTORY = "a directory with a pruned model of your own code"
    LANGUAGE = "a language model"

    @property
    def takes_weights(self) -> bool:
        """Whether a file of weights can fill it; all others bring their own."""
        return self in (Sort.TORCHVISION, Sort.CODE)


_DIRECTORIES = {"torchvision": Sort.TORCHVISION_DIRECTORY}
"""By the library that a plan names."""


def sort_of(name: str | Path) -> Sort:
    """Tell what a name stands for; nothing is imported, fetched or built.

    Parameters
    ----------
    name
        ``torchvision:NAME``, ``module:function``, ``file.py:function``, a directory, or the name of
        a language model. What exists as a file or directory is no code.

    Examples
    --------
    >>> sort_of("torchvision:resnet18"), sort_of("net.py:build").takes_weights
    (<Sort.TORCHVISION: 'a model of torchvision'>, True)
    """
    text = str(name)
    if text.startswith(PREFIX):
        return Sort.TORCHVISION
    place, colon, function = text.rpartition(":")
    try:
        path = Path(text).expanduser()
        if colon and place and function.isidentifier() and not path.exists():
            return Sort.CODE
        if not (path / PLAN_FILE).is_file():
            return Sort.LANGUAGE
        origin, _ = read_plan_file(path / PLAN_FILE)
    except (OSError, RuntimeError, ValueError, CheckpointError):
        return Sort.LANGUAGE  # whoever opens it will say what is wrong
    if origin is None:
        return Sort.CODE_DIRECTORY
    library = origin.get("library") if isinstance(origin, Mapping) else None
    return _DIRECTORIES.get(str(library), Sort.LANGUAGE)
