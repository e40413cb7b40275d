"""Saving and loading: stock where it can be, a plan elsewhere, never half a directory; the card."""

import json
import re
import shutil
from functools import cache

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

import osscar
from osscar.base.errors import DataError, EquivalenceError, OutputError
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.builders import written_tensors
from osscar.checkpoint.directory import CARD_FILE
from osscar.checkpoint.files import MANIFEST_FILE, read_manifest
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.modules import copied
from osscar.network.tensor_files import write_tensors
from osscar.proof.equivalence import finer_precision
from osscar.proof.lineage import lineage_of, note
from osscar.proof.seen import Calibration, refuse_overlap
from tests.osscar.families import CALIBRATION, HELD_OUT, gated, logits, tiny, tokens

IDS = tokens(2, 16, seed=9)

STOCK = [
    *((family, {"neurons": "0.5"}) for family in ("opt", "gpt2")),
    *((family, {"heads": 3, "neurons": 20}) for family in ("llama-mha", "llama-mqa")),
    *((family, {"heads": "2/3", "neurons": "0.5"}) for family in ("llama-gqa", "qwen3")),
]


@cache
def pruned(family, **keep):
    """A model that no test writes to."""
    return osscar.prune(
        tiny(family, layers=1), tokens(), backend="magnitude", device="cpu", **keep
    ).model


def assert_alike(model, other):
    torch.testing.assert_close(logits(model, IDS), logits(other, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "keep"), STOCK)
def test_what_a_stock_config_can_express_is_read_by_transformers(family, keep, tmp_path):
    model = pruned(family, **keep)
    assert checkpoint.save(model, tmp_path / "small").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert_alike(again, model)
    assert again.generate(IDS, max_new_tokens=4, eos_token_id=None, pad_token_id=0).shape[1] == 20


@pytest.mark.slow
def test_a_model_that_is_pruned_twice_is_stock_and_keeps_its_config(tmp_path):
    once = pruned("llama-mqa", heads=3, neurons=20)
    twice = osscar.prune(once, tokens(), neurons=8, backend="magnitude", device="cpu").model
    config = twice.config
    assert checkpoint.save(twice, tmp_path / "small").stock
    assert twice.config is config
    assert not read_manifest(tmp_path / "small").lineage.plans
    assert_alike(osscar.load(tmp_path / "small"), twice)
    twice.save_pretrained(tmp_path / "plain")
    assert_alike(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval(), twice)


def test_equal_models_are_equal_files(tmp_path):
    """safetensors draws the order in which it says what is shared."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "abcdef"})
    for name in "bcdef":
        model[name].weight = model["a"].weight
    for index in range(8):
        write_tensors(tmp_path / f"{index}", written_tensors(model), {"format": "pt"})
    files = {file.read_bytes() for file in tmp_path.iterdir()}
    assert len(files) == 1


# ---- failures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "failure", "error"),
    [
        ("rename", OSError(28, "No space left on device"), OutputError),
        ("compare", EquivalenceError("differs"), EquivalenceError),
    ],
)
def test_a_failure_while_saving_leaves_the_old_directory_whole(
    place, failure, error, tmp_path, monkeypatch
):
    directory, model = tmp_path / "model", pruned("llama-mqa", heads=3, neurons=20)
    checkpoint.save(model, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    rename = type(directory).rename

    def fail(*_args, **_kwargs):
        raise failure

    def renamed(path, to):
        if to == directory and not path.name.endswith("replaced"):
            raise failure  # after what was there has gone aside
        return rename(path, to)

    with monkeypatch.context() as patch:
        if place == "rename":
            patch.setattr(type(directory), "rename", renamed)
        else:
            patch.setattr(checkpoint, "read_back", fail)
        with pytest.raises(error):
            checkpoint.save(model, directory, overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_that_does_not_compute_the_same_is_not_put_in_place(tmp_path, monkeypatch):
    model = pruned("opt", heads="2/3", neurons="0.5")
    name, write = "model.decoder.layers.0.fc1.weight", checkpoint.write_tensors

    def spoil(file, tensors, *others):
        return write(file, {**tensors, name: tensors[name] + 0.1}, *others)

    monkeypatch.setattr(checkpoint, "write_tensors", spoil)
    with pytest.warns(UserWarning, match="only osscar.load"), pytest.raises(EquivalenceError):
        checkpoint.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "any_shape_config", lambda model: None)  # as in other families
    return checkpoint.save(pruned("opt", heads="2/3", neurons="0.5"), tmp_path / "model").path


def test_a_hostile_manifest_is_an_error_of_ours(directory):
    file = directory / MANIFEST_FILE
    whole = file.read_text()
    for change, match in (
        ({"kept": [0, 99]}, "does not have"),
        ({"kept": [0]}, "do not fit"),
        ({"units": 10**6}, None),
        ({"more": 1}, None),
    ):
        content = json.loads(whole)
        content["lineage"]["plans"][0]["groups"][0].update(change)
        file.write_text(json.dumps(content))
        with pytest.raises(osscar.OsscarError, match=match):
            pytest.fail(f"{content['lineage']} was read: {osscar.load(directory)}")


# ---- lineage -----------------------------------------------------------------------------


def test_everything_that_has_to_be_known_is_written_and_read_again(tiny, tmp_path):
    loaded = osscar.load_model(tiny, device="cpu")
    text, few = CALIBRATION.read_text(), {"backend": "magnitude", "device": "cpu"}
    windows = osscar.load_calibration([text], loaded.tokenizer, samples=4, seqlen=32)
    result = osscar.prune(loaded.model, windows, heads=0.5, **few)
    saved = result.save(tmp_path / "small", tokenizer=loaded.tokenizer)
    again = osscar.load_model(saved.path, device="cpu")
    lineage = lineage_of(again.model)
    assert lineage.source == f"directory {tiny.name}"
    assert lineage.stored_dtype == str(loaded.stored_dtype).removeprefix("torch.")
    assert lineage.calibration == (Calibration.of(windows.describe()),)
    assert lineage.calibration[0].seen == windows.seen
    assert lineage_of(copied(again.model)) == lineage
    with pytest.raises(
        DataError, match="about 100% of a list was used to calibrate or recover this model"
    ):
        refuse_overlap(osscar.load_text([text], loaded.tokenizer), lineage.calibration)
    refuse_overlap(osscar.load_text(HELD_OUT, loaded.tokenizer), lineage.calibration)


# ---- number formats ----------------------------------------------------------------------


SIZES = {
    "vocab_size": 97,
    "hidden_size": 72,  # whose root is rounded, where Gemma 3 multiplies by it
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "num_key_value_heads": 2,
    "head_dim": 18,
}


def dense(config, path, dtype):
    """Write a model that looks closely, so that what is rounded turns its attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.to(dtype).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, path / file)
    return path


