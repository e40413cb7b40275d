"""Tokenizers in GGUF: byte-level BPE, as far as llama.cpp splits text like the tokenizer does.

llama.cpp knows ways of splitting a text before merging by name (``tokenizer.ggml.pre``).  The name
is found here by what the tokenizer does, never guessed from that of the model.  Whatever else a
tokenizer may do is refused, unless it is known that llama.cpp does the same.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from osscar.base.errors import ModelError, first_line

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


def vocabulary_fields(directory: Path, size: int) -> dict[str, Any]:
    """Read the tokenizer in a directory, and return what a GGUF file says of it, by key.

    `size` is the rows of the model's embedding; ids that no token has are filled up.
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
    merges = content["model"]["merges"]
    special = {name: getattr(tokenizer, f"{of}_token_id") for name, of in _SPECIAL.items()}
    begins, ends = _ends(content["post_processor"], special)
    template = _template(tokenizer.chat_template)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [named.get(of, f"[PAD{of}]") for of in range(size)],
        "tokenizer.ggml.token_type": [types.get(of, _UNUSED) for of in range(size)],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": ends,
        **{
            f"tokenizer.ggml.{name}_token_id": of
            for name, of in special.items()
            if isinstance(of, int)
        },
        **({"tokenizer.chat_template": template} if template else {}),
    }


_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""What GGUF calls special tokens, and what transformers does."""


_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
}
"""What llama.cpp takes for granted about how pieces are merged."""

_COMMON = "".join(map(chr, range(0x21, 0x7F))) + "\u0120\u010a"
"""What byte-level BPE calls the bytes of ASCII, of the blank, and of the end of a line."""


def _way(content: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which a tokenizer splits text, or refuse it."""
    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE" or model["byte_fallback"]:
        raise ModelError(
            f"the tokenizer is {model['type']}{' with bytes' if model.get('byte_fallback') else ''}"
            ", and only byte-level BPE is written as GGUF"
        )
    for key in model.keys() - {"type", "vocab", "merges", "byte_fallback", "ignore_merges"}:
        if model[key] not in _MODEL.get(key, ()):
            raise ModelError(
                f"the tokenizer has {key} = {model[key]!r:.60}, and llama.cpp nothing like it"
            )
    if not model["merges"]:
        raise ModelError("the tokenizer has no merges, and GGUF no empty list of them")
    lacking = [char for char in _COMMON if char not in model["vocab"]]
    if lacking:
        raise ModelError(
            f"the tokenizer has no token {lacking[0]!r}; it merges what stands around what it "
            "leaves out, and llama.cpp does not"
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
        return [str(pre["pattern"].get("Regex", pre["pattern"]))]
    return [json.dumps(pre)]


def _ends(processor: Any, special: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether the first and the last token of a text are put there, or refuse others."""
    templates = list(_templates(processor))
    if len(templates) > 1:
        raise ModelError("the tokenizer puts tokens around a text twice; llama.cpp does so once")
    put = ["text"]
    for template in templates:
        ids = template["special_tokens"]
        put = [
            ids[piece["SpecialToken"]["id"]]["ids"] if "SpecialToken" in piece else "text"
            for piece in template["single"]
        ]
    for begins, ends in product((False, True), repeat=2):
        if put == [*[[special["bos"]]] * begins, "text", *[[special["eos"]]] * ends]:
            return begins, ends
    raise ModelError(
        f"the tokenizer puts {put} around a text; llama.cpp puts the token of the beginning "
        f"({special['bos']}) before it, that of the end ({special['eos']}) after it, and no others"
    )


def _templates(processor: Any) -> Iterator[Any]:
    """Yield what puts tokens around a text; refuse what does something else."""
    if processor is None or processor["type"] == "ByteLevel":  # which changes offsets alone
        return
    if processor["type"] == "Sequence":
        for one in processor["processors"]:
            yield from _templates(one)
    elif processor["type"] == "TemplateProcessing":
        yield processor
    else:
        raise ModelError(
            f"the tokenizer ends with {processor['type']}, and llama.cpp has nothing like it"
        )


def _template(template: Any) -> str:
    """Return the template of chats, of several that for want of a name; refuse one that is no text.

    Empty if there is none.
    """
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return ""
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"the chat template holds {template[error.start]!r}, half of a character, at "
            f"{error.start}; correct it in the directory's chat_template.jinja or "
            "tokenizer_config.json"
        ) from error
    return template


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
    for one, other in _rivals(added):
        raise ModelError(
            f"where the added tokens {one!r:.60} and {other!r:.60} overlap in a text, the "
            "tokenizer takes another of them than llama.cpp, which takes the longer one"
        )


def _rivals(added: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield two added tokens of which a tokenizer takes the one that llama.cpp does not.

    A tokenizer finds those that are not `normalized` before others; of both sorts the leftmost,
    and of these the longest.  llama.cpp finds the longest in all the text before any shorter.
    """
    late = {token["content"]: token["normalized"] for token in added}
    starting: dict[str, list[str]] = {}
    for token in late:
        for end in range(1, len(token)):
            starting.setdefault(token[:end], []).append(token)
    pairs = [  # of which the first starts before the other
        (one, other)
        for one in late
        for start in range(1, len(one))
        for other in starting.get(one[start:], ())
    ]
    early = [token for token in late if not late[token]]
    pairs += [(one, other) for other in late if late[other] for one in early if one in other]
    for pair in pairs:
        found, other = sorted(pair, key=late.__getitem__)
        if found != other and len(other.encode()) >= len(found.encode()):
            yield found, other
