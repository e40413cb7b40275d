"""Tokenizers in GGUF: byte-level BPE, as far as llama.cpp splits text like the tokenizer does.

llama.cpp knows ways of splitting a text before merging by name (``tokenizer.ggml.pre``).  The name
is found here by what the tokenizer does, never guessed from that of the model.  Whatever else a
tokenizer may do is refused, unless it is known that llama.cpp does the same.
"""

from __future__ import annotations

import json
import unicodedata
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
    known = tokenizer.get_vocab()
    most = max(known.values(), default=size)
    why = _why_not(content)
    if most >= size:
        why = f"has ids up to {most}, and the model {size} embeddings: copy the original there"
    if why is not None:
        raise ModelError(
            f"llama.cpp does not read text as the tokenizer in {directory}, which {why}"
        )
    steps = tuple(_steps(content["pre_tokenizer"]))
    named = {of: token for token, of in known.items()}
    types = dict.fromkeys(named, _NORMAL)
    for token in content["added_tokens"]:
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    keys, ids = library.Keys.Tokenizer, special.special_token_ids
    added = {name: special.add_special_token.get(name, False) for name in ("bos", "eos")}
    _check_ends(tokenizer, [ids.get("bos")] * added["bos"], [ids.get("eos")] * added["eos"])
    return {
        keys.MODEL: "gpt2",
        keys.PRE: _WAYS[steps],
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


def _why_not(content: dict[str, Any]) -> str | None:
    """Say what about a tokenizer llama.cpp does in another way; None if nothing."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE" or not model["merges"]:
        return f"is {model['type']}, where GGUF takes byte-level BPE with merges alone"
    for key, known in _MODEL.items():
        if model[key] not in known:
            return f"has {key} = {model[key]!r:.60}"
    if normalizer is not None and normalizer["type"] != "NFC":  # which llama.cpp leaves to us
        return f"normalizes text ({normalizer['type']})"
    steps = tuple(_steps(content["pre_tokenizer"]))
    name = _WAYS.get(steps)
    if name is None or bool(model["ignore_merges"]) != (name == "llama-bpe"):
        return f"splits text in a way without a name there: {', '.join(map(repr, steps)) or 'none'}"
    for token in content["added_tokens"]:
        marks = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        text = token["content"]
        if token["normalized"] and unicodedata.normalize("NFC", text) != text:
            marks = ["normalized"]
        if marks:
            return f"finds the added token {text!r:.60} not only as it is written ({marks[0]})"
    return None


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
