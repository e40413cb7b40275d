"""GGUF files: llama.cpp computes what transformers does, and what it cannot is refused."""

import json
import shutil
import sys
import urllib.request

import pytest
import torch
import transformers as hf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

import osscar
import osscar.cli.commands
from osscar.base import errors
from osscar.base.errors import ModelError
from osscar.checkpoint.directory import save
from osscar.export.gguf import Graph, export_gguf
from osscar.export.gguf_tokens import _LLAMA_3, vocabulary_fields
from tests.docs.json_schema import missing, undescribed

gguf = pytest.importorskip("gguf")

VOCABULARY = 400
TEXT = (
    "The cat's 12345 toys were $5.50 in 2019!\n\n  She'll say: naïve 日本語?  \t<s>OK</s> "
    "don't STOP, it's 3 o'clock"
)
BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": [WORDS],
    "smollm": [pre.Digits(individual_digits=True), WORDS],
    "llama-bpe": [pre.Split(Regex(_LLAMA_3), "isolated"), BYTES],
    "qwen2": [pre.Split(Regex(_LLAMA_3.replace("{1,3}", "")), "isolated"), BYTES],
}


def tokenizer(steps=SPLITS["smollm"], *, around=None, normalizer=None, add=(), **changed):
    """Train a tokenizer on a text, and change what its file says of how pieces are merged."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre.Sequence(steps), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 16,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    made.train_from_iterator([TEXT * 3, "a cat and the toys she will say were 12 and 345"], trainer)
    content = json.loads(made.to_str())
    content["model"].update(changed)
    made = Tokenizer.from_str(json.dumps(content))
    if isinstance(around, str):
        ends = TemplateProcessing(around, special_tokens=[("<s>", 0), ("</s>", 1)])
        around = Sequence([ByteLevel(trim_offsets=False), ends])
    if around is not None:
        made.post_processor = around
    if normalizer is not None:
        made.normalizer = normalizer
    words = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    words.add_tokens(list(add))
    return words


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
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
_LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
CONFIGS = {
    "llama": hf.LlamaConfig(
        **_SIZES, rope_parameters=_LLAMA_3_POSITIONS, attention_bias=True, mlp_bias=True
    ),
    "tied, wide heads": hf.LlamaConfig(
        **_SIZES, rope_parameters=_LINEAR, tie_word_embeddings=True, head_dim=16
    ),
    "multi-query": hf.MistralConfig(**{**_SIZES, "num_key_value_heads": 1}, sliding_window=64),
    "qwen2": hf.Qwen2Config(**{**_SIZES, "num_key_value_heads": 6}),
    "qwen3": hf.Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
}
UNEVEN = {"model.layers.0.self_attn.heads": 2, "model.layers.1.mlp.neurons": 12}
IDS = torch.randint(2, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(3))


def built(config, groups=None):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.3)
    if groups is None:
        return model
    windows = torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))
    return osscar.prune(model, windows, backend="magnitude", device="cpu", groups=groups).model


def exported(model, place, dtype="f32"):
    return export_gguf(save(model, place / "small", tokenizer=tokenizer()).path, dtype=dtype)


def assert_computed(file, model, tolerance=1e-4):
    engine = Engine(file)
    with torch.no_grad():
        expected = model(IDS).logits[0, -1].double().log_softmax(-1)
    found = engine.log_probabilities(IDS[0].tolist(), VOCABULARY, shown=tokenizer().encode("a")[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    return engine


class Engine:
    """A model of llama.cpp in exact arithmetic: float32 keys and values, attention written out."""

    def __init__(self, file):
        library = pytest.importorskip("xllamacpp")
        options = library.CommonParams()
        options.model.path = str(file)
        options.n_ctx = 128
        options.warmup = False
        options.verbosity = options.cache_ram_mib = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cache_type_k = options.cache_type_v = library.ggml_type.GGML_TYPE_F32
        self.server = library.Server(options)
        # A server that is ended before its loop has begun never ends: wait until it answers there.
        self._ask("/completion", prompt=[0], n_predict=1)

    def _ask(self, path, **content):
        address, data = self.server.listening_address + path, json.dumps(content).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def log_probabilities(self, ids, vocabulary, shown):
        """Of every next token, (vocabulary,); `shown` is any token that is a whole character."""
        options = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": [[shown, 1e6]]}
        answer = self._ask("/completion", prompt=list(ids), **options)
        found = torch.full((vocabulary,), float("nan"), dtype=torch.float64)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def tokenize(self, text):
        """The tokens of a text, in which special tokens may stand."""
        options = {"add_special": True, "parse_special": True}
        return self._ask("/tokenize", content=text, **options)["tokens"]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    model = built(CONFIGS["llama"], UNEVEN)
    return save(model, tmp_path_factory.mktemp("gguf") / "small", tokenizer=tokenizer()).path


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A model whose layers are alike, with no tokenizer."""
    return save(built(CONFIGS["llama"]), tmp_path_factory.mktemp("even") / "small").path


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, UNEVEN], ids=["alike", "each"])
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(name, groups, tmp_path):
    model = built(CONFIGS[name], groups)
    written = exported(model, tmp_path)
    known = ("qwen3", "openelm") if name == "qwen3" else ("llama", "deci")
    assert written.architecture == known[groups is not None]
    assert_computed(written.path, model)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("bf16", 0.1)])
