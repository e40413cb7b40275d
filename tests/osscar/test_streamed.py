"""Models whose weights stay on disk: pruned to the same bytes, refused where they cannot be."""

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import osscar
from benchmarks.measuring import measured
from benchmarks.random_models import SHAPES, write_model
from osscar.base import memory as system_memory
from osscar.base.errors import (
    CheckpointError,
    EquivalenceError,
    FileError,
    ModelError,
    NonFiniteError,
    OptionError,
    RequestError,
)
from osscar.base.inputs import parse_size
from osscar.base.memory import DeviceMemory, available_memory
from osscar.checkpoint import regrouped
from osscar.checkpoint.directory import save
from osscar.checkpoint.regrouped import parts_in_files
from osscar.evaluation.quality import score
from osscar.evaluation.speed import measure_forward
from osscar.models import load as loading
from osscar.models.load import fitting_memory
from osscar.models.names import DEMO_DIRECTORY
from osscar.network.tensor_files import check_written, write_tensors
from osscar.offload.on_disk import SMALL, OnDisk, is_on_disk, weight_cache
from osscar.offload.places import Chain, Place, Slice, Source, as_bytes
from osscar.offload.weight_cache import WeightCache
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.request import PruningRequest
from osscar.run.chain import prepare_for
from osscar.run.memory import MemoryNeeds
from osscar.run.points import BudgetKind, SweepJob, prune_points
from osscar.run.prune import prune_as_asked
from osscar.run.run_log import RunLog
from osscar.shrinking.shrink import shrink
from osscar.walk.sums import Sums
from osscar.walk.targets import Target
from osscar.walk.walk import walk
from tests.osscar.families import VOCABULARY, tiny
from tests.osscar.mixtures import MIXTURES, ROUTERS, mixture

PLENTY = "64GB"
CPU = torch.device("cpu")


def written(path, family, *, dtype=torch.float32, shards=None, layers=2):
    """Save a tiny model with a tokenizer; as several files of so many bytes, if that is said."""
    return stored(path, tiny(family, layers=layers).to(dtype), shards=shards)


def stored(path, model, *, shards=None):
    model.save_pretrained(path, **({} if shards is None else {"max_shard_size": shards}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_DIRECTORY / file, path / file)
    return path


def windows(samples=8, seqlen=24):
    return torch.randint(VOCABULARY, (samples, seqlen), generator=torch.Generator().manual_seed(1))


def pruned(path, max_memory, **asked):
    loaded = osscar.load_model(path, device="cpu", max_memory=max_memory)
    return osscar.prune(loaded.model, windows(), batch_size=3, backend="greedy", **asked)


def holding_nothing(loaded):
    """Let nothing that was read be kept: every operator reads its weights anew."""
    cache = weight_cache(loaded.model)
    cache.ceiling = 1
    with cache.leaving(0):
        return loaded


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("family", "dtype", "asked"),
    [
        ("opt", torch.float32, {"neurons": 0.5, "target": "weights"}),
        ("llama-gqa", torch.float32, {"sparsity": 0.4, "allocation": "measured"}),
        ("opt", torch.float32, {"heads": 0.5, "neurons": 0.7}),  # which its config cannot say
        ("llama-gqa", torch.bfloat16, {"heads": "2/3", "neurons": 0.5}),  # untied, with biases
        ("qwen2", torch.float16, {"sparsity": 0.3, "allocation": "uniform"}),  # tied
        ("gpt2", torch.float32, {"neurons": 0.5, "heads": 0.5}),  # transposed
    ],
)
def test_a_streamed_run_comes_to_the_same_bytes(tmp_path, family, dtype, asked):
    dense = written(tmp_path / "dense", family, dtype=dtype, shards="60KB")
    plain, streamed = pruned(dense, None, **asked), pruned(dense, PLENTY, **asked)
    assert is_on_disk(streamed.model)
    assert not is_on_disk(plain.model)
    assert streamed.plan == plain.plan
    assert [layer.loss for layer in streamed.layers] == [layer.loss for layer in plain.layers]
    assert streamed.divergence == plain.divergence
    assert streamed.certificate.error == plain.certificate.error
    assert streamed.save(tmp_path / "streamed").stock is plain.save(tmp_path / "plain").stock
    assert files(tmp_path / "streamed") == files(tmp_path / "plain")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", [*MIXTURES, *ROUTERS])
