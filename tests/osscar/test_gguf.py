"""GGUF files: llama.cpp computes what transformers does, and what it cannot is refused."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import osscar
import osscar.cli
from osscar.base.errors import (
    CheckpointError,
    EquivalenceError,
    MissingDependency,
    ModelError,
    OptionError,
    OutputError,
)
from osscar.checkpoint.directory import save
from osscar.export.gguf import export_gguf
from osscar.export.gguf_tokens import _LLAMA_3
from osscar.models.language import DEMO_DIRECTORY
from tests.docs.json_schema import missing, undescribed
from tests.osscar.llama_cpp import Engine

gguf = pytest.importorskip("gguf")

VOCABULARY = 400
TEXT = (
    "The cat's 12345 toys were $5.50 in 2019!\n\n  She'll say: naïve 日本語?  \t<s>OK</s> "
    "don't STOP, it's 3 o'clock"
)

SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_LLAMA_3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}


def tokenizer(
    steps: Any = SPLITS["smollm"], *, begins: bool = False, ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([TEXT * 3, "a cat and the toys she will say were 12 and 345"], trainer)
    if begins:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA_3_POSITIONS = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES),
    "multi-head": LlamaConfig(**{**_SIZES, "num_key_value_heads": 6}),
    "multi-query": LlamaConfig(**{**_SIZES, "num_key_value_heads": 1}),
    "tied, wide heads": LlamaConfig(**_SIZES, tie_word_embeddings=True, head_dim=16),
    "llama 3 positions": LlamaConfig(**_SIZES, rope_parameters=_LLAMA_3_POSITIONS),
    "linear positions": LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
    ),
    "biases": LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_SIZES, sliding_window=64),
    "qwen2": Qwen2Config(**_SIZES),
}
GROUPS = {
    "llama": {},
    "deci": {"model.layers.0.self_attn.heads": 2, "model.layers.2.mlp.neurons": 12},
}
IDS = torch.randint(2, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))


def built(config: Any, groups: dict[str, int]) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.3)
    if not groups:
        return model
    windows = torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))
    return osscar.prune(model, windows, backend="magnitude", device="cpu", groups=groups).model


def checkpoint(place: Path, model: Any, words: Any = None) -> Path:
    return save(model, place / "small", tokenizer=words or tokenizer()).path


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gguf")
    return checkpoint(place, built(CONFIGS["llama"], GROUPS["deci"]))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("architecture", GROUPS)
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(
    name: str, architecture: str, tmp_path: Path
) -> None:
    model = built(CONFIGS[name], GROUPS[architecture])
    written = export_gguf(checkpoint(tmp_path, model), dtype="f32")
    assert written.architecture == architecture
    engine = Engine(written.path)
    with torch.no_grad():
        expected = model(IDS).logits[0, -1].double().log_softmax(-1)
    found = engine.log_probabilities(IDS[0].tolist(), VOCABULARY, shown=tokenizer().encode("a")[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    tokens = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert engine.generate(IDS[0].tolist(), 12) == tokens[0, IDS.shape[1] :].tolist()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_close(dtype: str, uneven: Path, tmp_path: Path) -> None:
    written = export_gguf(uneven, tmp_path / "small.gguf", dtype=dtype)
    assert written.bytes < 0.7 * export_gguf(uneven, tmp_path / "full.gguf", dtype="f32").bytes
    with torch.no_grad():
        expected = osscar.load(uneven)(IDS).logits[0, -1].double().log_softmax(-1)
    shown = tokenizer().encode("a")[0]
    found = Engine(written.path).log_probabilities(IDS[0].tolist(), VOCABULARY, shown)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(
    name: str, begins: bool, tmp_path: Path
) -> None:
    words = tokenizer(SPLITS[name], begins=begins, ignore_merges=name == "llama-bpe")
    written = export_gguf(checkpoint(tmp_path, built(CONFIGS["llama"], {}), words), dtype="f32")
    assert field(written.path, "tokenizer.ggml.pre") == name
    assert Engine(written.path).tokenize(TEXT) == words(TEXT).input_ids


def around(*templates: str) -> Any:
    """What puts tokens around a text."""
    ids = [("<s>", 0), ("</s>", 1)]
    steps = [processors.TemplateProcessing(of, special_tokens=ids) for of in templates]
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), *steps])


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>"])
def test_llama_cpp_puts_the_same_tokens_around_a_text(template: str, tmp_path: Path) -> None:
    words = tokenizer()
    words.backend_tokenizer.post_processor = around(template)
    written = export_gguf(checkpoint(tmp_path, built(CONFIGS["llama"], {}), words), dtype="f32")
    assert words(TEXT).input_ids[-1] == 1
    assert Engine(written.path).tokenize(TEXT) == words(TEXT).input_ids


def test_llama_cpp_finds_the_same_added_tokens(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_tokens(["<toy>", "<toy> ca", "aaa", AddedToken("the", normalized=False)])
    text = "the cat <toy> cat<toy> dog aaaaa  then <toy>the"
    written = export_gguf(checkpoint(tmp_path, built(CONFIGS["llama"], {}), words), dtype="f32")
    assert Engine(written.path).tokenize(text) == words(text).input_ids


@pytest.mark.parametrize("name", ["Phi-3-mini", "phi3", "modern-bert"])
def test_the_name_of_a_directory_does_not_change_how_special_tokens_are_found(
    name: str, tmp_path: Path
) -> None:
    words, text = tokenizer(), "a</s>  b<s>  a"
    saved = save(built(CONFIGS["llama"], {}), tmp_path / name, tokenizer=words)
    assert Engine(export_gguf(saved.path).path).tokenize(text) == words(text).input_ids


def field(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).get_field(key).contents()


def test_what_the_file_says(uneven: Path, tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{{ messages[0].content }}"
    directory = checkpoint(tmp_path, osscar.load(uneven), words)
    written = export_gguf(directory)
    assert written.path == tmp_path / "small-f16.gguf"
    assert written.bytes == written.path.stat().st_size
    assert field(written.path, "general.architecture") == "deci"
    assert field(written.path, "deci.attention.head_count") == [4, 6, 6]
    assert field(written.path, "deci.attention.head_count_kv") == [2, 3, 3]
    assert field(written.path, "deci.feed_forward_length") == [40, 40, 12]
    assert field(written.path, "tokenizer.chat_template") == words.chat_template
    tokens = field(written.path, "tokenizer.ggml.tokens")
    assert len(tokens) == VOCABULARY
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    types = field(written.path, "tokenizer.ggml.token_type")
    assert (types[0], types[2], types[-1]) == (3, 1, 5)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_of_several_chat_templates_the_file_has_the_default(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    written = export_gguf(checkpoint(tmp_path, built(CONFIGS["llama"], {}), words))
    assert field(written.path, "tokenizer.chat_template") == "{{ messages }}"


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    written = export_gguf(checkpoint(tmp_path, built(CONFIGS["mistral"], {})))
    assert field(written.path, "llama.context_length") == 64


# ---- refusals ----------------------------------------------------------------------------


def refused(place: Path, error: type[Exception], match: str, **options: Any) -> None:
    """Export what lies in `place`, in vain, and find nothing written."""
    before = {path.name for path in place.iterdir()}
    with pytest.raises(error, match=match):
        export_gguf(place / "small", **options)
    assert {path.name for path in place.iterdir()} == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Qwen3Config(**_SIZES, head_dim=8), "it is a Qwen3ForCausalLM"),
        (GPT2Config(vocab_size=400, n_embd=48, n_layer=2, n_head=6), "it is a GPT2LMHeadModel"),
        (LlamaConfig(**_SIZES, hidden_act="gelu"), "activation 'gelu'"),
        (
            LlamaConfig(
                **_SIZES,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
            ),
            "type 'yarn'",
        ),
    ],
)
def test_other_graphs_are_refused_with_the_reason(config: Any, reason: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, AutoModelForCausalLM.from_config(config))
    refused(tmp_path, ModelError, reason)


def test_the_demo_is_refused() -> None:
    with pytest.raises(ModelError, match="it is a OPTForCausalLM"):
        export_gguf(DEMO_DIRECTORY, "demo.gguf")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (tokenizer([pre_tokenizers.Whitespace()]), "no name for how the tokenizer splits"),
        (tokenizer([pre_tokenizers.ByteLevel(add_prefix_space=True)]), "no name for how"),
        (tokenizer(ignore_merges=True), "no name for how"),
    ],
)
def test_tokenizers_without_a_name_are_refused(words: Any, reason: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, built(CONFIGS["llama"], {}), words)
    refused(tmp_path, ModelError, reason)


def changed(place: Path, words: Any, **changes: Any) -> None:
    """Save a model with a tokenizer whose file says something else of the merges."""
    file = checkpoint(place, built(CONFIGS["llama"], {}), words) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"].update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"end_of_word_suffix": "e"}, "end_of_word_suffix = 'e'"),
        ({"continuing_subword_prefix": "##", "merges": []}, "continuing_subword_prefix = '##'"),
        ({"dropout": 0.5}, r"dropout = 0\.5"),
        ({"unk_token": "<s>"}, "unk_token = '<s>'"),
        ({"fuse_unk": True}, "fuse_unk = True"),
        ({"merges": []}, "no merges"),
    ],
)
def test_merges_made_in_other_ways_are_refused_by_name(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    changed(tmp_path, tokenizer(), **changes)
    refused(tmp_path, ModelError, reason)


def test_a_tokenizer_that_leaves_characters_out(tmp_path: Path) -> None:
    content = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    vocabulary = {"z!" if token == "X" else token: of for token, of in content["vocab"].items()}
    merges = [pair for pair in content["merges"] if "X" not in "".join(pair)]
    changed(tmp_path, tokenizer(), vocab=vocabulary, merges=merges)
    refused(tmp_path, ModelError, "no token 'X'")


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (around("<s> <s> $A"), r"\[\[0\], \[0\], 'text'\] around"),
        (around("</s> $A"), r"\[\[1\], 'text'\] around"),
        (around("$A <s>"), r"\['text', \[0\]\] around"),
        (around("$A </s>", "$A </s>"), "twice"),
        (processors.RobertaProcessing(("</s>", 1), ("<s>", 0)), "RobertaProcessing"),
    ],
)
def test_other_tokens_around_a_text_are_refused(
    processor: Any, reason: str, tmp_path: Path
) -> None:
    words = tokenizer()
    words.backend_tokenizer.post_processor = processor
    checkpoint(tmp_path, built(CONFIGS["llama"], {}), words)
    refused(tmp_path, ModelError, reason)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([AddedToken("<m>", lstrip=True, rstrip=True)], "'<m>' is lstrip, rstrip"),
        ([AddedToken("foo", single_word=True)], "'foo' is single_word"),
        ([AddedToken("e\u0301")], "is normalized"),
        (["ab", "bcd"], "'ab' and 'bcd' overlap"),
        ([AddedToken("foo", normalized=False), "a foo"], "'foo' and 'a foo' overlap"),
        ([AddedToken("oof", normalized=False), "foo"], "'oof' and 'foo' overlap"),
    ],
)
def test_added_tokens_that_llama_cpp_finds_elsewhere(
    tokens: list[Any], reason: str, tmp_path: Path
) -> None:
    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizers.NFC()
    words.add_tokens(tokens)
    checkpoint(tmp_path, built(CONFIGS["llama"], {}), words)
    refused(tmp_path, ModelError, reason)


def test_a_pattern_that_is_no_expression(tmp_path: Path) -> None:
    steps = [pre_tokenizers.Split(_LLAMA_3, "isolated"), SPLITS["llama-bpe"][1]]
    checkpoint(tmp_path, built(CONFIGS["llama"], {}), tokenizer(steps, ignore_merges=True))
    refused(tmp_path, ModelError, "no name for how")


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, built(CONFIGS["llama"], {})) / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "a\ud800"}))
    refused(tmp_path, ModelError, "chat template holds '.*ud800', half of a character, at 1")


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    save(built(CONFIGS["llama"], {}), tmp_path / "small")
    refused(tmp_path, ModelError, "tokenizer")


def test_more_tokens_than_embeddings(tmp_path: Path) -> None:
    config = LlamaConfig(**{**_SIZES, "vocab_size": 300})
    checkpoint(tmp_path, AutoModelForCausalLM.from_config(config))
    refused(tmp_path, ModelError, "300 embeddings")


def test_numbers_that_a_format_does_not_hold(tmp_path: Path) -> None:
    model = built(CONFIGS["llama"], {})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    checkpoint(tmp_path, model)
    refused(tmp_path, ModelError, "f16 does not")
    assert export_gguf(tmp_path / "small", dtype="bf16").path.exists()


@pytest.mark.parametrize("make", ["nothing", "empty", "file"])
def test_what_is_no_checkpoint(make: str, tmp_path: Path) -> None:
    if make == "empty":
        (tmp_path / "small").mkdir()
    elif make == "file":
        (tmp_path / "small").write_text("x")
    refused(tmp_path, CheckpointError, "no directory with a checkpoint")


def test_other_formats(uneven: Path) -> None:
    refused(uneven.parent, OptionError, "f32, f16, bf16", dtype="q4_0")


def test_a_package_that_is_missing_is_named(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(uneven.parent, MissingDependency, r"osscar\[gguf\]")


def test_files_that_are_there(uneven: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(b"GGUF, of an earlier day")
    with pytest.raises(OutputError, match="there already"):
        export_gguf(uneven, there)
    assert there.read_bytes() == b"GGUF, of an earlier day"
    assert export_gguf(uneven, there, overwrite=True).bytes > 1000
    there.write_text("precious")
    with pytest.raises(OutputError, match="no GGUF file"):
        export_gguf(uneven, there, overwrite=True)
    assert there.read_text() == "precious"


@pytest.mark.parametrize("out", ["no/where.gguf", ".", "file/small.gguf", "\0"])
def test_places_that_cannot_be_written(out: str, uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write|is a directory"):
        export_gguf(uneven, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission(uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write"):
        export_gguf(uneven, tmp_path / "closed" / "small.gguf")


@pytest.mark.parametrize("spoil", ["tensor", "field"])
def test_a_file_that_does_not_hold_the_model_is_not_put_in_place(
    spoil: str, uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil == "tensor":
        write = gguf.GGUFWriter.write_tensor_data
        monkeypatch.setattr(
            gguf.GGUFWriter, "write_tensor_data", lambda self, array: write(self, array * 0)
        )
    else:
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_float32",
            lambda self, key, value: self.add_key_value(key, 2.0, gguf.GGUFValueType.FLOAT32),
        )
    with pytest.raises(EquivalenceError, match="not read back"):
        export_gguf(uneven, tmp_path / "small.gguf")
    assert list(tmp_path.iterdir()) == []


# ---- the command -------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["osscar", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        osscar.cli.main()
    return int(stop.value.code or 0)


def test_the_command_writes_the_file(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, json_file = tmp_path / "small.gguf", tmp_path / "out.json"
    words = ("export", uneven, "--format", "gguf", "--out", out, "--dtype", "bf16")
    assert command(monkeypatch, *words, "--json", json_file) == 0
    assert "'deci'" in capsys.readouterr().out
    document = json.loads(json_file.read_text())
    assert undescribed(document) == missing(document) == set()
    assert document.pop("osscar_version")
    assert document == {
        "schema": "osscar.export/1",
        "directory": str(uneven),
        "format": "gguf",
        "path": str(out),
        "architecture": "deci",
        "dtype": "bf16",
        "bytes": out.stat().st_size,
    }


@pytest.mark.parametrize("value", [None, 3, torch.nn.Linear(2, 2)], ids=["none", "number", "model"])
def test_what_names_no_directory_is_told_what_would(value: Any) -> None:
    with pytest.raises(OptionError, match=r"the checkpoint is .*such as result\.save"):
        export_gguf(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "no directory with a checkpoint"),
        (("DIR", "--format", "onnx"), "--format is 'onnx'"),
        (("DIR", "--dtype", "int8"), "give one of f32"),
        (("DIR", "--out", "no/where.gguf"), "is no directory"),
        (("DIR", "--out", "same", "--json", "same"), "which the command writes"),
    ],
)
def test_bad_input_ends_in_one_line(
    words: tuple[str, ...], message: str, uneven: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [uneven if word == "DIR" else word for word in words]
    assert command(monkeypatch, "export", *given) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []
