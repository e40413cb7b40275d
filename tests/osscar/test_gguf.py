"""GGUF files: llama.cpp computes what transformers does, and what it cannot is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
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
    MixtralConfig,
    OlmoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import osscar
import osscar.cli.commands
from osscar.base.errors import (
    CheckpointError,
    EquivalenceError,
    MissingDependency,
    ModelError,
    OptionError,
    OutputError,
)
from osscar.checkpoint.directory import save
from osscar.experts.find import mixtures_in
from osscar.export.gguf import _FAMILIES, Graph, export_gguf
from osscar.export.gguf_tokens import _LLAMA_3, vocabulary_fields
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.shrinking.shrink import shrink
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
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
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
            if parameter.ndim > 1:
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


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers are alike, with no tokenizer."""
    return save(built(CONFIGS["llama"], {}), tmp_path_factory.mktemp("even") / "small").path


def with_tokenizer(place: Path, directory: Path, words: Any) -> Path:
    there = Path(shutil.copytree(directory, place / "small"))
    words.save_pretrained(there)
    return there


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ["deci", "llama"])
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(
    name: str, architecture: str, tmp_path: Path
) -> None:
    model = built(CONFIGS[name], GROUPS[architecture])
    written = export_gguf(checkpoint(tmp_path, model), dtype="f32")
    of_qwen3 = {"llama": "qwen3", "deci": "openelm"} if name == "qwen3" else {}
    assert written.architecture == of_qwen3.get(architecture, architecture)
    engine = Engine(written.path)
    with torch.no_grad():
        expected = model(IDS).logits[0, -1].double().log_softmax(-1)
    found = engine.log_probabilities(IDS[0].tolist(), VOCABULARY, shown=tokenizer().encode("a")[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    tokens = model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert engine.generate(IDS[0].tolist(), 12) == tokens[0, IDS.shape[1] :].tolist()


_ROUTED = {**_SIZES, "num_experts": 4, "num_experts_per_tok": 2}
_INNER = {"moe_intermediate_size": 24}
MIXTURES = {
    "llama": MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**{**_ROUTED, "num_key_value_heads": 6}),
    "qwen2moe": Qwen2MoeConfig(**_ROUTED, **_INNER, shared_expert_intermediate_size=20),
    "qwen3moe": Qwen3MoeConfig(**_ROUTED, **_INNER, head_dim=8, norm_topk_prob=True),
}


def without_experts(model: Any, *gone: int) -> Any:
    """Return a mixture without one expert in each layer, or in the first ones."""
    with torch.no_grad():
        found = mixtures_in(model, {"input_ids": IDS})
    groups = [one.group for one, _ in zip(found, gone, strict=False)]
    kept = [tuple(e for e in range(4) if e != one) for one in gone]
    plan = PruningPlan(tuple(map(GroupPlan.of, groups, kept)))
    shrink(model, plan, [{"input_ids": IDS}])
    return model


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", MIXTURES)
def test_llama_cpp_computes_mixtures_that_have_lost_experts(
    architecture: str, tmp_path: Path
) -> None:
    model = without_experts(built(MIXTURES[architecture], {}), 1, 0, 3)
    written = export_gguf(checkpoint(tmp_path, model), dtype="f32")
    assert written.architecture == architecture
    assert field(written.path, f"{architecture}.expert_count") == 3
    with torch.no_grad():
        expected = model(IDS).logits[0, -1].double().log_softmax(-1)
    shown = tokenizer().encode("a")[0]
    found = Engine(written.path).log_probabilities(IDS[0].tolist(), VOCABULARY, shown)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_experts_are_padded_to_whole_blocks(tmp_path: Path) -> None:
    config = Qwen2MoeConfig(
        **{**_ROUTED, **_INNER, "hidden_size": 96}, shared_expert_intermediate_size=20
    )
    model = built(config, {})
    written = export_gguf(checkpoint(tmp_path, model), dtype="f32")
    assert written.padding == 3 * (4 * 8 + 12)
    with torch.no_grad():
        expected = model(IDS).logits[0, -1].double().log_softmax(-1)
    shown = tokenizer().encode("a")[0]
    found = Engine(written.path).log_probabilities(IDS[0].tolist(), VOCABULARY, shown)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_precision_is_close(dtype: str, uneven: Path, tmp_path: Path) -> None:
    written = export_gguf(uneven, tmp_path / "small.gguf", dtype=dtype)
    assert written.bytes < 0.7 * export_gguf(uneven, tmp_path / "full.gguf", dtype="f32").bytes
    with torch.no_grad():
        expected = osscar.load(uneven)(IDS).logits[0, -1].double().log_softmax(-1)
    shown = tokenizer().encode("a")[0]
    found = Engine(written.path).log_probabilities(IDS[0].tolist(), VOCABULARY, shown)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("groups", [{}, {"model.layers.1.mlp.neurons": 33}], ids=["alike", "each"])
def test_neurons_of_zeros_make_up_whole_blocks(groups: dict[str, int], tmp_path: Path) -> None:
    config = LlamaConfig(**{**_SIZES, "hidden_size": 96, "head_dim": 32}, mlp_bias=True)
    model = built(config, groups)
    written = export_gguf(checkpoint(tmp_path, model), dtype="f32")
    assert written.padding == 3 * 64 - sum(
        one.mlp.down_proj.in_features for one in model.model.layers
    )
    assert written.architecture == "llama"  # 40, 33 and 40 are 64 each
    matrices = [one for one in gguf.GGUFReader(written.path).tensors if len(one.shape) == 2]
    assert {int(one.shape[0]) % 32 for one in matrices} == {0}
    with torch.no_grad():
        expected = model(IDS).logits[0, -1].double().log_softmax(-1)
    shown = tokenizer().encode("a")[0]
    found = Engine(written.path).log_probabilities(IDS[0].tolist(), VOCABULARY, shown)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def around(*templates: str) -> Any:
    """What puts tokens around a text."""
    ids = [("<s>", 0), ("</s>", 1)]
    steps = [processors.TemplateProcessing(of, special_tokens=ids) for of in templates]
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), *steps])