def test_every_number_format_is_as_close_as_it_can_be(dtype, tolerance, uneven, tmp_path):
    written = export_gguf(uneven, tmp_path / "small.gguf", dtype=dtype)
    assert_computed(written.path, osscar.load(uneven), tolerance)


@pytest.mark.slow
def test_neurons_of_zeros_make_up_whole_blocks(tmp_path):
    sizes = {**_SIZES, "hidden_size": 96, "head_dim": 32}
    model = built(hf.LlamaConfig(**sizes, mlp_bias=True), {"model.layers.1.mlp.neurons": 33})
    written = exported(model, tmp_path)
    assert (written.architecture, written.padding) == ("llama", 24 + 31)  # 40 and 33 are 64 each
    matrices = [one for one in gguf.GGUFReader(written.path).tensors if len(one.shape) > 1]
    assert {int(one.shape[0]) % 32 for one in matrices} == {0}
    assert_computed(written.path, model)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        *((tokenizer(s, ignore_merges=n == "llama-bpe"), TEXT) for n, s in SPLITS.items()),
        *((tokenizer(around=ends), TEXT) for ends in ("<s> $A", "$A </s>", "<s> $A </s>")),
        (
            tokenizer(add=["<toy>", "<toy> ca", "aaa", AddedToken("the", normalized=False)]),
            "the cat <toy> cat<toy> dog aaaaa  then <toy>the",
        ),
    ],
    ids=[*SPLITS, "beginning", "end", "both", "added"],
)
def test_llama_cpp_makes_the_same_tokens(words, text, even, tmp_path):
    # of a name from which it would conclude how special tokens are found
    directory = shutil.copytree(even, tmp_path / "phi3")
    words.save_pretrained(directory)
    engine = Engine(export_gguf(directory, dtype="f32").path)
    for one in (text, "a</s>  b<s>  a"):
        assert engine.tokenize(one) == words(one).input_ids


# ---- what the file says ------------------------------------------------------------------


def field(file, key):
    return gguf.GGUFReader(file).get_field(key).contents()


def test_what_the_file_says(uneven, tmp_path):
    directory, words = shutil.copytree(uneven, tmp_path / "small"), tokenizer()
    words.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    words.save_pretrained(directory)
    written = export_gguf(directory)
    assert written.path == tmp_path / "small-f16.gguf"
    assert written.bytes == written.path.stat().st_size
    for key, value in (
        ("general.architecture", "deci"),
        ("deci.attention.head_count", [4, 6]),
        ("deci.attention.head_count_kv", [2, 3]),
        ("deci.feed_forward_length", [40, 12]),
        ("tokenizer.chat_template", "{{ messages }}"),
    ):
        assert field(written.path, key) == value
    tokens = field(written.path, "tokenizer.ggml.tokens")
    assert (len(tokens), tokens[-1]) == (VOCABULARY, f"[PAD{VOCABULARY - 1}]")
    types = field(written.path, "tokenizer.ggml.token_type")
    assert (types[0], types[2], types[-1]) == (3, 1, 5)
    assert {path.name for path in tmp_path.iterdir()} == {"small", "small-f16.gguf"}


