"""A smaller model is right for all inputs, not for those alone on which outputs are compared.

Each network here computes something of the width of a layer that is pruned, mostly where inputs
that are drawn do not show it.  It may be refused, its program may be shrunk, or its modules: what
comes out has to be right on all inputs, against a model in which the units are masked by hand.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graph
import osscar
from osscar.base.errors import EquivalenceError, ModelError
from osscar.proof.equivalence import masked
from osscar.proof.lineage import lineage_of
from osscar.proof.plan import Form, GroupPlan, PruningPlan
from osscar.proof.program import traced_as_open
from osscar.proof.structural import StructureError, dense_programs
from osscar.shrinking import follow
from osscar.shrinking.shrink import shrink
from osscar.shrinking.slice import slice_units
from tests.osscar.detector import detector
from tests.osscar.families import tiny

UNITS, KEPT = 20, 10


@pytest.fixture(autouse=True)
def sizes_are_open(monkeypatch):
    """Leave sizes open, and export for others, as for users."""
    monkeypatch.setattr("osscar.proof.structural._MOST_PROGRAMS", 2)
    monkeypatch.setattr("osscar.proof.structural.traced_as_open", traced_as_open)


class Net(nn.Module):
    """Two layers; `after` is what a network makes of their output and of the width between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, UNITS), nn.Linear(UNITS, 7)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        h = torch.relu(self.a(x))
        return self.after(self.b(h), x, h.shape[-1])

    def after(self, y: Tensor, x: Tensor, w: int) -> Tensor | tuple[Tensor, ...]:
        return y


def is_rare(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True) > 50


class LongInputs(Net):
    def after(self, y, x, w):
        return y * (UNITS / w) if x.shape[1] > 16 else y


class LargeBatches(Net):
    def after(self, y, x, w):
        return y / w**0.5 if x.shape[0] > 4 else y


class OneSample(Net):
    def after(self, y, x, w):
        return y * w if x.shape[0] == 1 else y


class Clamped(Net):
    def after(self, y, x, w):
        return y.clamp(-2 * w**0.5, 2 * w**0.5)


class RareScale(Net):
    def after(self, y, x, w):
        return torch.where(is_rare(x), y / w, y)


class RareRoll(Net):
    def after(self, y, x, w):
        return torch.where(is_rare(x), y.roll(w % 3, -1), y)


class LargeOutputs(Net):
    def after(self, y, x, w):
        return torch.where(y.abs() > 100, y.tanh() * w, y)


class BesidePixels(Net):
    def __init__(self) -> None:
        super().__init__()
        self.box = nn.Linear(6, 4)

    def after(self, y, x, w):
        return torch.cat([self.box(x).sigmoid() * 1280, y / w**0.5], -1)


class WholeNumbers(Net):
    def after(self, y, x, w):
        return y, (y * 100 / w).round().long()


class LengthOfAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.names = [f"unit {index}" for index in range(UNITS)]

    def after(self, y, x, w):
        return y / len(self.names)


class BufferOfTheWidth(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(UNITS**-0.5))

    def after(self, y, x, w):
        return y * self.scale


@dataclasses.dataclass
class Config:
    intermediate_size: int = UNITS


class FromItsConfig(Net):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def forward(self, x):
        return self.b(torch.relu(self.a(x))) / self.config.intermediate_size


class CountThatFollows(Net):
    def __init__(self) -> None:
        super().__init__()
        self.hidden_features = UNITS

    def after(self, y, x, w):
        return y / self.hidden_features


class TensorOfTheWidth(Net):
    def __init__(self) -> None:
        super().__init__()
        self.width = torch.tensor(float(UNITS))

    def after(self, y, x, w):
        return y / self.width


class Index(Net):
    def after(self, y, x, w):
        return torch.where(is_rare(x), y[..., w % 7].unsqueeze(-1), y)


