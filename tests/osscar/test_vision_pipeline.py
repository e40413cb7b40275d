"""The pipeline on a network that reads images: what it removes, proves and re-estimates."""

import copy

import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import NonFiniteError, RequestError
from osscar.data.batches import as_inputs
from osscar.proof.plan import PruningPlan
from osscar.walk.batch_norm import dense_statistics, renew_statistics
from tests.osscar.masked import masked
from tests.osscar.networks import images, small_net

PLAIN = {"device": "cpu", "batch_size": 32}
KEEP = {**PLAIN, "batch_norm": "keep", "backend": "greedy"}


@pytest.fixture(scope="module")
def pruned():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    asked = {"sparsity": 0.5, "residual": "0.75", "allocation": "uniform"}
    return model, before, osscar.prune(model, images(), **asked, **KEEP)


def test_outputs_equal_those_of_the_masked_model_and_what_came_in_is_unchanged(pruned):
    model, before, result = pruned
    zeroed = masked(model, result)
    for x in (images(5, 12, seed=7), images(2, 18, seed=8)):
        expected = zeroed(x)
        assert not torch.allclose(expected, model(x), rtol=1e-2)
        torch.testing.assert_close(result.model(x), expected, rtol=1e-4, atol=1e-5)
    kept = {layer.name: layer.kept for layer in result.layers}
    assert kept["stem.0.channels"] == 6
    assert {layer.kind for layer in result.layers} == {"channels"}
    assert result.parameters_after < 0.6 * result.parameters_before
    assert result.model.blocks[0].depthwise.groups == kept["blocks.0.expand.channels"] < 16
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- batch norm --------------------------------------------------------------------------


def renewed(model, dense, data):
    """Renew the statistics of a model beside a dense one of the same shape."""
    statistics = dense_statistics(dense, data)
    return renew_statistics(model, PruningPlan(()), data, statistics)


def test_statistics_are_renewed_after_the_proof_unless_they_are_to_be_kept(pruned):
    model, _, kept = pruned
    corrected = osscar.prune(model, images(), **{**KEEP, "batch_norm": "correct"},
                             groups={one.name: one.kept for one in kept.layers})  # fmt: skip
    assert (kept.batch_norms, corrected.batch_norms) == (0, 8)
    assert corrected.certificate.error == kept.certificate.error
    (left,) = (group.kept for group in kept.plan.groups if "blocks.0.expand" in group.name)
    old, new = kept.model.blocks[0], corrected.model.blocks[0]
    assert torch.equal(old.norm1.running_mean, model.blocks[0].norm1.running_mean[list(left)])
    assert not torch.equal(old.norm3.running_mean, new.norm3.running_mean)
    pairs = zip(kept.model.named_parameters(), corrected.model.parameters(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), name


def test_where_nothing_was_pruned_nothing_is_corrected_whatever_the_data():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    strange = [{"x": 5 * torch.rand(4, 3, 12, 12) + 2}]
    assert renewed(model, small_net(), strange) == 8
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_the_correction_is_the_change_of_the_statistics_on_the_same_data():
    """With one batch every layer's drift can be computed from a pass of either model."""
    dense, model = small_net(), small_net()
    with torch.no_grad():
        model.down.weight.mul_(1.7)
    x, seen, new = images(32), [], images(32, seed=11)
    apart = (model(new) - dense(new)).square().mean()
    renewed(model, dense, [{"x": x}])
    assert (model(new) - dense(new)).square().mean() < apart / 50
    for network in (dense, model):
        hook = network.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            network(x)
        hook.remove()
    (m0, v0), (m1, v1) = ((y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)) for y in seen)
    torch.testing.assert_close(model.norm.running_mean, dense.norm.running_mean + m1 - m0)
    ratio = (v1 + model.norm.eps) / (v0 + model.norm.eps)
    torch.testing.assert_close(model.norm.running_var, dense.norm.running_var * ratio)


def test_batches_count_by_their_size():
    model, dense, x = small_net().double(), small_net().double(), images(40).double()
    with torch.no_grad():
        model.stem[0].weight.mul_(1.7)
    renewed(model, dense, [{"x": piece} for piece in x.split(32)])
    change = (model.stem[0](x) - dense.stem[0](x)).mean((0, 2, 3)).detach()
    torch.testing.assert_close(model.stem[1].running_mean, dense.stem[1].running_mean + change)


def test_failure_leaves_the_old_statistics():
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    infinite = [{"x": torch.full((2, 3, 8, 8), torch.inf)}]
    with pytest.raises(NonFiniteError, match=r"stem\.1.*batch_norm keep"):
        renewed(model, small_net(), infinite)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- calibration data --------------------------------------------------------------------


def test_outputs_are_compared_on_noise_like_the_data_on_heavy_tails_and_on_data():
    data = images(16) * 3 + 5
    found = [one["x"] for one in as_inputs(small_net(), data).proofs(seed=3)]
    assert [len(one) for one in found] == [3, 1, 7, 1, 2]
    assert found[0].mean() == pytest.approx(5.0, abs=0.5)
    assert not torch.equal(found[0][:1], found[1])
    assert (found[2] - 5).abs().max() > 5 * (found[0] - 5).abs().max()
    assert torch.equal(found[4], data[:2])


# ---- vision transformers -----------------------------------------------------------------


def test_vision_transformers_lose_only_neurons_where_heads_cannot_be_lost():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.VisionTransformer(
        image_size=12, patch_size=4, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=24,
        num_classes=5,
    )  # fmt: skip
    torch.nn.init.normal_(model.heads.head.weight)
    x, options = images(), {**PLAIN, "backend": "magnitude", "allocation": "uniform", "round_to": 1}
    (block,) = model.encoder.layers
    block.self_attention = nn.MultiheadAttention(16, 4, batch_first=True, add_zero_attn=True)
    result = osscar.prune(model.eval(), x, sparsity=0.5, **options)
    assert {layer.kind for layer in result.layers} == {"neurons"}
    assert type(result.model.encoder.layers[0].self_attention) is nn.MultiheadAttention
    with pytest.raises(RequestError, match="heads"):
        osscar.prune(model, x, heads=2, **PLAIN)


def test_each_group_is_measured_on_the_stream_that_was_pruned_before_it():
    model, x, name = small_net(), images(), "blocks.1.expand.channels"
    options = {**KEEP, "target": "weights"}  # so that the dense stream plays no part
    first = {"blocks.0.expand.channels": 8, "blocks.0.squeeze.channels": 2}
    both = osscar.prune(model, x, groups={name: 8, **first}, **options)
    assert [layer.name for layer in both.layers] == [*first, name]
    early = osscar.prune(model, x, groups=first, **options).model
    few = {**options, "batch_size": 7}  # which changes nothing but rounding
    late, alone = (osscar.prune(m, x, groups={name: 8}, **few) for m in (early, model))
    loss = both.layers[-1].loss
    assert loss == pytest.approx(late.layers[0].loss, rel=1e-4)
    assert loss != pytest.approx(alone.layers[0].loss, rel=1e-3)
