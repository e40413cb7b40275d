"""Attention with a number for each head (ALiBi): heads leave with theirs."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.testing import assert_close

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


# ---- code of one's own -------------------------------------------------------------------


class Alibi(nn.Module):
    """One layer of attention, with slopes that a subclass keeps or makes."""

    heads, width = 6, 4

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(5, 16)
        self.q, self.k, self.v = (nn.Linear(16, self.heads * self.width) for _ in range(3))
        self.out = nn.Linear(self.heads * self.width, 16)
        self.leave = nn.Linear(16, 3)

    def forward(self, x):
        x = self.enter(x)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        n = x.shape[1]
        distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        bias = self.slopes()[:, None, None] * distance.abs()
        scores = q @ k.transpose(-1, -2) / self.width**0.5 - bias
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.leave(x + self.out(mixed))


class Kept(Alibi):
    """Slopes in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", 2.0 ** -torch.arange(1, self.heads + 1))

    def slopes(self):
        return self.table


class Made(Alibi):
    """Slopes that the code makes for a number of heads written in it."""

    def slopes(self):
        return 2.0 ** -torch.arange(1, 7)


class Listed(Alibi):
    """Slopes that the code lists."""

    def slopes(self):
        return torch.tensor([0.5, 0.3, 0.7, 0.2, 0.05, 0.11])


class Attribute(Alibi):
    """Slopes in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(0.1, 0.9, 6)

    def slopes(self):
        return self.table


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [Kept, Made, Listed, Attribute])
def test_slopes_leave_with_modules_or_in_a_program(kind, tmp_path):
    torch.manual_seed(0)
    model, data = kind().eval(), torch.randn(16, 7, 5)
    if kind is not Kept:
        with pytest.raises(RequestError, match=r"numbers that the code makes|constant of the code"):
            osscar.prune(model, data, heads="1/2", form="eager")
    result = osscar.prune(model, data, heads="1/2", **PLAIN)
    assert result.form == ("eager" if kind is Kept else "exported")
    assert not result.skipped
    (group,) = result.plan.groups
    smaller, x = result.model, torch.randn(3, 9, 5)
    assert smaller.get_parameter("q.weight").shape == (12, 16)
    expected = masked(model, result)(x)
    assert far_apart(expected, smaller(x)) < 1e-5
    # With the slopes of the first heads it would be another model.
    wrong = copy.deepcopy(model)
    kept = model.slopes()[list(group.kept)]
    wrong.slopes = lambda: torch.cat((kept, kept))
    assert far_apart(expected, masked(wrong, result)(x)) > 1e-4
    if kind is Made:
        again = osscar.load(result.save(tmp_path / "smaller").path, dense=model)
        assert_close(again(x), smaller(x))


class Counted(Made):
    """Has no program, since its code counts samples; neurons follow in modules."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x):
        if int(x.shape[0]) == 1000:
            return x
        return super().forward(x) + self.down(torch.relu(self.up(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("error:skipped")
def test_what_only_a_program_can_lose_is_skipped_in_modules():
    asked = {"heads": "1/2", "neurons": 0.5, "strict": True, **PLAIN}
    result = osscar.prune(Counted().eval(), torch.randn(16, 7, 5), **asked)
    assert result.form == "eager"
    (left,) = result.skipped
    assert left.kind == "heads"
    assert "numbers that the code makes" in left.reason
    assert result.model.up.out_features == 6
