"""Networks of tokens as people write their own, and functions that build them for a command.

Each returns ``(logits, loss)``, and ``(logits, None)`` where it is given no targets.
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
    n_layer: int = 1
    n_head: int = 4
    n_embd: int = 16
    dropout: float = 0.1


def answer(logits, targets):
    if targets is None:
        return logits, None
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class Fused(nn.Module):
    """Self-attention by the fused operator, whose result ends in a view."""

    def __init__(self, config, contiguous=True):
        super().__init__()
        self.config, self.contiguous = config, contiguous
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


class Masked(nn.Module):
    """Attention by a softmax, over a memory if there is one, and else causal by a buffer."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.drop = config.n_head, nn.Dropout(config.dropout)
        self.query, self.key, self.value, self.proj = (
            nn.Linear(config.n_embd, config.n_embd) for _ in range(4)
        )
        size = config.block_size
        self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x, memory=None):
        seen = x if memory is None else memory
        q, k, v = (
            layer(read).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for layer, read in ((self.query, x), (self.key, seen), (self.value, seen))
        )
        scores = q @ k.transpose(-2, -1) / k.size(-1) ** 0.5
        if memory is None:
            future = self.bias[:, :, : x.size(1), : x.size(1)] == 0
            scores = scores.masked_fill(future, float("-inf"))
        y = self.drop(scores.softmax(-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().flatten(2))


class Block(nn.Module):
    def __init__(self, config, attention, reads=False):
        super().__init__()
        width = config.n_embd
        self.norm, self.attn = nn.LayerNorm(width), attention(config)
        self.cross = Masked(config) if reads else None
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, memory=None):
        x = x + self.attn(self.norm(x))
        if self.cross is not None:
            x = x + self.cross(x, memory)
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class GPT(nn.Module):
    """A decoder with tied embeddings, which may put out scores of the last position alone."""

    def __init__(self, config, attention, last_alone):
        super().__init__()
        self.config, self.last_alone = config, last_alone
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "h": nn.ModuleList(Block(config, attention) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        })  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        _, length = idx.size()
        assert length <= self.config.block_size
        places = torch.arange(0, length, dtype=torch.long, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(places)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None and self.last_alone:
            x = x[:, [-1], :]
        return answer(self.lm_head(x), targets)


class Translator(nn.Module):
    """An encoder, and a decoder that reads what it makes."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.places = nn.Parameter(torch.randn(config.block_size, config.n_embd) / 10)
        self.encoder = Block(config, Masked)
        self.decoder = Block(config, Masked, reads=True)
        self.head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, src, tgt, targets=None):
        memory = self.encoder(self.embed(src) + self.places[: src.size(1)])
        x = self.decoder(self.embed(tgt) + self.places[: tgt.size(1)], memory)
        return answer(self.head(x), targets)


def tokens(*names):
    return {name: torch.zeros(2, LENGTH, dtype=torch.int64) for name in names}


def nano():
    return GPT(Config(), Fused, last_alone=True), tokens("idx")


def nano_with_targets():
    return GPT(Config(), Fused, last_alone=True), tokens("idx", "targets")


def mini():
    return GPT(Config(), Masked, last_alone=False), tokens("idx")


def translator():
    return Translator(Config()), tokens("src", "tgt")


def drawn(names, count, seed):
    """Return sequences of tokens, each of which is one to three above the one before it."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, LENGTH + 1), generator=generator)
    steps[:, 0] = torch.randint(TOKENS, (count,), generator=generator)
    rows = steps.cumsum(1) % TOKENS
    idx, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    known = {"idx": idx, "src": rows.flip(1)[:, 1:].contiguous(), "tgt": idx, "targets": labels}
    return {name: known[name] for name in names}, labels