def test_a_mixture_whose_files_hold_experts_one_by_one_comes_to_the_same_bytes(tmp_path, family):
    """Neurons of all experts in the first layer, and an expert wherever one can leave."""
    dense = stored(tmp_path / "dense", mixture(family, vocab_size=VOCABULARY), shards="20KB")
    for name, limit in (("plain", None), ("streamed", PLENTY)):
        model = osscar.load_model(dense, device="cpu", max_memory=limit).model
        assert is_on_disk(model) == (limit is not None)
        with prepare(model, windows()) as prepared:
            neurons = next(g for g in prepared.groups if g.name.endswith("experts.neurons"))
            plans = [GroupPlan.of(neurons, tuple(range(0, neurons.units, 2)))]
            for one in prepared.routed:
                if one.group.prunable:
                    each = one.group.units // one.group.step
                    kept = (e for e in range(one.group.units) if e % each != 1)
                    plans.append(GroupPlan.of(one.group, tuple(kept)))
        shrink(model, PruningPlan(tuple(plans)), [{"input_ids": windows(2)}])
        save(model, tmp_path / name)
    written = [files(tmp_path / name) for name in ("plain", "streamed")]
    notes = [json.loads(one.pop("osscar.json")) for one in written]
    assert written[0] == written[1]
    for note in notes:  # how far outputs of the proof are apart may depend on where weights lie
        assert note["lineage"]["certificates"][0].pop("error") < 1e-5
    assert notes[0] == notes[1]


@pytest.mark.parametrize(
    "other",
    [
        lambda codes: codes.transpose(1, 2),
        lambda codes: codes.flip(1),
        lambda codes: codes[:3],
    ],
    ids=["transposed", "turned round", "incomplete"],
)
def test_parts_that_are_no_rows_in_a_row_are_not_read_as_such(other, monkeypatch):
    model, name = mixture("mixtral"), "model.layers.0.mlp.experts.down_proj"
    known = parts_in_files(model)
    assert [part.shape for part in known[name]] == [(32, 40)] * 4
    convert = regrouped.revert_weight_conversion

    def converted(model, state):
        return convert(model, {**state, name: other(state[name]).contiguous()})

    monkeypatch.setattr(regrouped, "revert_weight_conversion", converted)
    assert parts_in_files(model) == {n: parts for n, parts in known.items() if n != name}


def test_stretches_of_files_are_read_as_one(tmp_path):
    values = torch.arange(24, dtype=torch.int32)
    sources = []
    for number, part in enumerate((values[:5], values[5:6], values[6:])):
        (tmp_path / str(number)).write_bytes(b"head" + part.numpy().tobytes() + b"tail")
        sources.append((Source(tmp_path / str(number)), 4, part.nbytes))
    chain = Chain(sources)
    for begin, end in ((0, 24), (3, 9), (5, 6), (6, 24), (23, 24)):
        into = torch.zeros(end - begin, dtype=torch.int32)
        chain.read_into(as_bytes(into), 4 * begin)
        assert torch.equal(into, values[begin:end])


def test_no_weight_has_to_be_kept_in_memory(tmp_path):
    dense = written(tmp_path / "dense", "qwen2")
    loaded = osscar.load_model(dense, device="cpu", max_memory=PLENTY)
    expected = loaded.model(windows(2)).logits
    holding_nothing(loaded)
    before = weight_cache(loaded.model).read_bytes
    assert_close(loaded.model(windows(2)).logits, expected)
    read = weight_cache(loaded.model).read_bytes - before
    assert read >= (dense / "model.safetensors").stat().st_size * 0.9
    assert weight_cache(loaded.model).held_bytes < read / 4


def test_weights_that_were_tried_leave_the_dense_ones_where_they_lie(tmp_path):
    dense = written(tmp_path / "dense", "llama-gqa")
    model = osscar.load_model(dense, device="cpu", max_memory=PLENTY).model
    with prepare(model, windows(4)) as prepared:
        group = next(group for group in prepared.groups if group.prunable)
        places = {name: p.place for name, p in prepared.model.named_parameters()}
        for step in walk(prepared, [group], in_turn=False):
            (one,) = step.consumers
            found = one.read_weight()
            with step.tried([0.5 * found], range(group.units)):
                assert torch.equal(one.read_weight(), 0.5 * found)
            assert torch.equal(one.read_weight(), found)
        assert {name: p.place for name, p in prepared.model.named_parameters()} == places