def test_context_and_positions():
    window = Graph(built(CONFIGS["multi-query"]), "f16", gguf)
    assert window.fields()["llama.context_length"] == 64
    linear = Graph(built(CONFIGS["tied, wide heads"]), "f16", gguf)
    factors = {name: tensor for name, tensor, _ in linear.tensors()}["rope_freqs.weight"]
    torch.testing.assert_close(factors, torch.full((8,), 4.0))


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.GPT2Config(n_embd=48, n_layer=1, n_head=6), "it is a GPT2LMHeadModel"),
        (hf.LlamaConfig(**_SIZES, hidden_act="gelu"), "activation 'gelu'"),
        (hf.MixtralConfig(**_SIZES), "it is a MixtralForCausalLM.*convert_hf_to_gguf"),
    ],
)
def test_other_graphs_are_refused_with_the_reason(config, reason):
    with pytest.raises(ModelError, match=f"the model cannot be written as GGUF: .*{reason}"):
        Graph(built(config), "f16", gguf)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"steps": [pre.Whitespace()]}, "splits text in a way without a name"),
        ({"dropout": 0.5}, r"dropout = 0\.5"),
        ({"around": "<s> <s> $A"}, r"makes \[0, 0, \d+\] of 'a'"),
        ({"add": [AddedToken("foo", single_word=True)]}, "'foo' not only .*single_word"),
        ({"normalizer": normalizers.Lowercase()}, r"normalizes text \(Lowercase\)"),
    ],
)
def test_tokenizers_of_which_llama_cpp_would_make_others_are_refused(given, reason, tmp_path):
    tokenizer(**given).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason):
        vocabulary_fields(tmp_path, VOCABULARY, gguf)


def test_what_cannot_be_exported(uneven, tmp_path, monkeypatch):
    there, earlier = tmp_path / "there.gguf", "GGUF, of an earlier day"
    there.write_text(earlier)
    for source, given, error, message in (
        (
            uneven,
            {"dtype": "q4_0"},
            errors.OptionError,
            "dtype is 'q4_0'; it must be 'f32', 'f16' or 'bf16'",
        ),
        (uneven, {"out": there}, errors.OutputError, "there already"),
        (
            uneven,
            {"out": tmp_path / "no" / "where"},
            errors.OutputError,
            "give a file in a directory that exists",
        ),
    ):
        with pytest.raises(error, match=message):
            export_gguf(source, **given)
    assert there.read_text() == earlier
    assert export_gguf(uneven, there, overwrite=True).bytes > 1000
    weights = uneven / "model.safetensors"
    before = weights.read_bytes()
    for export in (export_gguf, osscar.export_onnx, osscar.export_pt2):
        with pytest.raises(errors.OutputError, match=r"is for \.\w+ files alone"):
            export(uneven, weights, overwrite=True)
    assert weights.read_bytes() == before
    assert list(tmp_path.iterdir()) == [there]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(errors.MissingDependency, match=r"osscar\[gguf\]"):
        export_gguf(uneven)


def test_a_file_that_does_not_hold_the_model_is_not_put_in_place(uneven, tmp_path, monkeypatch):
    spoilt = "write_tensor_data"
    write = getattr(gguf.GGUFWriter, spoilt)
    monkeypatch.setattr(
        gguf.GGUFWriter, spoilt, lambda self, *given: write(self, *given[:-1], given[-1] * 0)
    )
    with pytest.raises(errors.EquivalenceError, match="not read back"):
        export_gguf(uneven, tmp_path / "small.gguf")
    assert list(tmp_path.iterdir()) == []


# ---- the command -------------------------------------------------------------------------


def test_the_command_writes_the_file(uneven, tmp_path, run):
    out, json_file = tmp_path / "small.gguf", tmp_path / "out.json"
    words = ("export", uneven, "--format", "gguf", "--out", out, "--dtype", "bf16")
    status, said, err = run(*words, "--json", json_file)
    assert (status, "'deci'" in said) == (0, True), err
    document = json.loads(json_file.read_text())
    assert undescribed(document) == missing(document) == set()
    known = {"schema": "osscar.export/1", "directory": str(uneven), "format": "gguf"}
    sizes = {"bytes": out.stat().st_size, "padding": 0}
    told = {"path": str(out), "architecture": "deci", "dtype": "bf16", "weights": None}
    assert document.items() >= (known | sizes | told).items()
