"""Saving and loading: stock where it can be, a plan elsewhere, never a half-written directory."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import osscar
from osscar.base.errors import CheckpointError, DataError, EquivalenceError, FileError, OutputError
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint.manifest import MANIFEST_FILE, read_manifest
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.modules import copied
from osscar.proof.lineage import lineage_of
from osscar.proof.seen import Calibration, refuse_overlap
from tests.osscar.families import CALIBRATION, FAMILIES, HELD_OUT, logits, tiny, tokens
from tests.osscar.interrupted_cases import tiny_model

IDS = tokens(2, 16, seed=9)

STOCK = [
    ("opt", {"neurons": "0.5"}),
    ("gpt2", {"neurons": "0.5"}),
    ("llama-mha", {"heads": 3, "neurons": 20}),
    ("llama-mqa", {"heads": 3, "neurons": 20}),
    *((family, {"heads": "2/3", "neurons": "0.5"}) for family in ("llama-gqa", "mistral")),
    *((family, {"heads": "1/3", "neurons": "0.5"}) for family in ("qwen2", "qwen3")),
]
PLANNED = [
    ("opt", {"heads": "2/3", "neurons": "0.5"}),
    ("gpt2", {"heads": "2/3"}),
    ("llama-mha", {"heads": 5}),  # 48 hidden dimensions are no multiple of 5 heads
    ("llama-gqa", {"groups": {"model.layers.1.mlp.neurons": 10}}),
]


_PRUNED = {}


def pruned(family, **keep):
    """A model that is pruned once for all tests, none of which writes to it."""
    key = family, str(keep)
    if key not in _PRUNED:
        result = osscar.prune(tiny(family), tokens(), backend="magnitude", device="cpu", **keep)
        _PRUNED[key] = result.model
    return _PRUNED[key]


READER = """
import sys
import torch, transformers