def ending(template: str) -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.backend_tokenizer.post_processor = around(template)
    return words


def adding(*tokens: Any) -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.add_tokens(list(tokens))
    return words


@pytest.mark.parametrize(
    ("words", "text"),
    [
        *((tokenizer(s, ignore_merges=n == "llama-bpe"), TEXT) for n, s in SPLITS.items()),
        (tokenizer(begins=True), TEXT),
        (ending("$A </s>"), TEXT),
        (ending("<s> $A </s>"), TEXT),
        (
            adding("<toy>", "<toy> ca", "aaa", AddedToken("the", normalized=False)),
            "the cat <toy> cat<toy> dog aaaaa  then <toy>the",
        ),
    ],
    ids=[*SPLITS, "beginning", "end", "both", "added"],
)
def test_llama_cpp_makes_the_same_tokens(words: Any, text: str, even: Path, tmp_path: Path) -> None:
    written = export_gguf(with_tokenizer(tmp_path, even, words), dtype="f32")
    assert Engine(written.path).tokenize(text) == words(text).input_ids


def test_the_name_of_a_directory_does_not_change_how_special_tokens_are_found(
    even: Path, tmp_path: Path
) -> None:
    words, text = tokenizer(), "a</s>  b<s>  a"
    directory = with_tokenizer(tmp_path, even, words)
    for name in ("Phi-3-mini", "phi3", "modern-bert"):
        directory = directory.rename(tmp_path / name)
        assert Engine(export_gguf(directory).path).tokenize(text) == words(text).input_ids


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


