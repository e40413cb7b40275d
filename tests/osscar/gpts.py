"""A network of tokens as people write their own.

It returns ``(logits, loss)``, and ``(logits, None)`` where it is given no targets.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

TOKENS, LENGTH = 12, 10


@dataclass
class Config:
    vocab_size: int = TOKENS
    block_size: int = LENGTH
    n_head: int = 4
    n_embd: int = 16
    dropout: float = 0.1


class Fused(nn.Module):
    """Self-attention by the fused operator, whose result ends in a view."""

    contiguous = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        batch, length, width = x.size()
        heads = self.config.n_head
        q, k, v = (
            part.view(batch, length, heads, width // heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        drop = self.config.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True).transpose(1, 2)
        y = y.contiguous() if self.contiguous else y
        return self.proj(y.view(batch, length, width))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.norm, self.attn = nn.LayerNorm(width), Fused(config)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class GPT(nn.Module):
    """A decoder with tied embeddings, which returns scores of the last position alone."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.block, self.norm = Block(config), nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        _, length = idx.size()
        assert length <= self.config.block_size
        places = torch.arange(0, length, dtype=torch.long, device=idx.device)
        x = self.norm(self.block(self.wte(idx) + self.wpe(places)))
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nano():
    return GPT(Config()), {"idx": torch.zeros(2, LENGTH, dtype=torch.int64)}


def drawn(names, count, seed):
    """Return sequences of tokens, each of which is one to three above the one before it."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, LENGTH + 1), generator=generator)
    steps[:, 0] = torch.randint(TOKENS, (count,), generator=generator)
    rows = steps.cumsum(1) % TOKENS
    known = {"idx": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
    return {name: known[name] for name in names}, known["targets"]
