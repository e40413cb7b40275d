"""A smaller model is right for all inputs, not for those alone on which outputs are compared.

Each network here computes something of the width of a layer that is pruned, mostly where inputs
that are drawn do not show it.  It may be refused, its program may be shrunk, or its modules: what
comes out has to be right on all inputs, against a model in which the units are masked by hand.
"""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    LlamaConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

import graph
import osscar
from graph.tracing.standalone import Sizes
from osscar.base.errors import AdapterError, EquivalenceError, ModelError
from osscar.network.modules import full_name
from osscar.proof.equivalence import masked
from osscar.proof.lineage import lineage_of
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.proof.sizes import only_sizes, sizes_in_words
from osscar.proof.structural import StructureError, dense_programs
from osscar.shrinking import slice as slicing
from osscar.shrinking.shrink import shrink
from osscar.shrinking.slice import slice_units
from tests.osscar.families import tiny
from tests.osscar.programs import without_units

UNITS = 20
X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("open_sizes")


class Net(nn.Module):
    """Two layers; `after` is what a network makes of their output and of the width between."""

    def __init__(self, after=lambda net, y, x, w: y, **held):
        super().__init__()
        self.a, self.b, self.after = nn.Linear(6, UNITS), nn.Linear(UNITS, 7), after
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.after(self, self.b(h), x, h.shape[-1])


def plan_of(net, first=0, inputs=(X,)):
    """Plan to keep every other neuron of each layer."""
    groups = graph.trace(net, inputs).prunable
    return PruningPlan(tuple(GroupPlan.of(g, tuple(range(first, g.units, 2))) for g in groups))


def is_rare(x):
    return x.abs().amax(-1, keepdim=True) > 50


def rarely(change):
    """Make of a change one of those positions alone where inputs are large."""
    return lambda net, y, x, w: torch.where(is_rare(x), change(net, y, x, w), y)


def read_before_it_is_written(net, y, x, w):
    count = torch.zeros_like(x.sum())
    early = count.item()
    count.add_(1)
    late = count.item()
    return y * early + late if w == UNITS else y * late + early


def read_from_one_of_two(net, y, x, w):
    """Read a number from one tensor or another, both of which are computed in any case."""
    least, most = x.amin(), x.amax()
    number = (most if w == UNITS else least).item()
    return torch.where(is_rare(x), y * number, y + 0 * least + 0 * most)


def sign_of_zero(net, y, x, w):
    return torch.atan2(y * 0, torch.full((7,), math.copysign(0.0, w - UNITS + 1)))


