"""Networks of tokens as people write their own: from training to ONNX Runtime, and what is told."""

import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import osscar
from osscar.data.samples import TensorSet
from osscar.evaluation.tables import dense_facts
from osscar.network.operations import count_flops
from osscar.proof.plan import Form
from tests.osscar import gpts

MAGNITUDE = {"backend": "magnitude", "device": "cpu"}
KERNELS = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)


# ---- one kernel of attention or another ---------------------------------------------------


def _of_attention(contiguous):
    torch.manual_seed(0)
    build = lambda config: gpts.Fused(config, contiguous)  # noqa: E731
    return gpts.GPT(gpts.Config(), build, last_alone=True).eval()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kernel", "contiguous"),
    [
        (SDPBackend.MATH, True),
        (SDPBackend.FLASH_ATTENTION, True),
        (SDPBackend.FLASH_ATTENTION, False),
    ],
)
def test_what_one_kernel_traces_another_runs(kernel, contiguous, tmp_path):
    """Kernels differ in strides: what one returns need not be copied before a view, or must be."""
    model, idx = _of_attention(contiguous), gpts.drawn(["idx"], 48, 0)[0]["idx"]
    with sdpa_kernel(kernel):
        result = osscar.prune(model, idx, heads=0.5, neurons=0.5, form="exported", **MAGNITUDE)
        archive = osscar.export_pt2(result.model, tmp_path / "smaller.pt2")
        result.save(tmp_path / "smaller")
        again = osscar.load(tmp_path / "smaller", dense=model)
    found, counts = [], set()
    for other in KERNELS:
        with sdpa_kernel(other), torch.no_grad():
            programs = (result.model, again, torch.export.load(archive.path).module())
            found += [program(idx=idx[:2])[0] for program in programs]
            counts.add(count_flops(result.model, {"idx": idx}))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    assert len(counts) == 1


def test_fused_attention_counts_as_its_products_do():
    q, k = torch.randn(2, 8, 5, 4), torch.randn(2, 2, 7, 4)

    class Attention(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Attention()(q, k)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = count_flops(Attention(), {"q": q, "k": k})
    assert fused == counter.get_total_flops() == 2 * 2 * 8 * 5 * 7 * (4 + 4)


# ---- from training to ONNX Runtime --------------------------------------------------------


def _trained(build):
    """Return a network after a few steps of training, and the names of what it reads."""
    torch.manual_seed(0)
    model, example = build()
    takes = {**example, "targets": None}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(40):
        inputs, _ = gpts.drawn(takes, 64, step)
        optimizer.zero_grad()
        model(**inputs)[1].backward()
        optimizer.step()
    return model.eval(), list(example)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("nano_with_targets", gpts.LENGTH),
        ("nano", 1),
        ("mini", gpts.LENGTH),
        ("translator", gpts.LENGTH),
    ],
)
def test_from_training_to_onnx_runtime(name, positions, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, reads = _trained(getattr(gpts, name))
    torch.save(model.state_dict(), "net.pt")
    for file, seed in (("train", 100), ("more", 101), ("test", 102)):
        inputs, labels = gpts.drawn(reads, 256 if file == "more" else 64, seed)
        np.savez(f"{file}.npz", labels=labels, **inputs)
    spec = f"{gpts.__file__}:{name}"
    weights = ("--weights", "net.pt")

    def command(*words):
        status, out, err = run(*words)
        assert status == 0, err
        assert "warning" not in err
        return out

    out = command(
        "prune", spec, *weights, "--flops", "0.5", "--calibration", "train.npz", "--out", "small"
    )
    assert "top-1" in out.partition("loss by layer")[0]
    report = json.loads((tmp_path / "small" / "osscar_report.json").read_text())
    (limit,) = report["budget"]["limits"]
    assert limit["reached"] <= 0.5 * limit["dense"]
    assert report["budget"]["measured"]
    assert report["forward"]["pruned"]["flops"] == limit["reached"]
    assert 0 < report["divergence"] < 1

    def quality(directory):
        asked = ("--inputs", "test.npz", "--dense", spec, *weights, "--json", "eval.json")
        command("eval", directory, *asked)
        found = json.loads((tmp_path / "eval.json").read_text())
        return found["dense"]["quality"], found["model"]["quality"]

    dense, pruned = quality("small")
    with torch.no_grad():
        inputs, labels = gpts.drawn(reads, 64, 102)
        scores, labels = model(**inputs)[0], labels[:, -positions:]
    assert scores.shape == (64, positions, gpts.TOKENS)
    surprise = nn.functional.cross_entropy(scores.flatten(0, 1).double(), labels.flatten())
    assert dense["predictions"] == pruned["predictions"] == labels.numel()
    assert dense["top1"] == float((scores.argmax(-1) == labels).double().mean())
    assert dense["perplexity"] == pytest.approx(float(surprise.exp()), rel=1e-6)
    assert pruned["kl"] > 0

    training = ("--steps", "8", "--batch-size", "32", "--learning-rate", "0.0003")
    data = ("--inputs", "more.npz", "--out", "recovered")
    command("recover", "small", "--dense", spec, *weights, *data, *training)
    recovery = json.loads((tmp_path / "recovered" / "osscar_report.json").read_text())["recovery"]
    assert recovery["measure"] == "nats"
    assert recovery["after"] < recovery["before"]

    command("export", "recovered", "--format", "onnx", "--dense", spec)
    small = osscar.load("recovered", dense=model)
    session = onnxruntime.InferenceSession("recovered.onnx", providers=["CPUExecutionProvider"])
    for count in (2, 5):
        inputs, _ = gpts.drawn(reads, count, 103)
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        expected = [one for one in small(**inputs) if one is not None]
        for one, due in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), due.detach(), rtol=1e-4, atol=1e-5)


def test_tokens_without_labels_are_pruned_and_what_is_not_known_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("train.npz", **gpts.drawn(["idx"], 32, 0)[0])
    asked = ("--flops", "0.6", "--calibration", "train.npz", "--out", "small", "--device", "cpu")
    status, out, err = run("prune", f"{gpts.__file__}:nano", *asked)
    assert status == 0, err
    words = " ".join(out.split())
    assert "measured distance: none: no output is known to be scores of classes" in words
    assert not re.search(r"\b1 of 64\b", words)


def test_modules_become_smaller_where_a_budget_takes_nothing_that_only_the_program_can_lose():
    torch.manual_seed(0)
    model, _ = gpts.nano()
    inputs, labels = gpts.drawn(["idx"], 32, 0)
    few, many = (osscar.prune(model, inputs, flops=left, device="cpu") for left in (0.9, 0.5))
    assert [group.kind for group in few.plan.groups] == ["neurons"]
    assert few.form is Form.EAGER
    assert few.model(inputs["idx"], labels)[1] is not None  # by the network's own code
    assert "heads" in {group.kind for group in many.plan.groups}
    assert many.form is Form.EXPORTED


def test_of_labels_of_a_window_it_is_said_that_the_last_alone_is_scored():
    inputs, labels = gpts.drawn(["idx", "targets"], 8, 0)
    whole = "8 labelled calibration samples"
    for reads, words in (
        (["idx"], f"of {whole}, at the last of 10 labels each"),
        (["idx", "targets"], f"of 80 predictions in {whole}"),
    ):
        data = TensorSet("tokens", {name: inputs[name] for name in reads}, labels)
        score = osscar.score_dense(gpts.nano()[0].eval(), data)
        assert dict(dense_facts(vars(score)))["dense model"].endswith(words)