def test_what_transformers_saved_is_exported_as_well(uneven: Path, tmp_path: Path) -> None:
    osscar.load(uneven).save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "small")
    with pytest.warns(UserWarning, match=r"no osscar\.json"):
        found = export_gguf(tmp_path / "small", dtype="f32")
    assert found.architecture == "deci"
    known = export_gguf(uneven, tmp_path / "known.gguf", dtype="f32")
    assert found.path.read_bytes() == known.path.read_bytes()


def test_of_several_chat_templates_the_file_has_the_default(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    words.save_pretrained(tmp_path)
    assert (
        vocabulary_fields(tmp_path, VOCABULARY, gguf)["tokenizer.chat_template"] == "{{ messages }}"
    )


def test_an_output_matrix_beside_the_embedding_needs_layers_that_are_alike() -> None:
    config = Qwen3Config(**_SIZES, head_dim=8)
    assert Graph(built(config, {}), "f16", gguf).architecture == "qwen3"
    with pytest.raises(ModelError, match="'openelm' has no output matrix beside the embedding"):
        Graph(built(config, GROUPS["deci"]), "f16", gguf)


def test_a_sliding_window_bounds_the_context() -> None:
    assert Graph(built(CONFIGS["mistral"], {}), "f16", gguf).fields()["llama.context_length"] == 64


# ---- refusals ----------------------------------------------------------------------------


def refused(place: Path, error: type[Exception], match: str, **options: Any) -> None:
    """Export what lies in `place`, in vain, and find nothing written."""
    before = {path.name for path in place.iterdir()}
    with pytest.raises(error, match=match):
        export_gguf(place / "small", **options)
    assert {path.name for path in place.iterdir()} == before


def test_mixtures_of_different_experts_are_refused() -> None:
    model = without_experts(built(MIXTURES["llama"], {}), 1)
    with pytest.raises(ModelError, match=r"have \[3, 4, 4\] experts, and 'llama' has one number"):
        Graph(model, "f16", gguf)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (OlmoeConfig(**_ROUTED), "normalized over 24 features"),
        (
            Qwen3MoeConfig(**_ROUTED, **_INNER, head_dim=8, norm_topk_prob=False),
            "'qwen3moe' divides the weights",
        ),
        (
            Qwen2MoeConfig(**_ROUTED, **_INNER, mlp_only_layers=[1]),
            "1 of its 3 layers are no mixtures",
        ),
        (Qwen3Config(**_SIZES, head_dim=8, attention_bias=True), "q_proj.bias', for which 'qwen3'"),
        (GPT2Config(vocab_size=400, n_embd=48, n_layer=2, n_head=6), "it is a GPT2LMHeadModel"),
        (LlamaConfig(**_SIZES, hidden_act="gelu"), "activation 'gelu'"),
        (
            LlamaConfig(
                **_SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
            ),
            "type 'yarn'",
        ),
    ],
)
def test_other_graphs_are_refused_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=f"llama.cpp cannot run the model: .*{reason}"):
        Graph(AutoModelForCausalLM.from_config(config), "f16", gguf)


