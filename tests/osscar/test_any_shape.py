"""Checkpoints of any shape: read by transformers alone, in a process without this project."""

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import graph
import osscar
from osscar.checkpoint import directory as checkpoint
from osscar.checkpoint import hf_config, modeling_pruned
from osscar.checkpoint.files import read_manifest
from osscar.checkpoint.hf_config import MODELLING_FILE, _config_changes
from osscar.checkpoint.streamed import read_streamed
from osscar.offload.places import WeightCache
from osscar.proof.plan import GroupPlan, PruningPlan
from tests.osscar.families import FAMILIES, logits, tiny, tokens

IDS = tokens(2)
KINDS = ("opt", "gpt2", "llama-gqa")
"""Tied, of transposed matrices, and with groups of heads."""

HEADS = {"opt": "model.decoder.layers.0.self_attn.heads", "gpt2": "transformer.h.0.attn.heads"}
NEURONS = {"opt": "model.decoder.layers.1.neurons", "gpt2": "transformer.h.1.mlp.neurons"}


def uneven(family):
    """A model one layer of which loses heads, and the other one neurons."""
    model, inputs = tiny(family), {"input_ids": IDS}
    found = graph.trace(model, inputs)
    keep = (
        (NEURONS.get(family, "model.layers.1.mlp.neurons"), range(10)),
        (HEADS.get(family, "model.layers.0.self_attn.heads"), (0, 2)),
    )
    plan = PruningPlan(tuple(GroupPlan.of(found.group(name), tuple(of)) for name, of in keep))
    osscar.shrink(model, plan, [inputs])
    return model


READER = """
import sys
for name in ("osscar", "graph", "solvers"):
    sys.modules[name] = None  # as if it were not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM

ids = torch.tensor(eval(sys.argv[1]))
options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
with torch.no_grad():
    for directory in sys.argv[2:]:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        found = {"logits": model(input_ids=ids).logits, "tokens": model.generate(ids, **options)}
        static = model.generate(ids, **options, cache_implementation="static")
        assert torch.equal(static, found["tokens"])
        inner = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
        own = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(inner(input_ids=ids).last_hidden_state, own)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(input_ids=ids).logits, found["logits"])
        model.save_pretrained(directory + "-again")
        again = AutoModelForCausalLM.from_pretrained(directory + "-again", trust_remote_code=True)
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, found["logits"])
        torch.save(found, directory + ".pt")
"""


class Written(dict):
    """Each family's uneven model, and where it was saved, once somebody asks for it."""

    def __init__(self, place):
        self.place = place

    def __missing__(self, family):
        model = uneven(family)
        saved = checkpoint.save(model, self.place / family)
        assert (saved.stock, saved.with_code) == (False, True)
        self[family] = model, saved.path
        return self[family]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("any-shape"))


@pytest.fixture(scope="module")
def read(written, tmp_path_factory):
    """The same, when another process has read all of them."""
    place = tmp_path_factory.mktemp("read")
    directories = [str(written[family][1]) for family in FAMILIES]
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
    command = [sys.executable, "-c", READER, str(IDS.tolist()), *directories]
    subprocess.run(command, check=True, env=environment, cwd=place)
    return written


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_reads_and_generates_the_same(family, read):
    model, path = read[family]
    found = torch.load(f"{path}.pt", weights_only=True)
    torch.testing.assert_close(found["logits"].double(), logits(model, IDS), rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(found["tokens"], model.generate(IDS, **options))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", KINDS)
def test_the_shapes_are_read_here_and_the_code_never_run(family, written, tmp_path):
    model, path = written[family]
    directory = tmp_path / "model"
    shutil.copytree(path, directory)
    (directory / MODELLING_FILE.name).write_text("raise SystemExit('this was run')\n")
    again = osscar.load(directory)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)
    assert type(again) is getattr(modeling_pruned, type(model).__name__)
    groups = [g for g in graph.trace(again, {"input_ids": IDS}).prunable if g.kind == "neurons"]
    plan = PruningPlan(tuple(GroupPlan.of(group, tuple(range(8))) for group in groups))
    osscar.shrink(again, plan, [{"input_ids": IDS}])
    saved = checkpoint.save(again, directory, overwrite=True)
    assert saved.with_code
    lineage = read_manifest(saved.path).lineage
    assert (len(lineage.plans), lineage.listed) == (2, 2)
    read = type(again).from_pretrained(directory).eval()
    torch.testing.assert_close(logits(read, IDS), logits(again, IDS), rtol=1e-5, atol=1e-5)


