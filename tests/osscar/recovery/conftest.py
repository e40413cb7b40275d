"""What tests of adapters and of memory train: a small dense model, and windows that it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(64, (16, 16), generator=torch.Generator().manual_seed(1))
