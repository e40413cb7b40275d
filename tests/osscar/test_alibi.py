"""Attention with a number for each head (ALiBi): heads leave with theirs."""

import pytest
import torch
import transformers as hf
from torch import nn

import osscar
from osscar.base.errors import RequestError
from tests.osscar.masked import masked
from tests.osscar.programs import far_apart

PLAIN = {"backend": "magnitude", "device": "cpu"}


def test_heads_leave_with_their_slopes_in_a_program_of_transformers():
    torch.manual_seed(0)
    # 6 heads are no power of two, for which slopes are made in two ways.
    sizes = {"d_model": 48, "n_heads": 6, "n_layers": 1, "vocab_size": 64, "max_seq_len": 64}
    model = hf.AutoModelForCausalLM.from_config(hf.MptConfig(**sizes, use_cache=False)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 64, (8, 12))
    with pytest.raises(RequestError, match="numbers that the code makes"):
        osscar.prune(model, ids, heads="1/2")  # in modules, as it can generate text
    result = osscar.prune(model, ids, heads="1/2", form="exported", **PLAIN)
    expected = masked(model, result)(ids[:3, :9]).logits
    assert far_apart(expected, result.model(ids[:3, :9]).logits) < 1e-5
    assert far_apart(expected, model(ids[:3, :9]).logits) > 1e-2