NETS = {
    "plain": lambda: Net(),
    "long inputs": lambda: Net(lambda net, y, x, w: y * (UNITS / w) if x.shape[1] > 16 else y),
    "large batches": lambda: Net(lambda net, y, x, w: y / w**0.5 if x.shape[0] > 4 else y),
    "one sample": lambda: Net(lambda net, y, x, w: y * w if x.shape[0] == 1 else y),
    "clamped": lambda: Net(lambda net, y, x, w: y.clamp(-2 * w**0.5, 2 * w**0.5)),
    "scale": lambda: Net(rarely(lambda net, y, x, w: y / w)),
    "roll": lambda: Net(rarely(lambda net, y, x, w: y.roll(w % 3, -1))),
    "index": lambda: Net(rarely(lambda net, y, x, w: y[..., w % 7].unsqueeze(-1))),
    "temperature": lambda: Net(rarely(lambda net, y, x, w: (y / w**0.5).softmax(-1))),
    "window": lambda: Net(
        rarely(lambda net, y, x, w: F.avg_pool1d(y, 2 * (w // 8) + 1, 1, w // 8))
    ),
    "fill": lambda: Net(rarely(lambda net, y, x, w: y.masked_fill(torch.arange(7) < w // 4, 0))),
    "large outputs": lambda: Net(lambda net, y, x, w: torch.where(y.abs() > 100, y.tanh() * w, y)),
    "beside pixels": lambda: Net(
        lambda net, y, x, w: torch.cat([net.box(x).sigmoid() * 1280, y / w**0.5], -1),
        box=nn.Linear(6, 4),
    ),
    "whole numbers": lambda: Net(lambda net, y, x, w: (y, (y * 100 / w).round().long())),
    "list": lambda: Net(lambda net, y, x, w: y / len(net.names), names=["unit"] * UNITS),
    "buffer": lambda: Net(
        lambda net, y, x, w: y * net.scale, scale=nn.Buffer(torch.tensor(UNITS**-0.5))
    ),
    "tensor": lambda: Net(lambda net, y, x, w: y / net.width, width=torch.tensor(float(UNITS))),
    "config": lambda: Net(
        lambda net, y, x, w: y / net.config.intermediate_size,
        config=SimpleNamespace(intermediate_size=UNITS),
    ),
    "count": lambda: Net(lambda net, y, x, w: y / net.hidden_features, hidden_features=UNITS),
    "positions": lambda: Net(
        lambda net, y, x, w: y + torch.arange(x.shape[1])[:, None].clamp_min(16).sub(16) / w
    ),
    "strides": lambda: Net(  # numbers that are read out of tensors, as detectors do
        lambda net, y, x, w: y * torch.full((7,), net.strides[1], dtype=x.dtype),
        strides=nn.Buffer(torch.tensor([8.0, 16.0])),
    ),
    "read out": lambda: Net(
        rarely(lambda net, y, x, w: y * torch.full((7,), torch.tensor(float(w))))
    ),
    "one of two": lambda: Net(read_from_one_of_two),
    "before it is written": lambda: Net(rarely(read_before_it_is_written)),
    "sign of zero": lambda: Net(rarely(sign_of_zero)),
    "branch": lambda: Net(
        lambda net, y, x, w: torch.cond(x.shape[0] > w // 4, lambda y: y * 2, lambda y: y + 1, (y,))
    ),
}
_ALWAYS = ("plain", "long inputs", "beside pixels", "strides", "one of two", "sign of zero")
SIZES = [(2, 5), (1, 5), (9, 5), (3, 16), (3, 33), (1, 1)]


def flat(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in _ALWAYS)) for n in NETS]
)
def test_what_is_accepted_is_right_on_all_inputs(name):
    torch.manual_seed(0)
    net = NETS[name]().double().eval()
    plan, x = plan_of(net, inputs=(X.double(),)), X.double()
    whole, accepted, inputs = without_units(net, plan), [], [(x,), (x[:1],)]
    try:
        accepted.append(osscar.shrink_program(net, plan, inputs, {"x": x}).model)
    except EquivalenceError:
        assert name != "plain"
    try:
        assert shrink(net, plan, inputs).certificate.structure is not None
        accepted.append(net)
    except EquivalenceError:
        assert name not in ("plain", "strides")
    for smaller in accepted:
        compared = 0
        for shape in SIZES:
            for size in (1.0, 100.0):
                x = size * torch.randn(*shape, 6, dtype=torch.float64)
                try:
                    found = smaller(x)
                except ModelError:  # a program that says for which sizes it holds
                    assert smaller is not net
                    continue
                compared += 1
                for one, other in zip(flat(whole(x)), flat(found), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        assert compared > 4


def test_modules_that_make_numbers_of_a_width_are_named_with_the_line():
    net = NETS["scale"]().eval()
    with pytest.raises(EquivalenceError, match=r"`return self\.after\(self, .*10, and 20 is due"):
        shrink(net, plan_of(net), [(X,)])
    assert net.a.out_features == UNITS


# ---- for which sizes it is claimed -------------------------------------------------------


def test_the_certificate_says_what_is_equal_and_for_which_sizes():
    net = Net().eval()
    found = shrink(net, plan_of(net), [(X,)]).certificate.structure
    assert (found.operators, found.tensors) == (3, 4)
    assert found.sizes == ("any batch of one or more, and x (any, any, 6)",)

    branch = Net(lambda net, y, x, w: y.flip(1) if x.shape[1] > 16 else y).eval()
    assert shrink(branch, plan_of(branch), [(X,)]).certificate.structure.sizes == (
        "any batch of one or more, and x (any, one to 16, 6)",
        "any batch of one or more, and x (any, 17 or more, 6)",
    )

    def after(net, y, x, w):  # a smaller one takes one length alone
        return y.flatten(0, 1).unflatten(0, x.shape[:2]) if w == UNITS or x.shape[1] == 5 else y

    closed = Net(after).eval()
    (found,) = shrink(closed, plan_of(closed), [(X,)]).certificate.structure.sizes
    assert found.startswith("any batch of one or more, and x (any, 5, 6)")


class Between(Net):
    """Something is done to what is between the layers."""

    def forward(self, x):
        return self.b(self.after(self.a(x)))


@pytest.mark.parametrize(
    ("between", "sizes"),
    [
        # Four runs of numbers, which are whole positions at multiples of four alone.
        (lambda h: h.reshape(len(h), 4, -1).softmax(1).reshape(h.shape), "x (any, 8, 6)"),
        (lambda h: h.flatten(0, 1).softmax(0).reshape(h.shape), "x (any, any, 6)"),
        (lambda h: h.reshape(len(h), 2, -1, h.shape[-1]).flatten(1, 2), "x (any, any, 6)"),
    ],
)
def test_sizes_that_units_depend_on_are_not_claimed(between, sizes):
    net, x = Between(between).eval(), torch.randn(3, 8, 6)
    (found,) = shrink(net, plan_of(net, inputs=(x,)), [(x,)]).certificate.structure.sizes
    assert found == f"any batch of one or more, and {sizes}"


def test_values_are_compared_that_only_inputs_of_other_sizes_read():
    net = Net(
        lambda net, y, x, w: y * net.scale if x.shape[1] > 16 else y, scale=nn.Buffer(torch.ones(7))
    ).eval()
    plan, before = plan_of(net), dict(copy.deepcopy(net).state_dict())
    programs = dense_programs(net, {"x": X})
    shrink(net, plan, [(X,)], programs=programs)
    net.scale[0] = 2
    with pytest.raises(StructureError, match="'scale' of the smaller model has other values"):
        programs.prove(net, plan, before)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "wrong", [lambda x: x.shape[1] == 23, lambda x: x.shape[0] * x.shape[1] > 170]
)
def test_sizes_that_were_not_proved_are_not_claimed(wrong):
    net = Net(lambda net, y, x, w: y / w if wrong(x) else y).eval()
    try:
        found = shrink(net, plan_of(net), [(X,)]).certificate.structure
    except EquivalenceError:
        return
    assert all(" where " in size for size in found.sizes)


def test_sizes_of_which_no_program_tells_are_named():
    def after(net, y, x, w):
        return y if x.shape[1] <= 16 else y * 2 if x.shape[1] <= 24 else y * 3

    net = Net(after).eval()
    with pytest.warns(
        UserWarning, match=r"nothing is proved for x of size \d+.* along dimension 1,"
    ):
        found = shrink(net, plan_of(net), [(X,)]).certificate.structure
    assert len(found.sizes) == 2
    assert found.sentence().endswith(f"; nothing is proved for {found.untried[0]}")


class ByLength(nn.Module):
    """Code of its own for short, for middling and for long samples."""

    def __init__(self, long):
        super().__init__()
        self.one, self.head, self.long = nn.Linear(8, 32), nn.Linear(32, 4), long

    def forward(self, x):
        y = torch.relu(self.one(x))
        if x.shape[1] > 16:
            y = self.long(y)
        elif x.shape[1] > 8:
            y = y * 2
        return self.head(y)


LENGTHS = osscar.SampleList(
    "sequences",
    [{"x": torch.randn(1, length, 8)} for length in [6] * 40 + [12] * 8 + [20] * 8],
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:nothing is proved for")
def test_sizes_of_the_data_that_no_program_takes_are_named_and_compared():
    model = ByLength(nn.Tanh()).eval()
    with pytest.warns(UserWarning, match=r"have x \(20, 8\), for which nothing is proved; give"):
        result = osscar.prune(model, LENGTHS, neurons=0.5, device="cpu")
    long = torch.randn(2, 20, 8)
    assert "x (any, 17 or more, 8)" in osscar.prove(result.model, model, long).sentence()


@pytest.mark.filterwarnings("ignore:nothing is proved for")
def test_code_that_only_some_data_reach_follows_or_is_named():
    class Reshaped(nn.Module):
        def forward(self, x):
            return x.view(1, -1, 32)

    with pytest.raises(AdapterError, match=r"ByLength fails with fewer units, in `return "):
        osscar.prune(ByLength(Reshaped()).eval(), LENGTHS, neurons=0.5, device="cpu")


@pytest.mark.parametrize(
    ("guards", "said"),
    [
        ((), "any batch of one or more, and one token or more"),
        (
            ("ids.shape[0] == input_ids.shape[0]",),
            "any batch of one or more, and one token or more",
        ),
        (("input_ids.shape[1] > 1",), "any batch of one or more, and two tokens or more"),
        (("1 != input_ids.shape[0]",), "batches of two or more, and one token or more"),
        (
            ("input_ids.shape[0] == 1", "12 >= input_ids.shape[1]"),
            "a batch of one, and one to 12 tokens",
        ),
        (("input_ids.shape[1] != 7",), "any batch of one or more, and one token or more but not 7"),
        (
            ("input_ids.shape[1] % 4 == 0",),
            "any batch of one or more, and one token or more where input_ids.shape[1] is a "
            "multiple of 4",
        ),
        (
            ("(4*input_ids.shape[1]*input_ids.shape[1]) == 4",),
            "any batch of one or more, and one token",
        ),
        (
            ("512*input_ids.shape[1] < 2147483648",),
            "any batch of one or more, and one token or more where "
            "512*input_ids.shape[1] < 2147483648",
        ),
    ],
)
def test_sizes_are_said_in_words(guards, said):
    sizes = Sizes({"input_ids": (None, None)}, guards)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    program = SimpleNamespace(input_names=("input_ids",), inputs=(ids,), sizes=sizes)
    assert sizes_in_words(program, program) == said
    if not guards:
        fewest = "batches of two or more, and one token or more"
        assert sizes_in_words(program, program, samples=2) == fewest


def test_inputs_of_other_counts_are_said_each_for_itself():
    sizes = Sizes({"x": (None, 3), "y": (None,)}, ("x.shape[0] > 4", "3 >= y.shape[0]"))
    given = {"input_names": ("x", "y"), "inputs": (torch.zeros(5, 3), torch.zeros(2))}
    program = SimpleNamespace(sizes=sizes, **given)
    assert sizes_in_words(program, program) == (
        "batches of five or more, and x (any, 3), y (one to three)"
    )


class WithNumber(Net):
    def forward(self, x, k=0):
        h = torch.relu(self.a(x))
        return self.b(h) / h.shape[-1] if k > 4 else self.b(h)


def test_arguments_that_are_no_tensors_are_part_of_the_claim():
    net, inputs = WithNumber().eval(), {"x": X, "k": 3}
    proof = shrink(net, plan_of(net, inputs=inputs), [inputs])
    assert proof.certificate.structure.sizes == (
        "any batch of one or more, and x (any, any, 6), k = 3",
    )


# ---- what is compared --------------------------------------------------------------------


def strided(t, x):
    return torch.where(is_rare(x), torch.as_strided(t, (7,), (1,)), t.transpose(1, 2))


def flattened(t, x):
    t = t * 1  # in the order of t
    t.flatten(1).add_(torch.where(is_rare(x).any(), 1.0, 0.0))
    return t.transpose(1, 2)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("read", [strided, flattened])
def test_copies_count_where_the_order_in_memory_is_read(read):
    def after(net, y, x, w):
        t = y.transpose(1, 2)
        return read(t.contiguous() if w < UNITS else t, x)

    net = Net(after).eval()
    with pytest.raises(EquivalenceError):
        shrink(net, plan_of(net), [(X,)])


WRITTEN = {
    "another value": lambda y, copied: y * 2,
    "the copy": lambda y, copied: copied,
    "a view of the copy": lambda y, copied: copied[..., 1:],
    "what dropout returns": lambda y, copied: F.dropout(copied, training=False),
    "what einsum returns": lambda y, copied: torch.einsum("bij->bij", copied),
    "what a chunk returns": lambda y, copied: copied.chunk(2, -1)[0],
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("written", WRITTEN)
def test_copies_count_where_what_they_share_memory_with_is_written_to(written):
    def after(net, y, x, w):
        copied = y.clone() if w < UNITS else y
        other = WRITTEN[written](y, copied)
        other.add_(torch.where(is_rare(x), 1.0, 0.0))
        return y + 0 * copied + (0 * other if written == "another value" else 0)

    net = Net(after).eval()
    if written == "another value":
        assert shrink(net, plan_of(net), [(X,)]).certificate.structure.operators
        return
    with pytest.raises(StructureError):
        shrink(net, plan_of(net), [(X,)])


# ---- what is the same by another program --------------------------------------------------

IDENTITIES = {
    "repeated heads": lambda y, one: y[:, None, :].expand(-1, one, -1, -1).reshape(y.shape),
    "repeated features": lambda y, one: y.repeat_interleave(one, -1),
    "repeated samples": lambda y, one: y.repeat(one, 1, 1),
    "flattened": lambda y, one: y[::one].flatten(1).unflatten(1, y.shape[1:]).clone(),
}
OTHERS = {
    "expanded by two": lambda y, one: y[..., None].expand(-1, -1, -1, 2).amax(-1),
    "first position": lambda y, one: y[:, :one].expand(y.shape),
    "another order": lambda y, one: y.transpose(1, 2).reshape(y.shape),
    "interleaved": lambda y, one: torch.cat((y, y), -1)[..., ::2],
}


def on_one_side(after, smaller):
    """Let a network, or the smaller one, do something more with its output."""
    return Net(lambda net, y, x, w: after(y, 1) if (w < UNITS) is smaller else y).eval()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize("name", [*IDENTITIES, *OTHERS])
def test_views_that_lead_back_are_the_identity_and_others_are_not(name, smaller):
    net = on_one_side((IDENTITIES | OTHERS)[name], smaller)
    if name in IDENTITIES:
        assert shrink(net, plan_of(net), [(X,)]).certificate.structure.operators == 3
        return
    with pytest.raises(EquivalenceError):
        shrink(net, plan_of(net), [(X,)])


@pytest.mark.parametrize("kept", [False, True])
def test_an_identity_that_copies_is_another_value_where_the_first_is_written_to(kept):
    def after(net, y, x, w):
        before = y.repeat(1, 1, 1) if kept or w == UNITS else y
        y.add_(torch.where(is_rare(x), 1.0, 0.0))
        return y * before

    net = Net(after).eval()
    if kept:
        assert shrink(net, plan_of(net), [(X,)]).certificate.structure is not None
        return
    with pytest.raises(StructureError):
        shrink(net, plan_of(net), [(X,)])


_GROUPED = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 40}
_HEADS = {"num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 32}
QUERIES = {
    "llama": lambda kv: LlamaConfig(**_GROUPED, **_HEADS, num_key_value_heads=kv),
    "qwen2": lambda kv: Qwen2Config(**_GROUPED, **_HEADS, num_key_value_heads=kv),
    "gemma3": lambda kv: Gemma3TextConfig(
        **_GROUPED, **_HEADS, num_key_value_heads=kv, query_pre_attn_scalar=8
    ),
    "falcon": lambda kv: FalconConfig(
        hidden_size=32,
        ffn_hidden_size=24,
        num_hidden_layers=1,
        vocab_size=40,
        num_attention_heads=4,
        **({} if kv == 1 else {"num_kv_heads": kv, "new_decoder_architecture": True}),
    ),
    "gpt_bigcode": lambda kv: GPTBigCodeConfig(
        n_embd=32, n_inner=24, n_layer=1, n_head=4, n_positions=32, vocab_size=40
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("family", QUERIES)
def test_one_unit_of_attention_is_proved(family, pairs, attention, monkeypatch):
    """One query head on a key-value head, which nobody repeats any more, or one such pair."""
    monkeypatch.setattr("osscar.proof.structural.other_sizes", lambda *given: ())
    config = QUERIES[family](pairs)
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).eval()
    inputs = {"input_ids": torch.arange(20).view(2, 10) + 3}
    groups = [g for g in graph.trace(model, inputs).prunable if g.kind is graph.UnitKind.HEADS]
    assert [group.units for group in groups] == [4 if pairs == 1 or "big" in family else pairs]
    plan = PruningPlan(tuple(GroupPlan.of(group, (1,)) for group in groups))
    assert shrink(model, plan, [inputs]).certificate.structure is not None


@pytest.mark.slow
def test_one_head_is_proved_for_one_token_too():
    """Whose only length is a number to the dense program, and to that of one head an open size."""
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 12, "d_kv": 4, "num_layers": 1}
    config = T5Config(**sizes, num_heads=4, decoder_start_token_id=1)
    model = T5ForConditionalGeneration(config).eval()
    inputs = {name: torch.arange(14).view(2, 7) for name in ("input_ids", "decoder_input_ids")}
    groups = [g for g in graph.trace(model, inputs).prunable if g.kind is graph.UnitKind.HEADS]
    plan = PruningPlan(tuple(GroupPlan.of(group, (3,)) for group in groups[:1]))
    with pytest.warns(UserWarning, match="nothing is proved for decoder_input_ids of size 1"):
        found = shrink(model, plan, [inputs]).certificate.structure
    assert [" one token," in size for size in found.sizes] == [False, True]


def test_sizes_that_can_be_but_one_number():
    ids, x = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 3)
    programs = [
        SimpleNamespace(input_names=("ids", "x"), inputs=(ids, x), sizes=Sizes({}, guards))
        for guards in (("1 >= ids.shape[1]", "x.shape[0] > 2"), ("x.shape[0] * x.shape[0] < 16",))
    ]
    assert only_sizes(programs[0]) == {"ids.shape[1]": 1}
    assert only_sizes(*programs) == {"ids.shape[1]": 1, "x.shape[0]": 3}


@pytest.mark.parametrize("repeats", [1, 2])
def test_heads_are_grouped_where_there_are_more_queries_than_keys(repeats, monkeypatch):
    """Kernels group heads by a flag, which is nothing where there are as many."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, n * 4) for n in (4, 1, 1))
            self.o = nn.Linear(16, 6)

        def forward(self, x):
            q, k, v = (
                f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            grouped = q.shape[1] > repeats
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
            return self.o(y.transpose(1, 2).flatten(2))

    net = Grouped().eval()
    (group,) = (g for g in graph.trace(net, (X,)).prunable if g.units == 4)
    plan = PruningPlan((GroupPlan.of(group, (0, 2)[:repeats]),))
    if repeats == 1:
        assert shrink(net, plan, [(X,)]).certificate.structure is not None
        return
    with pytest.raises(EquivalenceError):
        shrink(net, plan, [(X,)])


class Scaled(Net):
    """Reads a number of its own and a buffer, which adapters of the tests change."""

    def __init__(self):
        super().__init__(
            rarely(lambda net, y, x, w: y * net.t * net.factor),
            factor=1.0,
            t=nn.Buffer(torch.ones(7)),
        )


def by_which_units_stay(module, group):
    module.factor = 1.0 if group.kept[0] == 0 else 2.0


def in_place(module, group):
    module.t.mul_(2)


@pytest.mark.parametrize("change", [by_which_units_stay, in_place])
def test_what_an_adapter_changes_is_compared_for_the_units_that_stay(change, monkeypatch):
    monkeypatch.setitem(slicing._ADAPTERS, full_name(Scaled), change)
    net = Scaled().eval()
    programs, refused = dense_programs(net, {"x": X}), 0
    for first in (0, 1):
        try:
            shrink(copy.deepcopy(net), plan_of(net, first), [(X,)], programs=programs)
        except EquivalenceError:
            refused += 1
    assert refused == (2 if change is in_place else 1)


class Nested(Net):
    """Branches within a branch, and outside of both a write that tells a copy from the value."""

    divisor, copied = 3, True

    def __init__(self):
        super().__init__(Nested.branch)

    def branch(self, y, x, w):
        def inner(y):
            return torch.cond(y.amax() > 5, lambda y: y / self.divisor, lambda y: y * 2, (y,))

        made = torch.cond(x.amax() > 50, lambda y: y * 3, inner, (y,))
        other = y.clone()
        other.view(-1).add_(1)
        return torch.where(is_rare(x), made + (other if self.copied else y), made) + 0 * other


@pytest.mark.slow
def test_branches_that_a_program_contains_are_compared(monkeypatch):
    monkeypatch.setattr("osscar.proof.structural.other_sizes", lambda *given: ())
    net = Nested().eval()
    programs, plan = dense_programs(net, {"x": X}), plan_of(net)
    slice_units(net, plan)
    assert programs.prove(net, plan).tensors == 4
    for change in ({"divisor": 3.0}, {"copied": False}):
        changed = copy.deepcopy(net)
        vars(changed).update(change)
        with pytest.raises(StructureError):
            programs.prove(changed, plan, anew=True)


TAMPERED = (
    lambda net: net.a.weight.data[0].copy_(net.a.weight.data[1]),
    lambda net: net.b.bias.data[0].add_(1e-3),
    lambda net: vars(net).update(forward=lambda x: (net.b(F.gelu(net.a(x))), x)),
    lambda net: vars(net).update(forward=lambda x: (torch.relu(net.b(net.a(x))), x)),
    lambda net: vars(net).update(after=lambda _, y, x, w: (x, y)),
)
"""Another row, bias, function, order, and other outputs."""


def test_whatever_is_changed_beside_the_units_is_seen():
    net = Net(lambda net, y, x, w: (y, x)).eval()
    plan, before = plan_of(net), dict(copy.deepcopy(net).named_parameters())
    programs = dense_programs(net, {"x": X})
    shrink(net, plan, [(X,)], programs=programs)
    programs.prove(net, plan, before, anew=True)
    for tamper in TAMPERED:
        tampered = copy.deepcopy(net)
        tamper(tampered)
        with pytest.raises(StructureError):
            programs.prove(tampered, plan, before, anew=True)


class Block(nn.Module):
    """Two layers of neurons; code of a culprit uses the width of the second."""

    def __init__(self, culprit):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(6, 8), nn.Linear(8, UNITS), nn.Linear(UNITS, 6)
        self.culprit = culprit

    def forward(self, x):
        h = torch.relu(self.mid(torch.relu(self.up(x))))
        y = self.down(h)
        return x + (torch.where(is_rare(x), y / h.shape[-1], y) if self.culprit else y)


def test_groups_are_named_for_what_their_own_modules_do():
    net = nn.Sequential(*(Block(index != 1) for index in range(3))).eval()
    names = ("up", "mid")  # of which the line of code tells whose width it uses
    with pytest.raises(EquivalenceError, match=r"y / h\.shape\[-1\]") as caught:
        shrink(net, plan_of(net), [(X,)])
    _, _, advice = str(caught.value).partition("; nothing was written; prune without those of ")
    assert re.findall(r"'([\w.]+)'", advice) == [f"{n}.{of}.neurons" for n in "02" for of in names]


def test_what_cannot_be_exported_any_more_is_refused():
    """Another kernel may run while a model is exported, as with a mask, whose number is wrong."""

    def after(net, y, x, w):
        if torch.compiler.is_exporting():
            return y + 0 * torch.zeros(net.units).expand(w).sum()
        return y

    net = Net(after, units=UNITS).eval()
    plan = plan_of(net)
    with pytest.raises(StructureError, match="cannot be exported, as the dense one can"):
        shrink(net, plan, [(X,)])


@pytest.mark.slow
def test_a_model_that_was_pruned_twice_is_proved_again_from_the_two_models():
    dense = Net().eval()
    net = copy.deepcopy(dense)
    for _ in range(2):
        shrink(net, plan_of(net), [(X,)])
    assert [c.structure is not None for c in lineage_of(net).certificates] == [True, True]
    assert osscar.prove(net, dense, {"x": X}).operators == 3
    net.forward = lambda x: net.b(torch.relu(net.a(x))) / net.a.out_features
    with pytest.raises(StructureError, match=r"aten\.div"):
        osscar.prove(net, dense, {"x": X})
    with pytest.raises(ModelError, match="no record of units removed"):
        osscar.prove(dense, dense, {"x": X})


def test_an_empty_batch_is_not_claimed():
    net = Net(lambda net, y, x, w: y * w if x.shape[0] == 0 else y).eval()
    (found,) = shrink(net, plan_of(net), [(X,)]).certificate.structure.sizes
    assert found == "any batch of one or more, and x (any, any, 6)"


@pytest.mark.slow
def test_generation_with_a_cache_is_that_of_the_masked_model(monkeypatch):
    monkeypatch.setattr("osscar.proof.structural.other_sizes", lambda *given: ())
    model = tiny("llama-gqa", layers=1).eval()
    ids = torch.arange(10).view(2, 5) + 3
    how = {"max_new_tokens": 4, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}

    def generated():
        return [
            torch.stack(model.generate(ids, cache_implementation=cache, **how).logits)
            for cache in ("dynamic", "static")
        ]

    plan = plan_of(model, inputs={"input_ids": ids})
    with masked(model, plan):
        expected = generated()
    assert shrink(model, plan, [{"input_ids": ids}]).certificate.structure is not None
    for found, due in zip(generated(), expected, strict=True):
        torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-5)