def test_transformers_warns_of_nothing_and_the_config_names_no_family(written, tmp_path):
    """By the name of a family it would be built in one width."""
    handler = logging.Handler()
    handler.emit = lambda record: pytest.fail(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        model, path = written["llama-gqa"]
        config = json.loads((path / "config.json").read_text())
        assert not {"model_type", "per_layer_config"} & config.keys()
        assert config["auto_map"]["AutoConfig"] == "modeling_pruned.LlamaConfig"
        read = by_transformers(path).eval()
        assert read.config.model_type == model.config.model_type
        torch.testing.assert_close(logits(read, IDS), logits(model, IDS))
        read.save_pretrained(tmp_path)
        again = json.loads((tmp_path / "config.json").read_text())
        assert not {"model_type", "per_layer_config"} & again.keys()
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def by_transformers(path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


def test_nothing_but_whole_numbers_that_are_there_is_changed():
    model, path = tiny("llama-gqa"), "model.layers.0.self_attn"
    module = model.model.layers[0].self_attn
    for numbers, named in (({"scaling": 9.0}, r"scaling = 9\.0"), ({"forward": 3}, "forward = 3")):
        with pytest.raises(ValueError, match=named):
            modeling_pruned.resize(model, {"tensors": {}, "numbers": {path: numbers}})
    shapes = {"tensors": {"model.layers.9.mlp.up_proj.weight": [4, 4]}, "numbers": {}}
    with pytest.raises(KeyError, match=r"model\.layers\.9\.mlp"):
        modeling_pruned.resize(model, shapes)
    numbers = {"layer_idx": 7, "config": {"hidden_size": 5}}
    modeling_pruned.resize(model, {"tensors": {}, "numbers": {path: numbers}})
    assert (module.layer_idx, module.config.hidden_size) == (7, 5)
    assert model.config.hidden_size != 5
    for tensor, refused in (("self_attn.q_proj", True), ("mlp.up_proj", False)):
        shapes = {"tensors": {f"model.layers.0.{tensor}.weight": [4, 4]}}
        config = SimpleNamespace(_attn_implementation="vllm", osscar_shapes=shapes)
        with pytest.raises(ValueError, match="has lost heads") if refused else nullcontext():
            modeling_pruned.refuse_one_count(model, config)


def test_where_transformers_would_compute_something_else_there_is_a_plan_alone(
    tmp_path, monkeypatch
):
    model = uneven("llama-gqa")

    def other(model):
        config = hf_config.any_shape_config(model)
        config.osscar_shapes["numbers"].setdefault("model.layers.0.self_attn", {})["scaling"] = 9.0
        return config

    monkeypatch.setattr(checkpoint, "any_shape_config", other)
    with pytest.warns(UserWarning, match=r"only osscar\.load will read"):
        saved = checkpoint.save(model, tmp_path / "small")
    assert not saved.with_code
    assert not (saved.path / MODELLING_FILE.name).exists()
    assert MODELLING_FILE.name not in read_manifest(saved.path).files
    config = json.loads((saved.path / "config.json").read_text())
    assert not {"auto_map", "osscar_shapes", "per_layer_config"} & config.keys()
    torch.testing.assert_close(logits(osscar.load(saved.path), IDS), logits(model, IDS))


# ---- saved by transformers ---------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", KINDS)
def test_what_was_trained_and_saved_by_transformers_is_read(family, written, tmp_path):
    model = by_transformers(written[family][1])
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.eval()
    model.save_pretrained(tmp_path / "tuned")
    found = by_transformers(tmp_path / "tuned").eval()
    torch.testing.assert_close(logits(found, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)
    (tmp_path / "tuned" / MODELLING_FILE.name).write_text("raise SystemExit('this was run')\n")
    cache = WeightCache(10**9, torch.device("cpu"))
    for read in (osscar.load, lambda path: read_streamed(path, cache)):
        with pytest.warns(UserWarning, match=r"no osscar\.json, .* not refused as test data"):
            found = read(tmp_path / "tuned")
        torch.testing.assert_close(logits(found, IDS), logits(model, IDS), rtol=1e-5, atol=1e-5)


def test_a_config_may_say_a_width_for_each_layer():
    config = PreTrainedConfig(intermediate_size=[40, 40, 24])
    kept = (0, 3, 7)
    groups = [GroupPlan(f"{layer}", graph.UnitKind.NEURONS, 40, kept, ()) for layer in (0, 1)]
    changes = _config_changes(config, [PruningPlan((group,)) for group in groups])
    assert changes == {"intermediate_size": [3, 3, 24]}


def test_layers_with_head_fields_of_their_own_are_left_as_they_are():
    """Of such fields transformers refuses to tell what the whole model has."""
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=8, intermediate_size=40)
    config.per_layer_config = {0: {"num_attention_heads": 4}}
    kinds = (graph.UnitKind.HEADS, 8), (graph.UnitKind.NEURONS, 40)
    heads, neurons = (PruningPlan((GroupPlan("x", kind, n, (0, 1), ()),)) for kind, n in kinds)
    assert _config_changes(config, [heads]) is None
    assert _config_changes(config, [neurons]) == {"intermediate_size": 2}