ids = torch.tensor(eval(sys.argv[1]))
for directory in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids).logits, f"{directory}.pt")
    model.generate(ids, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
assert not {"osscar", "graph", "solvers"} & set(sys.modules)
"""


@pytest.mark.slow
def test_stock_checkpoints_load_in_a_process_that_never_imports_this_project(tmp_path):
    models = {}
    for index, (family, keep) in enumerate(STOCK):
        directory = tmp_path / f"{index}-{family}"
        models[directory] = pruned(family, **keep)
        assert checkpoint.save(models[directory], directory).stock, (family, keep)
        assert not read_manifest(directory).lineage.plans
    command = [sys.executable, "-c", READER, str(IDS.tolist()), *map(str, models)]
    subprocess.run(command, check=True, cwd=tmp_path)
    for directory, model in models.items():
        read = torch.load(f"{directory}.pt", weights_only=True).double()
        torch.testing.assert_close(read, logits(model, IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("family", "keep"), PLANNED)
def test_what_no_stock_config_can_express_is_saved_and_read(family, keep, tmp_path):
    model = pruned(family, **keep)
    saved = checkpoint.save(model, tmp_path / "small")
    assert not saved.stock
    again = osscar.load(tmp_path / "small")
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    twice = osscar.prune(again, tokens(), neurons=8, backend="magnitude", device="cpu").model
    checkpoint.save(twice, tmp_path / "smaller")
    torch.testing.assert_close(
        logits(osscar.load(tmp_path / "smaller"), IDS), logits(twice, IDS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_twice_can_be_saved(family, tmp_path):
    once = pruned(family, neurons="0.5")
    twice = osscar.prune(once, tokens(), neurons=8, backend="magnitude", device="cpu").model
    assert checkpoint.save(twice, tmp_path / "small").stock
    torch.testing.assert_close(
        logits(osscar.load(tmp_path / "small"), IDS), logits(twice, IDS), rtol=1e-5, atol=1e-5
    )


def test_weights_can_be_saved_in_half_precision(tmp_path):
    model = pruned("llama-gqa", neurons="0.5")
    full = checkpoint.save(model, tmp_path / "full")
    half = checkpoint.save(model, tmp_path / "half", dtype=torch.bfloat16)
    assert half.bytes < 0.6 * full.bytes
    assert osscar.load(tmp_path / "half").dtype == torch.bfloat16
    assert model.dtype == torch.float32


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("max_memory", [None, "6GB"])
def test_models_stored_in_half_precision_that_look_closely_can_be_saved(
    dtype, max_memory, tmp_path
):
    """Rotary frequencies are in no file; where they are rounded, sharp attention turns."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2560,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)
            layer.self_attn.k_proj.weight.mul_(40)
    model.bfloat16().save_pretrained(tmp_path / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, tmp_path / "dense" / file)
    loaded = osscar.load_model(tmp_path / "dense", dtype=dtype, max_memory=max_memory)
    result = osscar.prune(loaded.model, tokens(), neurons=0.5)
    result.save(tmp_path / "pruned")
    again = osscar.load(tmp_path / "pruned")
    assert all(layer.mlp.down_proj.in_features == 48 for layer in again.model.layers)


def test_places_that_must_not_be_replaced_or_cannot_be_written(tmp_path):
    (tmp_path / "precious").write_text("keep me")
    for place, match in (
        (tmp_path, "not empty"),
        (tmp_path / "precious", "is a file"),
        (tmp_path / "precious" / "model", "cannot write"),
    ):
        with pytest.raises(OutputError, match=match):
            checkpoint.save(pruned("opt", neurons="0.5"), place)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"precious": "keep me"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (EquivalenceError("differs"), EquivalenceError),
    ],
)
@pytest.mark.parametrize("place", ["save_pretrained", "rename"])
def test_a_failure_while_saving_leaves_the_old_directory_whole(
    failure, error, place, tmp_path, monkeypatch
):
    directory = tmp_path / "model"
    model = pruned("opt", neurons="0.5")
    checkpoint.save(model, directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*_args, **_kwargs):
        raise failure

    if place == "rename":
        monkeypatch.setattr("osscar.checkpoint.atomic_directory._swap", fail)
    else:
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    with pytest.raises(error):
        checkpoint.save(model, directory, overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    checkpoint.save(pruned("opt", heads="0.5"), directory, overwrite=True)
    assert not read_manifest(directory).stock
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_checkpoint_that_does_not_compute_the_same_is_not_put_in_place(tmp_path, monkeypatch):
    model = pruned("opt", heads="0.5")
    name, write = "model.decoder.layers.0.fc1.weight", checkpoint.write_tensors

    def spoil(file, tensors, *others):
        return write(file, {**tensors, name: tensors[name] + 0.1}, *others)

    monkeypatch.setattr(checkpoint, "write_tensors", spoil)
    with pytest.warns(UserWarning, match="only osscar.load"), pytest.raises(EquivalenceError):
        checkpoint.save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    directory = tmp_path_factory.mktemp("planned") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "any_shape_config", lambda model: None)  # as in other families
        checkpoint.save(pruned("opt", heads="0.5"), directory)
    return directory


@pytest.fixture
def directory(planned, tmp_path):
    return shutil.copytree(planned, tmp_path / "model")


def group(**change):
    return lambda lineage: lineage["plans"][0]["groups"][0].update(change)


def slot(**change):
    return lambda lineage: lineage["plans"][0]["groups"][0]["slots"][0].update(change)


def integer(module, attribute):
    found = {"module": module, "attribute": attribute, "value": 3}
    return lambda lineage: lineage["plans"][0].update(integers=[found])


NAMED = [
    (group(kept=[0, 99]), "does not have"),
    (group(kept=[0]), "do not fit"),
    (slot(inner=0), r"slots\.0.*inner"),
    (slot(offset=-1), r"slots\.0.*offset"),
    (slot(dim="0"), r"slots\.0.*dim"),
    (slot(tensor=3), r"slots\.0.*tensor"),
    (slot(tensor="nowhere.weight"), r"nowhere\.weight"),
    (slot(offset=99), "entries along dimension"),
]
HOSTILE = [
    lambda lineage: lineage.update(plans=json.loads("[" * 500 + "]" * 500)),
    *(group(kept=[kept]) for kept in (float("inf"), 10**30, "0", True)),
    *(group(**change) for change in ({"units": 10**6}, {"name": "\ud800"}, {"more": 1})),
    *(slot(tensor=name) for name in ("a._modules", "__class__.x")),
    slot(dim=2**31 - 1),
    *(integer("", name) for name in ("_modules", "__class__", "config")),
    integer("_modules", "x"),
    integer("model.decoder", "training"),
    integer("no.where", "x"),
    lambda lineage: lineage["origin"].update(library="pickle"),
    lambda lineage: lineage["origin"].update(options={"a": [1]}),
    lambda lineage: lineage.update(calibration=[{"source": 5}]),
    lambda lineage: lineage.update(preprocessing={"mean": [[1]]}),
    lambda lineage: lineage.pop("plans") and lineage.update(plans=None),
]