def test_saving_leaves_room_for_the_passes_that_compare(tmp_path, monkeypatch):
    dense = written(tmp_path / "dense", "opt", layers=1)
    result = pruned(dense, PLENTY, heads=0.5, neurons=0.7)
    cache = weight_cache(result.model)
    monkeypatch.setattr(DeviceMemory, "held", lambda _: 10**9)
    cache.ceiling = 10**9 + (100 << 20)  # less than any pass is said to take
    result.save(tmp_path / "pruned")
    largest = max(parameter.nbytes for parameter in result.model.parameters())
    assert cache.held_bytes <= 2 * largest  # the last one read, in the format it was read in


def test_what_was_written_is_held_to_what_is_in_the_file(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    digests = write_tensors(file, tensors, {"format": "pt"})
    check_written(digests, file)
    assert all(map(torch.equal, load_file(file).values(), tensors.values()))
    with file.open("r+b") as out:
        out.seek(-1, os.SEEK_END)
        out.write(b"\1")
    with pytest.raises(EquivalenceError, match="'b' was not read back as it was written"):
        check_written(digests, file)


def test_a_pruned_checkpoint_streams_too(tmp_path):
    dense = written(tmp_path / "dense", "opt", layers=1)
    result = pruned(dense, None, heads=0.5, neurons=0.5)
    tokenizer = osscar.load_model(dense).tokenizer
    assert not result.save(tmp_path / "pruned", tokenizer=tokenizer).stock
    loaded = osscar.load_model(tmp_path / "pruned", device="cpu", max_memory=PLENTY)
    assert is_on_disk(loaded.model)
    with torch.no_grad():
        assert_close(loaded.model(windows(2)).logits, result.model(windows(2)).logits)


def test_a_run_that_was_in_memory_goes_on_from_disk(tmp_path):
    dense, log = written(tmp_path / "dense", "qwen2"), RunLog(tmp_path / "log")
    request = osscar.PruningRequest(neurons=0.5, backend="greedy")
    whole = prune_as_asked(osscar.load_model(dense, device="cpu").model, windows(), request, log)
    sorted(log.directory.glob("*.safetensors"))[-1].unlink()  # as if it had been killed before
    loaded = osscar.load_model(dense, device="cpu", max_memory=PLENTY)
    again = prune_as_asked(loaded.model, windows(), request, log)
    whole.save(tmp_path / "whole")
    again.save(tmp_path / "again")
    assert files(tmp_path / "whole") == files(tmp_path / "again")


@pytest.mark.slow
def test_the_process_stays_below_the_limit_for_a_model_above_it(tmp_path):
    shape = {**SHAPES["opt-1.3b"], "hidden_size": 256, "word_embed_proj_dim": 256}
    shape |= {"ffn_dim": 16384, "num_attention_heads": 4, "num_hidden_layers": 34}
    shape |= {"vocab_size": 4096}
    limit, dense = 1_100_000_000, tmp_path / "dense"
    assert write_model(dense, shape, "bfloat16") * 4 > limit
    options = ["--heads", "0.5", "--target", "weights", "--samples", "4", "--seqlen", "32"]
    options += ["--backend", "greedy", "--max-memory", f"{limit}"]
    command = [sys.executable, "-m", "osscar", "prune", str(dense), "--out", str(tmp_path / "out")]
    found = measured([*command, *options])
    assert found.status == 0
    assert found.peak <= limit


ONE_LAYER = """
import sys, torch
from transformers import AutoModelForCausalLM, OPTConfig
from osscar.run.groups import prune_groups
from osscar.network.tensor_files import check_written, write_tensors
from osscar.offload.on_disk import SMALL
from osscar.run.memory import MemoryNeeds
from osscar.run.chain import prepare_for
from osscar.request import PruningRequest

kind, width, ffn, backend, target, what = sys.argv[1:]
shape = {"hidden_size": int(width), "word_embed_proj_dim": int(width), "ffn_dim": int(ffn)}
shape |= {"num_attention_heads": int(width) // 64, "num_hidden_layers": 1, "vocab_size": 500}
model = AutoModelForCausalLM.from_config(OPTConfig(**shape)).eval()
request = PruningRequest(**{kind: 0.5}, backend=backend, target=target, batch_size=4)
with prepare_for(model, torch.randint(500, (8, 64)), request) as prepared:
    for batch in prepared.batches():
        prepared.model(**batch)
    room = MemoryNeeds.of(prepared, request, 1)
    if what == "solved":
        (group,) = (g for g in prepared.groups if g.prunable and g.kind == kind)
        prune_groups(prepared, {group.name: group.units // 2}, request, (), None)
print(room.matrices)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="no account of a single process")
@pytest.mark.parametrize(
    ("kind", "width", "ffn", "backend", "target"),
    [
        ("neurons", 512, 2048, "greedy", "residual"),
        ("heads", 2048, 256, "local_search", "weights"),
    ],
)
def test_one_layer_takes_no_more_than_is_said(kind, width, ffn, backend, target):
    """With samples that are held out, by which damping is chosen."""
    options = map(str, (kind, width, ffn, backend, target))
    command = [sys.executable, "-W", "ignore", "-c", ONE_LAYER, *options]
    before, after = measured([*command, "nothing"]), measured([*command, "solved"])
    assert before.status == after.status == 0
    said = int(after.output) - SMALL // 2  # of which half is for what is no matrix
    assert after.peak - before.peak <= said <= 2 * (after.peak - before.peak)


def test_room_is_made_before_sums_are_begun(tmp_path, monkeypatch):
    """Or Gram matrices come on top of weights that fill the memory up to the limit."""
    dense = written(tmp_path / "dense", "opt")
    loaded, begun = osscar.load_model(dense, device="cpu", max_memory=PLENTY), []
    cache, init = weight_cache(loaded.model), Sums.__init__

    def begin(self, linear_map, *, corrections):
        p, m = linear_map.rows, linear_map.outputs
        begun.append((cache.left_free, 8 * (p * (p + 1) // 2 + corrections * p * m)))
        init(self, linear_map, corrections=corrections)

    monkeypatch.setattr(Sums, "__init__", begin)
    asked = {"neurons": 0.5, "target": "residual", "backend": "greedy", "batch_size": 3}
    osscar.prune(loaded.model, windows(), **asked)
    assert len(begun) == 2 * len(loaded.model.model.decoder.layers)
    pass_alone = cache.left_free
    assert all(left >= pass_alone + needed for left, needed in begun)


@pytest.mark.filterwarnings("error:TypedStorage")
def test_a_log_holds_values_and_no_parameters_on_disk(tmp_path):
    dense, log = written(tmp_path / "dense", "opt", layers=1), RunLog(tmp_path / "log")
    loaded = osscar.load_model(dense, device="cpu", max_memory=PLENTY)
    request = PruningRequest(neurons=0.5, target="weights", backend="greedy", device="cpu")
    with log.held():
        prune_as_asked(loaded.model, windows(), request, log)
    for file in log.directory.glob("*.safetensors"):
        assert all(bool(tensor.any()) for tensor in load_file(file).values())


def test_weights_make_way_for_what_grows_while_none_is_read(monkeypatch):
    loaded = osscar.load_model(DEMO_DIRECTORY, device="cpu", max_memory=PLENTY)
    cache, ids = weight_cache(loaded.model), torch.zeros(1, 8, dtype=torch.int64)
    expected = loaded.model(ids).logits
    held, read = cache.held_bytes, cache.read_bytes
    embedding = loaded.model.get_input_embeddings().weight.nbytes  # of which rows are read
    monkeypatch.setattr(cache, "ceiling", cache.memory.held() + cache.left_free - held // 2)
    assert_close(loaded.model(ids).logits, expected)
    assert cache.held_bytes < held
    assert cache.read_bytes - read < held + embedding


def test_room_is_made_for_what_is_scored():
    loaded = osscar.load_model(DEMO_DIRECTORY, device="cpu", max_memory=PLENTY)
    model, free = loaded.model, []
    cache, before = weight_cache(model), weight_cache(model).left_free
    model.lm_head.register_forward_pre_hook(lambda *_: free.append(cache.left_free))
    text = "the quick brown fox " * 200
    score([model], osscar.load_text([text], loaded.tokenizer, windows=4, seqlen=64))
    measure_forward([model], {"input_ids": torch.zeros(4, 64, dtype=torch.int64)})
    assert min(free) >= 4 * 4 * 64 * model.config.vocab_size
    assert cache.left_free == before


# ---- files that are not what they were ---------------------------------------------------


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    dense = written(tmp_path / "dense", "opt")
    file = dense / "model.safetensors"
    loaded = holding_nothing(osscar.load_model(dense, device="cpu", max_memory=PLENTY))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(FileError, match=r"cut off|written to"):
        osscar.prune(loaded.model, windows(), neurons=0.5)
    with pytest.raises(FileError, match="cut off"):
        osscar.load_model(dense, device="cpu", max_memory=PLENTY)


def test_a_file_that_changes_between_two_reads_is_refused(tmp_path):
    dense = written(tmp_path / "dense", "opt")
    loaded = holding_nothing(osscar.load_model(dense, device="cpu", max_memory=PLENTY))
    with (dense / "model.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\0\1")
    with pytest.raises(FileError, match=r"model\.safetensors: it was written to since"):
        osscar.prune(loaded.model, windows(), neurons=0.5)


def test_a_missing_shard_is_refused_and_one_that_is_taken_away_later_is_still_there(tmp_path):
    dense = written(tmp_path / "dense", "llama-gqa", shards="60KB")
    loaded = holding_nothing(osscar.load_model(dense, device="cpu", max_memory=PLENTY))
    expected = loaded.model(windows(2)).logits
    for file in dense.glob("model-*.safetensors"):
        file.unlink()
    assert_close(loaded.model(windows(2)).logits, expected)
    with pytest.raises(FileError, match="cannot be read"):
        osscar.load_model(dense, device="cpu", max_memory=PLENTY)


def test_nonfinite_weights_are_named(tmp_path):
    model = tiny("opt")
    model.model.decoder.layers[1].fc1.weight.data[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.fc1\.weight"):
        osscar.load_model(tmp_path, device="cpu", max_memory=PLENTY)


def test_a_tied_weight_that_is_stored_twice_has_to_be_the_same(tmp_path):
    dense = written(tmp_path / "dense", "qwen2")
    tensors = load_file(dense / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, dense / "model.safetensors", {"format": "pt"})
    tied = osscar.load_model(dense, device="cpu", max_memory=PLENTY).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    save_file(
        {**tensors, "lm_head.weight": head + 1}, dense / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="ties"):
        osscar.load_model(dense, device="cpu", max_memory=PLENTY)


# ---- what cannot be done -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"speedup": 1.5}, "speedup="),
        ({"neurons": 0.5, "form": "exported"}, "form=exported"),
    ],
)
def test_what_needs_the_whole_model_is_refused(tmp_path, asked, named):
    with pytest.raises(RequestError, match=named):
        pruned(written(tmp_path / "dense", "opt"), PLENTY, **asked)


def swept(allocation):
    return SweepJob(allocation, BudgetKind.SPARSITY, 0.2), SweepJob(
        "wanda", BudgetKind.SPARSITY, 0.4
    )


def test_a_sweep_of_a_streamed_model_comes_to_the_same(tmp_path):
    dense = written(tmp_path / "dense", "opt", layers=1)
    base = PruningRequest(sparsity=0.2, allocation="uniform", backend="greedy", device="cpu")
    found = []
    for memory in (None, PLENTY):
        model = osscar.load_model(dense, device="cpu", max_memory=memory).model
        found.append(
            [result for _, result in prune_points(model, windows(), base, swept("uniform"))]
        )
    for plain, streamed in zip(*found, strict=True):
        assert is_on_disk(streamed.model)
        assert streamed.plan == plain.plan
        assert streamed.divergence == plain.divergence


def test_a_sweep_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("osscar.run.points.run_dense", None)
    base = PruningRequest(sparsity=0.2, allocation="uniform", device="cpu")
    dense = written(tmp_path / "dense", "opt")
    loaded = osscar.load_model(dense, device="cpu", max_memory="100MB")
    with pytest.raises(RequestError, match="out_proj"):
        next(prune_points(loaded.model, windows(), base, swept("uniform")))


def test_a_limit_of_a_few_bytes_is_told_as_it_was_given(tmp_path):
    message = r"max_memory=10B cannot hold .*B are the activations of all .* at least [\d.]+GB"
    with pytest.raises(RequestError, match=message):
        pruned(written(tmp_path / "dense", "opt"), "10", neurons=0.5)


def test_a_limit_that_cannot_hold_one_layer_says_what_would_do(tmp_path):
    dense = written(tmp_path / "dense", "opt", layers=1)
    with pytest.raises(RequestError, match="fc2") as refused:
        pruned(dense, "100MB", neurons=0.5)
    least = str(refused.value).partition("at least ")[2].split()[0]
    # The program may have grown meanwhile.
    assert pruned(dense, parse_size(least) + (1 << 28), neurons=0.5).loss > 0


def test_what_does_not_fit_stays_on_disk_by_default(tmp_path, monkeypatch):
    dense = written(tmp_path / "dense", "opt", dtype=torch.bfloat16)
    size = 2 * (dense / "model.safetensors").stat().st_size  # in float32
    for available, expected in ((5 * size, None), (3 * size, 3 * size * 9 // 10), (None, None)):
        monkeypatch.setattr(system_memory, "available_memory", lambda found=available: found)
        monkeypatch.setattr(loading, "resolve_device", lambda _: torch.device("cpu"))
        assert fitting_memory(dense) == expected
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 4,
        "MASTER_ADDR": "here",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(system_memory, "available_memory", lambda: 6 * size)
    for processes, expected in (("1", None), ("2", 3 * size * 9 // 10)):  # on this machine
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert fitting_memory(dense) == expected
    monkeypatch.setattr(system_memory, "available_memory", lambda: 1)
    assert fitting_memory("demo") is None
    (dense / "model.safetensors").write_bytes(b"no weights")
    assert fitting_memory(dense) is None


GROWN = """
import torch
from osscar.base.memory import DeviceMemory
from osscar.offload.weight_cache import WeightCache
WeightCache(1 << 40)
del (first := [torch.ones(4 << 20)])[:]  # from which the allocator learns what to keep
before, kept = DeviceMemory().held(), []
for _ in range(3):
    large = []
    for _ in range(20):
        large.append(torch.ones(4 << 20))
        kept.append(torch.ones(1 << 10))
    del large
print(DeviceMemory().held() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="allocators of others behave otherwise")
def test_what_is_freed_between_what_stays_is_not_kept_by_the_process():
    found = subprocess.run(
        [sys.executable, "-c", GROWN], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 32 << 20  # of 336 MB


def test_sizes_and_what_is_none():
    assert 1 << 20 < available_memory() < 1 << 60
    assert 1 << 20 < DeviceMemory().held() < 1 << 50
    told = {"8GB": 8 * 10**9, "1.5 MiB": 3 << 19, 4096: 4096, "10k": 10_000}
    assert {size: parse_size(size) for size in told} == told
    for size in ("", "8 bananas", "-1GB", "0", "1e99GB", True, 2.5, "nan"):
        with pytest.raises(OptionError, match="memory"):
            parse_size(size)


def test_a_model_that_is_no_directory_of_transformers_is_refused():
    with pytest.raises(OptionError, match="max_memory="):
        osscar.load_model("torchvision:resnet18", max_memory=PLENTY)


# ---- parameters on disk ------------------------------------------------------------------


@pytest.fixture
def parameter(tmp_path):
    values = torch.arange(12, dtype=torch.float32).view(3, 4)
    (tmp_path / "values").write_bytes(values.numpy().tobytes())
    place = Place.of(Slice(Source(tmp_path / "values"), 0, (3, 4), torch.float32, "w"))
    return OnDisk(place, WeightCache(1 << 40)), values


def test_it_is_a_parameter_to_whoever_asks(parameter):
    on_disk, values = parameter
    assert isinstance(on_disk, torch.nn.Parameter)
    for name in ("shape", "dtype", "device"):
        assert getattr(on_disk, name) == getattr(values, name)
    assert on_disk.cache.read_bytes == 0
    with torch.inference_mode():
        assert torch.equal(on_disk + 1, values + 1)
    assert torch.equal(on_disk @ values.T, values @ values.T)
    with torch.no_grad():
        with pytest.raises(ModelError, match=r"'w' of \(3, 4\)"):
            on_disk.data = values[:2]
        on_disk.data = values * 2
    assert torch.equal(on_disk + 0, values * 2)
    assert isinstance(on_disk.data, OnDisk)


def test_nothing_writes_to_it_in_place(parameter):
    on_disk, _ = parameter
    for write in (
        lambda: on_disk.mul_(2),
        lambda: on_disk.__setitem__(0, 1.0),
        lambda: torch.add(torch.ones(3, 4), 1, out=on_disk),
        lambda: torch.nn.init.zeros_(on_disk),
    ):
        with torch.no_grad(), pytest.raises(ModelError, match="max_memory="):
            write()


@pytest.mark.parametrize("left", [False, True])
def test_a_write_to_values_that_were_read_or_leave_memory_is_noticed(parameter, left):
    on_disk, _ = parameter
    on_disk.view(-1)[0] = 7.0
    on_disk.cache.ceiling = 1 if left else 1 << 40
    with pytest.raises(ModelError, match="writes to 'w'"):
        on_disk.cache.leave_free(0) if left else on_disk + 1


def test_a_format_that_held_all_values_and_back_is_no_step(parameter):
    on_disk, values = parameter
    assert on_disk.double().float().place == on_disk.place
    some = on_disk.double().index_select(1, torch.tensor([0, 2])).float()
    assert len(some.place.steps) == 1
    assert torch.equal(some + 0, values[:, [0, 2]])
    assert on_disk.half().float().place.steps == (torch.float16, torch.float32)


def test_looking_tokens_up_reads_their_rows_alone(parameter, tmp_path):
    on_disk, values = parameter
    tokens = torch.tensor([[2, 0], [2, 2]])
    assert torch.equal(nn.functional.embedding(tokens, on_disk), values[tokens])
    assert torch.equal(nn.functional.embedding(tokens, on_disk.double()), values[tokens].double())
    assert (on_disk.cache.read_bytes, on_disk.cache.held_bytes) == (2 * 2 * 16, 0)
    narrow = on_disk.index_select(1, torch.tensor([1, 3]))
    assert torch.equal(nn.functional.embedding(tokens, narrow), values[:, [1, 3]][tokens])
    for missing in (3, -1):
        with pytest.raises(IndexError):
            nn.functional.embedding(tokens + missing, on_disk)
    with (tmp_path / "values").open("r+b") as file:
        file.write(b"\1")
    on_disk.cache.ceiling = 1
    with on_disk.cache.leaving(0), pytest.raises(FileError, match="it was written to"):
        nn.functional.embedding(tokens, on_disk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_hold_what_is_forecast(dtype):
    def held():
        storages = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in gc.get_objects()
            if type(x) is torch.Tensor and x.is_floating_point() and not x.is_meta
        }
        return sum(storages.values())

    request = osscar.PruningRequest(neurons=0.5, device="cpu")
    with prepare_for(tiny("llama-gqa").to(dtype), windows(32, 64), request) as prepared:
        groups = [group for group in prepared.groups if group.kind == "neurons"]
        forecast = MemoryNeeds.of(prepared, request, 0).batches
        before = held()
        found = [held() - before for _ in walk(prepared, groups, target=Target.RESIDUAL)]
    assert max(found) <= forecast <= 1.5 * max(found)


def test_room_counts_what_a_layer_reads(tmp_path):
    loaded = osscar.load_model(written(tmp_path / "d", "opt"), device="cpu", max_memory=PLENTY)
    request = osscar.PruningRequest(neurons=0.5)
    with prepare_for(loaded.model, windows(), request) as prepared:
        few = MemoryNeeds.of(prepared, request, 1)
    with prepare_for(loaded.model, windows(16), request) as prepared:
        many = MemoryNeeds.of(prepared, request, 1)
    assert any("with its 40 inputs" in part for part in few.parts)
    assert many.batches > few.batches
    assert many.matrices == few.matrices
