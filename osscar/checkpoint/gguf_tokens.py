"""Tokenizers in GGUF: byte-level BPE, as far as llama.cpp splits text like the tokenizer does.

llama.cpp knows ways of splitting a text before merging by name (``tokenizer.ggml.pre``).  The name
is found here by what the tokenizer does, never guessed from that of the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from osscar.core.errors import ModelError, first_line

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WAYS = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (_LLAMA_3, "bytes"): "llama-bpe",
    (_LLAMA_3.replace("{1,3}", ""), "bytes"): "qwen2",
}
"""What llama.cpp calls the ways to split a text: the steps of the tokenizer, in order."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
"""Types of tokens in GGUF."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, as GGUF has them.

    Parameters
    ----------
    pre
        How a text is split before merging.
    tokens, types
        By token id.
    merges
        In the order in which they are made.
    special
        Ids of special tokens, by their names in GGUF.
    begins
        Whether the tokenizer puts the token of the beginning before a text.
    template
        Of chats; empty if there is none.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: dict[str, int]
    begins: bool
    template: str = ""

    def fields(self) -> dict[str, Any]:
        """Return what the file says, by key."""
        fields: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.types),
            "tokenizer.ggml.merges": list(self.merges),
            "tokenizer.ggml.add_bos_token": self.begins,
            **{f"tokenizer.ggml.{name}_token_id": of for name, of in self.special.items()},
        }
        if self.template:
            fields["tokenizer.chat_template"] = self.template
        return fields

    def write(self, writer: Any) -> None:
        """Write it with a `gguf.GGUFWriter`."""
        for key, value in self.fields().items():
            if value != []:  # GGUF has no empty arrays
                add_value(writer, key, value)


def add_value(writer: Any, key: str, value: Any) -> None:
    """Write one value in the type that GGUF has for it."""
    names = {"str": "string", "list": "array", "int": "uint32", "float": "float32"}
    name = type(value).__name__
    getattr(writer, f"add_{names.get(name, name)}")(key, value)


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """Read the tokenizer in a directory.

    Parameters
    ----------
    directory
        Of the checkpoint.
    size
        Rows of the model's embedding; ids that no token has are filled up.

    Raises
    ------
    ModelError
        If there is none, or llama.cpp does not split text as it does.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library of tokenizers raises plain exceptions
        raise ModelError(
            f"{directory} has no tokenizer that can be read ({first_line(error)}), which a GGUF "
            "file has to hold; copy that of the original model there"
        ) from error
    pre = _way(content)
    known = tokenizer.get_vocab()
    if not known or max(known.values()) >= size:
        raise ModelError(
            f"the tokenizer in {directory} has ids up to {max(known.values(), default=0)}, and the "
            f"model has {size} embeddings; copy the original model's tokenizer there"
        )
    named = {of: token for token, of in known.items()}
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    kinds = [
        (_CONTROL if added[of] else _USER_DEFINED) if of in added else _NORMAL for of in range(size)
    ]
    merges = (
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    )
    special = {name: getattr(tokenizer, f"{of}_token_id") for name, of in _SPECIAL.items()}
    first = tokenizer("a").input_ids[:1]
    return Vocabulary(
        pre,
        tuple(named.get(of, f"[PAD{of}]") for of in range(size)),
        tuple(kind if of in named else _UNUSED for of, kind in enumerate(kinds)),
        tuple(merges),
        {name: of for name, of in special.items() if isinstance(of, int)},
        tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id],
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "",
    )


_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""What GGUF calls special tokens, and what transformers does."""


def _way(content: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a tokenizer splits text, or refuse it."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE" or model["byte_fallback"]:
        raise ModelError(
            f"the tokenizer is {model['type']}{' with bytes' if model.get('byte_fallback') else ''}"
            ", and only byte-level BPE is written as GGUF"
        )
    if normalizer is not None and normalizer["type"] != "NFC":  # which llama.cpp leaves to us
        raise ModelError(
            f"the tokenizer normalizes text ({normalizer['type']}); llama.cpp does not"
        )
    steps = tuple(_steps(content["pre_tokenizer"]))
    name = _WAYS.get(steps)
    if name is None or bool(model["ignore_merges"]) != (name == "llama-bpe"):
        raise ModelError(
            "llama.cpp has no name for how the tokenizer splits text: "
            f"{', '.join(map(repr, steps)) or 'not at all'}"
        )
    return name


def _steps(pre: Any) -> list[str]:
    """Return in what steps a text is split, in the words of `_WAYS`."""
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for one in pre["pretokenizers"] for step in _steps(one)]
    if pre["type"] == "ByteLevel" and not pre["add_prefix_space"]:
        return ["gpt2" if pre["use_regex"] else "bytes"]
    if pre["type"] == "Digits" and pre["individual_digits"]:
        return ["digits"]
    if pre["type"] == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        return [str(next(iter(pre["pattern"].values())))]
    return [json.dumps(pre)]
