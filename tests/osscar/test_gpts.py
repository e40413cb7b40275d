"""Networks of tokens as people write their own: kernels of attention, forms, and what is told."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import graph
import osscar
from osscar.data.samples import TensorSet
from osscar.evaluation.quality import score
from osscar.network.modules import own_methods
from osscar.network.operations import count_flops
from osscar.proof.plan import Form
from tests.coverage.measure import half_of
from tests.osscar import gpts

KERNELS = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("kernel", "contiguous"), zip(KERNELS, (True, False), strict=True))
def test_what_one_kernel_traces_another_runs(kernel, contiguous, monkeypatch):
    """Kernels differ in strides: what one returns need not be copied before a view, or must be."""
    monkeypatch.setattr(gpts.Fused, "contiguous", contiguous)
    torch.manual_seed(0)
    model, idx = gpts.nano()[0].eval(), gpts.drawn(["idx"], 4, 0)[0]["idx"]
    with sdpa_kernel(kernel):
        plan = half_of(graph.trace(model, {"idx": idx}).prunable)
        small = osscar.shrink_program(model, plan, [{"idx": idx}], {"idx": idx}).model
    found, counts = [], set()
    for other in KERNELS:
        with sdpa_kernel(other), torch.no_grad():
            found.append(small(idx=idx[:2])[0])
            counts.add(count_flops(small, {"idx": idx}))
    torch.testing.assert_close(*found)
    assert len(counts) == 1


# ---- methods of a user's class -----------------------------------------------------------


class Generating(gpts.GPT):
    """As nanoGPT's, with heads whose size is a share of a width that does not change."""

    def init_weights(self):
        raise NotImplementedError

    @torch.no_grad()
    def generate(self, idx, count):
        for _ in range(count):
            logits, _ = self(idx[:, -gpts.LENGTH :])
            idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], 1)
        return idx


def generating():
    torch.manual_seed(0)
    return Generating(gpts.Config()).eval()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("asked", [{"flops": 0.8}, {"neurons": 0.5}])
def test_a_class_with_methods_keeps_its_modules_where_these_suffice(asked):
    idx = gpts.drawn(["idx"], 64, 0)[0]
    model = generating()
    if "neurons" in asked:
        result = osscar.prune(model, idx, **asked, device="cpu")
    else:
        kept = r"for the sake of generate\(\); skipped.*heads.*These may be pruned in form"
        with pytest.warns(UserWarning, match=kept):
            result = osscar.prune(model, idx, **asked, device="cpu")
    assert result.form == Form.EAGER
    assert "form 'eager'" in repr(result)
    assert result.model.generate(idx["idx"][:2], 4).shape == (2, gpts.LENGTH + 4)
    assert result.model(**gpts.drawn(["idx", "targets"], 4, 0)[0])[1].isfinite()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("asked", [{"flops": 0.3}, {"heads": 0.5}])
def test_what_a_class_loses_is_named_where_only_a_program_can_follow(asked):
    idx = gpts.drawn(["idx"], 64, 0)[0]
    with pytest.warns(UserWarning, match=r"exported program without generate\(\) of Gen"):
        result = osscar.prune(generating(), idx, **asked, device="cpu")
    assert result.form == Form.EXPORTED
    assert "form 'exported'" in repr(result)
    assert not hasattr(result.model, "generate")


def test_methods_of_libraries_and_of_modules_do_not_count():
    assert own_methods(generating()) == ("generate",)
    for model in (gpts.nano()[0], nn.Sequential(), nn.Transformer(4, 2, 1, 1, 4)):
        assert own_methods(model) == ()


def test_of_labels_of_a_window_all_are_scored_where_the_model_predicts_all_or_else_the_last():
    inputs, labels = gpts.drawn(["idx", "targets"], 8, 0)
    for reads, predictions in ((["idx"], 8), (["idx", "targets"], 80)):
        data = TensorSet("tokens", {name: inputs[name] for name in reads}, labels)
        assert score([gpts.nano()[0].eval()], data)[0].predictions == predictions
