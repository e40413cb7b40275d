"""Tokenizers in GGUF: byte-level BPE, as far as llama.cpp splits text like the tokenizer does.

llama.cpp knows ways of splitting a text before merging by name (``tokenizer.ggml.pre``).  The name
is found here by what the tokenizer does, never guessed from that of the model.  Whatever else a
tokenizer may do is refused, unless it is known that llama.cpp does the same.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from osscar.base.errors import ModelError, first_line
from osscar.base.memory import attempt

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


def add_value(writer: Any, key: str, value: Any) -> None:
    """Write one value in the type that GGUF has for it."""
    names = {"str": "string", "list": "array", "int": "uint32", "float": "float32"}
    name = type(value).__name__
    getattr(writer, f"add_{names.get(name, name)}")(key, value)


def vocabulary_fields(directory: Path, size: int, library: Any) -> dict[str, Any]:
    """Return what a GGUF file says of a directory's tokenizer, with ids up to `size`, by key."""
    with attempt() as tried:  # the library of tokenizers raises plain exceptions
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        special = library.SpecialVocab(
            directory, load_merges=True, special_token_types=("bos", "eos", "unk", "pad")
        )
        template = special.chat_template
        if not isinstance(template, str | None):
            template = next((t["template"] for t in template if t["name"] == "default"), None)
        (template or "").encode()
    if tried.failed:
        raise ModelError(
            f"{directory} has no tokenizer that can be read ({first_line(tried.error)}), which a "
            "GGUF file has to hold; copy that of the original model there"
        ) from tried.error
    pre = _pre_tokenizer(content)
    _check_added(content["added_tokens"])
    known = tokenizer.get_vocab()
    if not known or max(known.values()) >= size:
        raise ModelError(
            f"the tokenizer in {directory} has ids up to {max(known.values(), default=0)}, and the "
            f"model has {size} embeddings; copy the original model's tokenizer there"
        )
    named = {of: token for token, of in known.items()}
    types = dict.fromkeys(named, _NORMAL)
    for token in content["added_tokens"]:
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    keys, ids = library.Keys.Tokenizer, special.special_token_ids
    added = {name: special.add_special_token.get(name, False) for name in ("bos", "eos")}
    _check_ends(tokenizer, [ids.get("bos")] * added["bos"], [ids.get("eos")] * added["eos"])
    return {
        keys.MODEL: "gpt2",
        keys.PRE: pre,
        keys.LIST: [named.get(of, f"[PAD{of}]") for of in range(size)],
        keys.TOKEN_TYPE: [types.get(of, _UNUSED) for of in range(size)],
        keys.MERGES: special.merges,
        **{getattr(keys, f"ADD_{name.upper()}"): put for name, put in added.items()},
        **{getattr(keys, f"{name.upper()}_ID"): of for name, of in ids.items()},
        **({keys.CHAT_TEMPLATE: template} if template else {}),
    }


def _check_ends(tokenizer: Any, first: list[Any], last: list[Any]) -> None:
    """Refuse a tokenizer that puts other tokens around a text than llama.cpp is told to."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = tokenizer("a")["input_ids"]
    if found != [*first, *plain, *last]:
        raise ModelError(
            f"the tokenizer makes {found} of 'a', which is {plain} without special tokens; "
            "llama.cpp puts at most one token of the beginning before it and one of the end after"
        )


_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
}
"""What llama.cpp takes for granted about how pieces are merged."""


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a tokenizer splits text, or refuse it."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE":
        raise ModelError(
            f"the tokenizer is {model['type']}, and only byte-level BPE is written as GGUF"
        )
    for key, known in _MODEL.items():
        if model[key] not in known:
            raise ModelError(
                f"the tokenizer has {key} = {model[key]!r:.60}, which llama.cpp does not support"
            )
    if not model["merges"]:
        raise ModelError("the tokenizer has no merges, and GGUF needs at least one")
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
        return [str(pre["pattern"].get("Regex", pre["pattern"]))]
    return [json.dumps(pre)]


def _check_added(added: Sequence[dict[str, Any]]) -> None:
    """Refuse added tokens that llama.cpp would find elsewhere in a text, by name."""
    for token in added:
        marks = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        content = token["content"]
        if token["normalized"] and unicodedata.normalize("NFC", content) != content:
            marks = ["normalized"]
        if marks:
            raise ModelError(
                f"the added token {content!r:.60} is {', '.join(marks)}, and llama.cpp finds "
                "tokens only as they are written"
            )