def test_a_hostile_manifest_is_an_error_of_ours(directory):
    file = directory / MANIFEST_FILE
    whole = file.read_text()
    for change, match in [*NAMED, *((change, None) for change in HOSTILE)]:
        content = json.loads(whole)
        change(content["lineage"])
        file.write_text(json.dumps(content))
        with pytest.raises(osscar.OsscarError, match=match):
            pytest.fail(f"{content['lineage']} was read: {osscar.load(directory)}")


def test_damaged_files_beside_it_are_errors_of_ours(directory):
    weights, config = directory / "model.safetensors", directory / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(FileError, match="cut off"):
        osscar.load(directory)
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(FileError, match=r"config\.json: it is not JSON"):
        osscar.load(directory)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        osscar.load(directory)


# ---- lineage -----------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("keep", [{"neurons": "0.5"}, {"heads": "0.5"}], ids=["stock", "listed"])
def test_everything_that_has_to_be_known_is_written_and_read_again(keep, tmp_path):
    loaded = osscar.load_model(tiny_model(tmp_path / "dense"), device="cpu")
    text = CALIBRATION.read_text()
    windows, others = (
        osscar.load_calibration([text], loaded.tokenizer, samples=4, seqlen=32, seed=seed)
        for seed in (0, 1)
    )
    result = osscar.prune(loaded.model, windows, backend="magnitude", device="cpu", **keep)
    saved = result.save(tmp_path / "small", tokenizer=loaded.tokenizer)
    lineage = lineage_of(osscar.load(saved.path))
    assert lineage.source == "directory dense"
    assert lineage.stored_dtype == str(loaded.stored_dtype).removeprefix("torch.")
    assert lineage.calibration == (Calibration.of(windows.describe()),)
    assert lineage.calibration[0].seen == windows.seen
    assert saved.stock == (lineage.plans == ())
    assert lineage.replayed == ()
    again = osscar.load_model(saved.path, device="cpu")
    assert lineage_of(again.model) == lineage
    assert lineage_of(copied(again.model)) == lineage
    assert again.stored_dtype == loaded.stored_dtype
    seen = [Calibration.of(one.describe()) for one in (windows, others)]
    for data, due in ((windows, seen[:1]), (others, seen)):  # none is ever scored
        twice = osscar.prune(again.model, data, neurons="0.7", backend="magnitude", device="cpu")
        assert [*lineage_of(twice.model).calibration] == due
    scored = osscar.load_text([text], loaded.tokenizer)
    with pytest.raises(DataError, match="about 100% of a list calibrated or recovered this model"):
        refuse_overlap(scored, lineage.calibration)
    refuse_overlap(osscar.load_text(HELD_OUT, loaded.tokenizer), lineage.calibration)


def test_nothing_of_a_report_is_believed(planned, directory):
    (directory / "osscar_report.json").write_text('{"schema": "osscar.prune/1", "classes": ["z"]}')
    assert lineage_of(osscar.load(directory)) == read_manifest(planned).lineage


def test_the_model_itself_can_be_saved_where_its_config_fits(tmp_path):
    model = pruned("llama-gqa", neurons="0.5")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again.eval(), IDS), logits(model, IDS))


def test_a_model_with_a_short_context_is_pruned_and_saved(tmp_path):
    config = GPT2Config(vocab_size=97, n_embd=48, n_layer=1, n_head=6, n_inner=40, n_positions=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    result = osscar.prune(model, tokens(4, 8), neurons=0.5, backend="magnitude", device="cpu")
    assert checkpoint.save(result.model, tmp_path / "small").path.is_dir()


def test_equal_models_are_equal_files(tmp_path):
    """safetensors draws the order in which it says what is shared."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "abcdef"})
    for name in "bcdef":
        model[name].weight = model["a"].weight
    for index in range(8):
        osscar.save(model, tmp_path / f"{index}")
    files = {(tmp_path / f"{index}" / "model.safetensors").read_bytes() for index in range(8)}
    assert len(files) == 1
