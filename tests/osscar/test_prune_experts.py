"""Whole experts leave: losses are what is told, the rest is refitted, proved, saved and read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

import osscar
from osscar.allocation.widths import count_kept
from osscar.base.errors import RequestError
from osscar.experts import step
from osscar.experts.find import mixtures_in
from osscar.experts.routers import routed_among
from osscar.experts.step import ExpertStep
from osscar.request import PruningRequest, parse_keep
from osscar.walk.layer_step import LayerStep
from solvers import BackendError
from tests.osscar.families import framing_tokenizer, tokens
from tests.osscar.mixtures import MIXTURES, mixture

FAMILIES = {
    "mixtral": 3,
    "olmoe": 3,
    "qwen3-moe": 2,
    "deepseek-v3": 3,
    "deepseek-v2-groups": 4,
    "deepseek-v3-groups": 10,
    "gpt-oss": 3,
    "granitemoe": 2,
}
"""What each keeps: of 4 experts, of 8 in four groups, and of 12 in two."""

ALL = {"damp": 0.3, "correction_weight": 1.0}
"""With these, no sample is held out, and every weight is fitted to all of them."""


pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*since a refit did worse on held-out samples:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*the Gram matrix is rank-deficient:UserWarning"),
]
"""Tiny models have few samples, and are told so."""


def outputs_of(model, name):
    """Return what a module reads and puts out on the calibration data."""
    seen = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, x, y: seen.append((x, y)))
    with hook, torch.no_grad():
        model(input_ids=tokens())
    return seen[0]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_leave_and_what_is_saved_is_read_by_transformers(family, tmp_path):
    model, kept = mixture(family), FAMILIES[family]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = osscar.prune(model, tokens(), experts=kept)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert result.certificate.error < 1e-5
    assert [(one.kind, one.kept, len(one.support)) for one in result.layers] == [
        ("experts", kept, kept)
    ] * 2
    assert all(one.status == "SWAP_OPTIMAL" for one in result.layers)
    assert all(one.refitted_loss <= 1.001 * one.relative_loss for one in result.layers)
    each = sum(one.group.removable for one in mixtures_of(model))
    units = mixtures_of(model)[0].group.units
    assert result.parameters_before - result.parameters_after == (units - kept) * each
    saved = result.save(tmp_path / "smaller")
    assert saved.stock
    plain = hf.AutoModelForCausalLM.from_pretrained(saved.path)
    with torch.no_grad():
        expected = result.model(input_ids=tokens()).logits
        assert_close(plain(input_ids=tokens()).logits, expected)
        assert_close(osscar.load(saved.path)(input_ids=tokens()).logits, expected)


def mixtures_of(model):
    """Return the mixtures of a model."""
    with torch.no_grad():
        return mixtures_in(model, {"input_ids": tokens()[:2]})


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("family", "target"),
    [("mixtral", "weights"), ("olmoe", "residual"), ("deepseek-v3", "weights")],
)
def test_losses_are_those_of_the_model_itself(family, target):
    """That of the first mixture, before which nothing changes: by its own outputs."""
    model = mixture(family)
    (first, _), name = mixtures_of(model), "model.layers.0.mlp.experts"
    _, y = outputs_of(model, name)

    def lost(other):
        _, found = outputs_of(other, name)
        return float((found - y).double().square().sum() / y.double().square().sum())

    def among(kept):
        with routed_among(model, {first.router: (kept, 4)}):
            return lost(model)

    result = osscar.prune(model, tokens(), experts=0.5, target=target, backend="enumerate", **ALL)
    report = result.layers[0]
    sets = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    losses = {kept: among(kept) for kept in sets}
    assert report.relative_loss == pytest.approx(losses[report.support], rel=1e-4)
    assert report.relative_loss == pytest.approx(min(losses.values()), rel=1e-4)
    assert report.status == "OPTIMAL"
    assert report.refitted_loss == pytest.approx(lost(result.model), rel=1e-4)
    assert report.refitted_loss < 0.95 * report.relative_loss


def test_few_tokens_choose_and_all_of_them_tell_what_is_lost(monkeypatch):
    """Tokens are drawn, at any position, and losses before and after are of the same ones."""
    monkeypatch.setattr(step, "MOST_TOKENS", 40)
    drawn, draw = [], ExpertStep._drawn
    monkeypatch.setattr(ExpertStep, "_drawn", lambda step: drawn.append(draw(step)) or drawn[-1])
    model, name = mixture("mixtral"), "model.layers.0.mlp.experts"
    result = osscar.prune(model, tokens(), experts=0.5, target="weights", batch_size=2, **ALL)
    rows = [row for batch in drawn[0].values() for row in batch.tolist()]
    assert [one.choosing for one in result.layers] == [len(rows), len(rows)] == [40, 40]
    assert len({row % tokens().shape[1] for row in rows}) > 15
    _, y = outputs_of(model, name)
    with routed_among(model, {mixtures_of(model)[0].router: (result.layers[0].support, 4)}):
        _, found = outputs_of(model, name)
    lost = float((found - y).double().square().sum() / y.double().square().sum())
    assert result.layers[0].relative_loss == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("samples", [3, 16])
def test_refits_that_are_worse_together_are_left_away(samples, monkeypatch):
    """With and without samples held out; each expert alone has passed its own check."""
    refits = LayerStep.refits

    def overshooting(step, *given):
        found = refits(step, *given)
        return dataclasses.replace(found, weights=tuple(3 * W for W in found.weights))

    monkeypatch.setattr(LayerStep, "refits", overshooting)
    model = mixture("mixtral")
    with pytest.warns(UserWarning, match="keep their dense weights"):
        result = osscar.prune(model, tokens(samples), experts=3)
    dense, smaller = model.state_dict(), result.model.state_dict()
    for one in result.layers:
        assert one.refitted_loss == one.relative_loss
        assert len(one.unrefitted) == 3
        kept = dense[f"{one.name}.down_proj"][list(one.support)]
        assert torch.equal(smaller[f"{one.name}.down_proj"], kept)


@pytest.mark.parametrize(("asked", "kept"), [("5/8", 3), (0.7, 3), (0.5, 2)])
def test_shares_of_experts_are_rounded_as_those_of_units_are(asked, kept):
    """Half an expert rounds up: 5/8 of 4."""
    group = mixtures_of(mixture("mixtral"))[0].group
    assert count_kept(group, parse_keep(asked), round_to=8) == kept


def test_where_experts_lie_in_groups_it_is_told_what_can_stay():
    model = mixture("deepseek-v2-groups")
    with pytest.raises(RequestError, match="it can keep 4 or 8, as many in each of 4 groups"):
        osscar.prune(model, tokens(), experts=0.75)


def test_held_out_samples_serve_experts_whatever_the_target():
    asked = {"damp": 0.3, "target": "weights"}
    assert PruningRequest(experts=3, **asked).holds_out
    assert not PruningRequest(neurons=3, **asked).holds_out


def test_later_mixtures_see_what_earlier_ones_have_left():
    """The second is to put out what the stream behind it lacks, as the first has shaped it."""
    model = mixture("mixtral")
    second, behind = "model.layers.1.mlp.experts", "model.layers.1"
    _, dense = outputs_of(model, behind)
    result = osscar.prune(model, tokens(), experts=3, target="residual", **ALL)
    _, found = outputs_of(result.model, second)
    lacking = (dense - outputs_of(result.model, behind)[1]).double().flatten(0, 1)
    error = lacking.square().sum() / (found + lacking).square().sum()
    assert result.layers[1].refitted_loss == pytest.approx(float(error), rel=1e-3)
    assert result.divergence > 0


def test_experts_that_no_token_reaches_are_named_and_leave():
    model = mixture("gpt-oss")
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.router.bias[1] = -1e3 / 8
    with pytest.warns(UserWarning, match="no calibration token is sent to 1 expert of"):
        result = osscar.prune(model, tokens(), experts=3)
    assert [one.support for one in result.layers] == [(0, 2, 3)] * 2
    assert [one.dead for one in result.layers] == [1, 1]
    assert max(one.relative_loss for one in result.layers[:1]) < 1e-9


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"experts": 0.75, "speedup": 1.5}, "does not go with experts; give params or size"),
        ({"experts": 0.75, "certify": True}, "certify= does not go with experts alone"),
        ({"experts": 0.75, "round_to": 8}, "round_to= does not go with experts alone"),
        ({"experts": 0.75, "neurons": 0.5, "form": "exported"}, "form 'exported' does not go"),
        (
            {"experts": 0.75, "allocation": "uniform"},
            "allocation is uniform, which is for a budget",
        ),
        ({"experts": 1}, "'model.layers.0.mlp.experts' would keep 1 of its 4 .* needs 2 at least"),
        ({"experts": 5}, "would keep 5 of its 4"),
        ({"experts": 0.9}, "nothing would be removed: .* of the 4 of .* can keep 2 to 4"),
        ({"experts": 2, "skip": ["none"]}, "no group is called 'none'"),
        ({"experts": 2, "skip": ["*"]}, "every group but the .* that are skipped keeps all"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked, message):
    with pytest.raises(RequestError, match=message):
        osscar.prune(mixture("mixtral"), tokens(), **asked)


def test_backends_are_those_that_choose_experts():
    assert PruningRequest(experts=2, backend="reap").chosen_expert_backend()
    with pytest.raises(BackendError, match="choose from enumerate, frequency"):
        PruningRequest(experts=2, backend="wanda")
    with pytest.raises(BackendError, match="there is no backend 'reap'"):
        PruningRequest(neurons=2, backend="reap")
    with pytest.raises(RequestError, match="not estimated"):
        osscar.estimate(mixture("mixtral"), tokens(), experts=2)


def test_models_whose_experts_stay_are_told():
    with pytest.raises(RequestError, match=r"cannot be pruned: the router .* sends tokens"):
        osscar.prune(mixture("phimoe"), tokens(), experts=2)
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RequestError, match="this model has no group of experts"):
        osscar.prune(plain, torch.randn(4, 4), experts=2)


def test_the_command_line_prunes_experts(run, tmp_path):
    kind, values = MIXTURES["mixtral"]
    tokenizer = framing_tokenizer()
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(kind(**{**values, "vocab_size": len(tokenizer)}))
    model.save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 60)
    out = tmp_path / "smaller"
    status, said, err = run(
        "prune", tmp_path / "mixtral", "--calibration", text, "--samples", "8", "--seqlen", "16",
        "--experts", "0.75", "--backend", "greedy", "--out", out,
    )  # fmt: skip
    assert status == 0, err
    report = json.loads((out / "osscar_report.json").read_text())
    assert report["settings"]["experts"] == "0.75"
    assert [(one["kind"], one["kept"], one["backend"]) for one in report["layers"]] == [
        ("experts", 3, "Greedy")
    ] * 2
    assert all(one["refitted_loss"] is not None for one in report["layers"])
    assert "refitted" in said + err
    page = (out / "report.html").read_text()
    assert "refitted" in page
    assert "of experts that of the output of the mixture" in page
    assert hf.AutoModelForCausalLM.from_pretrained(out).config.num_local_experts == 3
