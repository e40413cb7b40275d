"""Networks of tokens as people write their own: from training to ONNX Runtime, and what is told."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import osscar
from osscar.network.operations import count_flops
from tests.osscar import gpts

KERNELS = (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)


# ---- one kernel of attention or another ---------------------------------------------------


def _of_attention(contiguous):
    torch.manual_seed(0)
    build = lambda config: gpts.Fused(config, contiguous)  # noqa: E731
    return gpts.GPT(gpts.Config(n_layer=1), build, last_alone=True).eval()


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
        result = osscar.prune(model, idx, flops=0.6, device="cpu")
        archive = osscar.export_pt2(result.model, tmp_path / "smaller.pt2")
        result.save(tmp_path / "smaller")
        again = osscar.load(tmp_path / "smaller", dense=model)
    assert result.form == "exported"
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