def changed(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer whose file says something else of the merges."""
    content = json.loads(tokenizer().backend_tokenizer.to_str())
    content["model"].update(changes)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )


def processed(processor: Any) -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.backend_tokenizer.post_processor = processor
    return words


def normalized(*tokens: Any) -> PreTrainedTokenizerFast:
    words = tokenizer()
    words.backend_tokenizer.normalizer = normalizers.NFC()
    words.add_tokens(list(tokens))
    return words


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tokenizer([pre_tokenizers.Whitespace()]), "no name for how the tokenizer splits"),
        (lambda: tokenizer([pre_tokenizers.ByteLevel(add_prefix_space=True)]), "no name for how"),
        (lambda: tokenizer(ignore_merges=True), "no name for how"),
        (
            lambda: tokenizer(
                [pre_tokenizers.Split(_LLAMA_3, "isolated"), SPLITS["llama-bpe"][1]],
                ignore_merges=True,
            ),
            "no name for how",  # a pattern that is no expression
        ),
        (lambda: changed(end_of_word_suffix="e"), "end_of_word_suffix = 'e'"),
        (
            lambda: changed(continuing_subword_prefix="##", merges=[]),
            "continuing_subword_prefix = '##'",
        ),
        (lambda: changed(dropout=0.5), r"dropout = 0\.5"),
        (lambda: changed(unk_token="<s>"), "unk_token = '<s>'"),
        (lambda: changed(fuse_unk=True), "fuse_unk = True"),
        (lambda: changed(merges=[]), "no merges"),
        (lambda: changed(byte_fallback=True), "byte_fallback = True"),
        (lambda: processed(around("<s> <s> $A")), r"makes \[0, 0, \d+\] of 'a'"),
        (lambda: processed(around("</s> $A")), r"makes \[1, \d+\] of 'a'"),
        (
            lambda: processed(processors.RobertaProcessing(("<s>", 0), ("</s>", 1))),
            r"makes \[1, \d+, 0\] of 'a'",
        ),
        (
            lambda: normalized(AddedToken("<m>", lstrip=True, rstrip=True)),
            "'<m>' is lstrip, rstrip",
        ),
        (lambda: normalized(AddedToken("foo", single_word=True)), "'foo' is single_word"),
        (lambda: normalized(AddedToken("e\u0301")), "is normalized"),
    ],
)
def test_tokenizers_of_which_llama_cpp_would_make_others_are_refused(
    make: Callable[[], PreTrainedTokenizerFast], reason: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        vocabulary_fields(tmp_path, VOCABULARY, gguf)


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "a\ud800"}))
    with pytest.raises(ModelError, match="surrogates not allowed"):
        vocabulary_fields(tmp_path, VOCABULARY, gguf)


def test_no_tokenizer_and_too_many_tokens(even: Path, tmp_path: Path) -> None:
    refused(even.parent, ModelError, "tokenizer")
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="300 embeddings"):
        vocabulary_fields(tmp_path, 300, gguf)


def test_numbers_that_a_format_does_not_hold(tmp_path: Path) -> None:
    model = built(CONFIGS["llama"], {})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    checkpoint(tmp_path, model)
    refused(tmp_path, ModelError, "f16 does not")
    assert export_gguf(tmp_path / "small", dtype="bf16").path.exists()


def test_what_cannot_be_exported(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(tmp_path, CheckpointError, "no directory with a checkpoint")
    (tmp_path / "small").write_text("x")
    refused(tmp_path, CheckpointError, "no directory with a checkpoint")
    (tmp_path / "small").unlink()
    (tmp_path / "small").mkdir()
    refused(tmp_path, CheckpointError, "no directory with a checkpoint")
    refused(uneven.parent, OptionError, "f32, f16, bf16", dtype="q4_0")
    for value in (None, 3, torch.nn.Linear(2, 2)):
        with pytest.raises(OptionError, match=r"the checkpoint is .*such as result\.save"):
            export_gguf(value)
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


def test_places_that_cannot_be_written(uneven: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in ("no/where.gguf", ".", "file/small.gguf", "\0"):
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


def test_help_and_docs_name_the_families_that_are_written() -> None:
    pages = Path(__file__).parents[2] / "docs" / "howto"
    docs = "".join((pages / f"{name}.md").read_text() for name in ("formats", "llama-cpp"))
    lists = re.findall(r"LLaMA,[^.|(`]*?OLMoE", f"{osscar.cli.commands.export.__doc__} {docs}")
    assert len(lists) == 3
    written = {name.removesuffix("ForCausalLM").lower() for name in _FAMILIES} | {"smollm2"}
    for said in lists:
        names = re.split(r"(?:, | and | or )(?:and mixtures of )?", " ".join(said.split()))
        assert {name.replace("-", "").lower() for name in names} == written


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
        "padding": 0,
        "inputs": {},
        "outputs": {},
        "weights": None,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "no directory with a checkpoint"),
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