class Masked(Net):
    def after(self, y, x, w):
        return y.masked_fill((torch.arange(7) < w // 4) & is_rare(x), 0.0)


class Temperature(Net):
    def after(self, y, x, w):
        return torch.where(is_rare(x), (y / w**0.5).softmax(-1), y)


class Window(Net):
    def after(self, y, x, w):
        return torch.where(is_rare(x), F.avg_pool1d(y, 2 * (w // 8) + 1, 1, w // 8), y)


class Positions(Net):
    def after(self, y, x, w):
        return y + torch.arange(x.shape[1])[:, None].clamp_min(16).sub(16) / w


class Strides(Net):
    """Reads numbers out of tensors, as detectors do with their strides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("strides", torch.tensor([8.0, 16.0]))

    def after(self, y, x, w):
        return y * torch.full((7,), self.strides[1], dtype=x.dtype)


class ReadOutOfTheWidth(Net):
    def after(self, y, x, w):
        return torch.where(is_rare(x), y * torch.full((7,), torch.tensor(float(w))), y)


class ReadFromOneOfTwo(Net):
    """Reads a number from one tensor or another, both of which are computed in any case."""

    def after(self, y, x, w):
        least, most = x.amin(), x.amax()
        number = (most if w == UNITS else least).item()
        return torch.where(is_rare(x), y * number, y + 0 * least + 0 * most)


class ReadBeforeItIsWritten(Net):
    def after(self, y, x, w):
        count = torch.zeros_like(x.sum())
        early = count.item()
        count.add_(1)
        late = count.item()
        return torch.where(is_rare(x), y * early + late if w == UNITS else y * late + early, y)


class SignOfZero(Net):
    def after(self, y, x, w):
        zero = torch.full((7,), math.copysign(0.0, w - UNITS + 1))
        return torch.where(is_rare(x), torch.atan2(y * 0, zero), y)


class BranchOfTheProgram(Net):
    def after(self, y, x, w):
        return torch.cond(x.shape[0] > w // 4, lambda y: y * 2, lambda y: y + 1, (y,))


class Plain(Net):
    pass


NETS = [
    *(LongInputs, LargeBatches, OneSample, Clamped, RareScale, RareRoll, LargeOutputs),
    *(BesidePixels, WholeNumbers, LengthOfAList, BufferOfTheWidth, FromItsConfig),
    *(CountThatFollows, TensorOfTheWidth, Index, Masked, Temperature, Window, Positions, Plain),
    *(Strides, ReadOutOfTheWidth, ReadFromOneOfTwo, ReadBeforeItIsWritten, SignOfZero),
    BranchOfTheProgram,
]
SIZES = [(2, 5), (1, 5), (9, 5), (3, 16), (3, 33), (1, 1)]


def masked_by_hand(net: Net, smaller: nn.Module, kept: list[int]) -> Net:
    """Return the dense network with the refitted weights, and zeros where units have left."""
    made = copy.deepcopy(net)
    with torch.no_grad():
        weight = torch.zeros_like(made.b.weight)
        weight[:, kept] = smaller.get_parameter("b.weight")
        made.b.weight.copy_(weight)
        made.b.bias.copy_(smaller.get_parameter("b.bias"))
    return made


def flat(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_what_is_accepted_is_right_on_all_inputs(kind):
    torch.manual_seed(0)
    net = kind().double().eval()
    try:
        result = osscar.prune(net, torch.randn(32, 5, 6, dtype=torch.float64), neurons=KEPT)
    except EquivalenceError as error:
        assert "of a width that is pruned" in str(error)  # noqa: PT017
        return
    assert result.certificate.structure is not None
    (group,) = result.plan.groups
    masked = masked_by_hand(net, result.model, list(group.kept))
    compared = 0
    for shape in SIZES:
        for size in (1.0, 100.0):
            x = size * torch.randn(*shape, 6, dtype=torch.float64)
            try:
                found = result.model(x)
            except ModelError:  # a program that says for which sizes it holds
                assert result.form is Form.EXPORTED
                continue
            compared += 1
            for one, other in zip(flat(masked(x)), flat(found), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert compared > 4


def plan_of(net: nn.Module) -> PruningPlan:
    (group,) = graph.trace(net, (torch.randn(2, 5, 6),)).prunable
    return PruningPlan((GroupPlan.of(group, tuple(range(0, UNITS, 2))),))


def test_modules_that_make_numbers_of_a_width_are_named_with_the_line():
    net, x = RareScale().eval(), torch.randn(2, 5, 6)
    with pytest.raises(EquivalenceError, match=r"self\.after\(self\.b\(h\), x, .*10.*20"):
        shrink(net, plan_of(net), [(x,)])
    assert net.a.out_features == UNITS


def test_the_certificate_says_what_is_equal_and_for_which_sizes():
    net, x = Strides().eval(), torch.randn(2, 5, 6)
    assert shrink(net, plan_of(net), [(x,)]).certificate.structure is not None
    net = Plain().eval()
    found = shrink(net, plan_of(net), [(x,)]).certificate.structure
    assert (found.operators, found.tensors) == (3, 4)
    assert found.sizes == ("x (any, any, 6)",)


class BranchOnLength(Net):
    """Does something else for long inputs, which is right for any width."""

    def after(self, y, x, w):
        return y.flip(1) if x.shape[1] > 16 else y


def test_both_sides_of_a_branch_on_a_size_are_proved():
    net, x = BranchOnLength().eval(), torch.randn(2, 5, 6)
    found = shrink(net, plan_of(net), [(x,)]).certificate.structure
    assert found.sizes == (
        "x (any, any, 6) where x.shape[1] <= 16",
        "x (any, any, 6) where x.shape[1] > 16",
    )


def test_values_are_compared_that_only_inputs_of_other_sizes_read():
    class Longer(BranchOnLength):
        def after(self, y, x, w):
            return y * self.scale if x.shape[1] > 16 else y

    net, x = Longer(), torch.randn(2, 5, 6)
    net.register_buffer("scale", torch.ones(7))
    plan, before = plan_of(net.eval()), dict(copy.deepcopy(net).state_dict())
    programs = dense_programs(net, {"x": x})
    shrink(net, plan, [(x,)], programs=programs)
    net.scale[0] = 2
    with pytest.raises(StructureError, match="'scale' of the smaller model has other values"):
        programs.prove(net, plan, before)


class AtOneLength(Net):
    def after(self, y, x, w):
        return y / w if x.shape[1] == 23 else y


class ByAnotherProduct(Net):
    def after(self, y, x, w):
        return y / w if x.shape[0] * x.shape[1] > 170 else y


@pytest.mark.parametrize("kind", [AtOneLength, ByAnotherProduct])
def test_sizes_that_were_not_proved_are_not_claimed(kind):
    net, x = kind().eval(), torch.randn(2, 5, 6)
    try:
        found = shrink(net, plan_of(net), [(x,)]).certificate.structure
    except EquivalenceError:
        return
    assert all(" where " in size for size in found.sizes)


class WithNumber(Net):
    def forward(self, x, k=0):
        h = torch.relu(self.a(x))
        return self.b(h) / h.shape[-1] if k > 4 else self.b(h)


def test_arguments_that_are_no_tensors_are_part_of_the_claim():
    net, inputs = WithNumber().eval(), {"x": torch.randn(2, 5, 6), "k": 3}
    (group,) = graph.trace(net, inputs).prunable
    plan = PruningPlan((GroupPlan.of(group, tuple(range(0, UNITS, 2))),))
    assert shrink(net, plan, [inputs]).certificate.structure.sizes == ("x (any, any, 6), k = 3",)


class ReadsMemory(Net):
    def after(self, y, x, w):
        t = y.transpose(1, 2)
        t = t.contiguous() if w < UNITS else t
        return torch.where(is_rare(x), torch.as_strided(t, (7,), (1,)), y)


def test_copies_count_where_the_order_in_memory_is_read():
    net, x = ReadsMemory().eval(), torch.randn(2, 5, 6)
    with pytest.raises(EquivalenceError):
        shrink(net, plan_of(net), [(x,)])


class Scaled(Net):
    """Reads a number of its own and a buffer, which adapters of the tests change."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.register_buffer("t", torch.ones(7))

    def after(self, y, x, w):
        return torch.where(is_rare(x), y * self.t * self.factor, y)


def by_which_units_stay(module, group):
    module.factor = 1.0 if group.kept[0] == 0 else 2.0


def in_place(module, group):
    module.t.mul_(2)


@pytest.mark.parametrize("change", [by_which_units_stay, in_place])
def test_what_an_adapter_changes_is_compared_for_the_units_that_stay(change, monkeypatch):
    monkeypatch.setitem(follow._ADAPTERS, f"{Scaled.__module__}.{Scaled.__qualname__}", change)
    net, x = Scaled().eval(), torch.randn(2, 5, 6)
    programs = dense_programs(net, {"x": x})
    (group,) = graph.trace(net, (x,)).prunable
    refused = 0
    for first in (0, 1):
        plan = PruningPlan((GroupPlan.of(group, tuple(range(first, UNITS, 2))),))
        try:
            shrink(copy.deepcopy(net), plan, [(x,)], programs=programs)
        except EquivalenceError:
            refused += 1
    assert refused == (2 if change is in_place else 1)


class Nested(Net):
    """Branches within a branch, and outside of both a write that tells a copy from the value."""

    divisor, copied = 3, True

    def after(self, y, x, w):
        def inner(y):
            return torch.cond(y.amax() > 5, lambda y: y / self.divisor, lambda y: y * 2, (y,))

        made = torch.cond(x.amax() > 50, lambda y: y * 3, inner, (y,))
        other = y.clone()
        other.view(-1).add_(1)
        return torch.where(is_rare(x), made + (other if self.copied else y), made) + 0 * other


def test_branches_that_a_program_contains_are_compared(monkeypatch):
    monkeypatch.setattr("osscar.proof.structural._MOST_PROGRAMS", 1)
    net, x = Nested().eval(), torch.randn(2, 5, 6)
    programs, plan = dense_programs(net, {"x": x}), plan_of(net)
    slice_units(net, plan)
    assert programs.prove(net, plan).tensors == 4
    for change in ({"divisor": 4}, {"divisor": 3.0}, {"copied": False}):
        changed = copy.deepcopy(net)
        vars(changed).update(change)
        with pytest.raises(StructureError):
            programs.prove(changed, plan, anew=True)


def tampered(net: Net, how: str) -> Net:
    """Return a smaller network in which one thing is wrong that shapes do not show."""
    with torch.no_grad():
        if how == "a row of another unit":
            net.a.weight[0].copy_(net.a.weight[1])
        elif how == "a bias":
            net.b.bias[0] += 1e-3
        elif how == "another nonlinearity":
            net.forward = lambda x: net.b(torch.nn.functional.gelu(net.a(x)))
        elif how == "layers in another order":
            net.forward = lambda x: torch.relu(net.b(net.a(x)))
    return net


@pytest.mark.parametrize(
    "how", ["a row of another unit", "a bias", "another nonlinearity", "layers in another order"]
)
def test_whatever_is_changed_beside_the_units_is_seen(how):
    net, x = Plain().eval(), torch.randn(2, 5, 6)
    plan, before = plan_of(net), dict(copy.deepcopy(net).named_parameters())
    programs, again = (dense_programs(net, {"x": x}) for _ in range(2))
    shrink(net, plan, [(x,)], programs=programs)
    programs.prove(net, plan, before)
    with pytest.raises(StructureError):
        again.prove(tampered(net, how), plan, before)


class Blocks(nn.Module):
    """Four blocks alike, of which code of one uses its width."""

    def __init__(self, culprits: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(index in culprits) for index in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Block(nn.Module):
    def __init__(self, culprit: bool) -> None:
        super().__init__()
        self.up, self.down, self.culprit = nn.Linear(6, UNITS), nn.Linear(UNITS, 6), culprit

    def forward(self, x):
        h = torch.relu(self.up(x))
        y = self.down(h)
        return torch.where(is_rare(x), y / h.shape[-1], y) if self.culprit else y


@pytest.mark.parametrize("culprits", [(2,), (0, 1, 2, 3)])
def test_groups_are_left_out_for_what_their_own_modules_do(culprits):
    net = Blocks(culprits).eval()
    data = torch.randn(16, 5, 6)
    if len(culprits) == 4:
        with pytest.raises(EquivalenceError) as caught:
            osscar.prune(net, data, neurons=0.5, form="eager")
        assert all(f"blocks.{i}'" in str(caught.value) for i in culprits)
        return
    with pytest.warns(UserWarning, match=r"skipped.*blocks\.2"):
        result = osscar.prune(net, data, neurons=0.5, form="eager")
    assert [one.name for one in result.skipped] == ["blocks.2.neurons"]
    assert "y / h.shape[-1]" in result.skipped[0].reason
    assert len(result.layers) == 3


class Untraceable(Net):
    """Its code looks at values, which no export can follow once a layer is smaller."""

    def after(self, y, x, w):
        if w < UNITS and float(y.detach().sum()) > 1e9:
            return y + 1
        return y


def test_what_cannot_be_exported_any_more_is_compared_and_says_so():
    net, x = Untraceable().eval(), torch.randn(2, 5, 6)
    certificate = shrink(net, plan_of(net), [(x,)]).certificate
    assert certificate.structure is None
    assert "cannot be exported" in certificate.unproved
    assert certificate.rows()[0][0] == "not proved, but compared"


def test_a_saved_model_is_proved_again_from_the_two_models(tmp_path):
    torch.manual_seed(0)
    net, data = Plain().eval(), torch.randn(32, 5, 6)
    saved = osscar.prune(net, data, neurons=KEPT).save(tmp_path / "small")
    again = osscar.load(saved.path, dense=net)
    assert lineage_of(again).certificates[-1].structure is not None
    assert osscar.prove(again, net, {"x": data[:2]}).operators == 3
    again.forward = lambda x: again.b(torch.relu(again.a(x))) / again.a.out_features
    with pytest.raises(StructureError, match=r"aten\.div"):
        osscar.prove(again, net, {"x": data[:2]})
    with pytest.raises(ModelError, match="no units were removed"):
        osscar.prove(net, net, {"x": data[:2]})


def test_generation_with_a_cache_is_that_of_the_masked_model():
    model = tiny("llama-gqa", layers=1).eval()
    ids = torch.arange(10).view(2, 5) + 3
    how = {"max_new_tokens": 4, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}

    def generated():
        return [
            torch.stack(model.generate(ids, cache_implementation=cache, **how).logits)
            for cache in ("dynamic", "static")
        ]

    groups = graph.trace(model, {"input_ids": ids}).prunable
    plan = PruningPlan(tuple(GroupPlan.of(g, tuple(range(0, g.units, 2))) for g in groups))
    with masked(model, plan):
        expected = generated()
    certificate = shrink(model, plan, [{"input_ids": ids}]).certificate
    assert certificate.structure is not None
    for found, due in zip(generated(), expected, strict=True):
        torch.testing.assert_close(found, due, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_many_outputs_of_a_detector_are_proved_for_images_of_any_size():
    model, images = detector(), torch.randn(3, 3, 64, 64)
    groups = graph.trace(model, (images,)).prunable
    plan = PruningPlan(tuple(GroupPlan.of(g, tuple(range(0, g.units, 2))) for g in groups))
    certificate = shrink(model, plan, [(images,)]).certificate
    assert certificate.structure is not None
    assert certificate.structure.sizes == ("x (any, 3, any, any)",)