def formats(model):
    """Return the number format of all that has one, by name."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.dtype for name, tensor in named if tensor.is_floating_point()}


@torch.no_grad()
def assert_same(model, other):
    assert formats(model) == formats(other)
    ids = tokens(2, 60)
    torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits)


def as_transformers(path, dtype):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True)


@pytest.mark.parametrize("config", [LlamaConfig, Gemma3TextConfig])
def test_a_model_is_read_as_transformers_reads_it(config, tmp_path):
    for stored, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)):
        path = dense(config(**SIZES), tmp_path / str(stored), stored)
        for max_memory in (None, "2GB"):
            loaded = osscar.load_model(path, dtype=dtype, device="cpu", max_memory=max_memory)
            assert loaded.stored_dtype == stored
            assert_same(loaded.model, as_transformers(path, dtype))
    model = osscar.load_model(path, dtype="bfloat16", device="cpu").model
    with finer_precision(model, {"input_ids": tokens(2)}):  # no finer than needed
        assert set(formats(model).values()) == {torch.float32}


def test_a_pruned_model_is_what_transformers_reads(tmp_path):
    path = dense(Gemma3TextConfig(**SIZES), tmp_path / "dense", torch.bfloat16)
    read = {"dtype": torch.bfloat16, "device": "cpu"}
    loaded, saved = osscar.load_model(path, **read), tmp_path / "pruned"
    kept = {"neurons": 0.5, "heads": 0.5, "skip": ["*layers.1.*"]}
    result = osscar.prune(loaded.model, tokens(4), **kept, backend="magnitude")
    checkpoint.save(result.model, saved, tokenizer=loaded.tokenizer)
    theirs = as_transformers(saved, torch.bfloat16)
    for mine in (result.model, osscar.load(saved), osscar.load_model(saved, **read).model):
        assert_same(mine, theirs)


def test_what_a_family_keeps_in_float32_is_kept_and_counted(tmp_path):
    path = dense(gated(), tmp_path / "dense", torch.float32)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    loaded = osscar.load_model(path, dtype="bfloat16", device="cpu")
    assert_same(loaded.model, as_transformers(path, torch.bfloat16))
    assert formats(loaded.model)[name] == torch.float32
    model = osscar.load_model(path, dtype="float32", device="cpu").model
    note(model, stored_dtype="bfloat16")
    saved = osscar.save(model, tmp_path / "again")
    tensors = load_file(saved.path / "model.safetensors")
    assert tensors[name].dtype == torch.float32
    stored = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert (
        checkpoint.weight_bytes(model)
        == stored
        < 0.6 * checkpoint.weight_bytes(loaded.model, torch.float32)
    )
    assert_same(osscar.load(saved.path), as_transformers(saved.path, torch.bfloat16))


# ---- the model card ----------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "blocks", "library"),
    [
        pytest.param("llama", 1, "transformers", marks=pytest.mark.slow),
        ("opt", 2, "transformers"),
        ("program", 1, "pytorch"),
    ],
)
def test_the_code_of_a_card_reads_its_checkpoint(name, blocks, library, runs, tmp_path):
    dense, data, result = runs[name].dense, runs[name].data, runs[name].result
    result.save(tmp_path / "small", report=result.document(dense, data))
    card = ModelCard.load(tmp_path / "small" / CARD_FILE)  # as the hub reads it
    assert (card.data.library_name, card.data.tags) == (library, ["pruned", "osscar"])
    found = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(found) == blocks
    for block in found:
        names = {"dense": dense}
        code = block.replace("DIRECTORY", str(tmp_path / "small")).replace("= ...", "= dense")
        exec(code, names)
        mine = dict(result.model.named_parameters())
        for key, tensor in names["model"].named_parameters():
            assert torch.equal(tensor, mine[key])
