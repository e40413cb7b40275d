"""Requests: what they take, what they refuse, and what the groups of a model then keep."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from graph import DependencyGraph, Size
from graph.groups import CouplingGroup, Freeze, Role, Slot, UnitKind
from osscar.allocation import allocate as allocation
from osscar.allocation.task import PruningTask, possible_widths
from osscar.base.errors import OptionError, RequestError
from osscar.base.ranks import ALONE
from osscar.recovery.request import RecoveryRequest
from osscar.request import PruningRequest as Asked
from osscar.request import parse_keep, parse_size_kept
from osscar.study.records import StudyDesign


def group(name, kind, units, *, width=1, frozen=()):
    slot = Slot(f"{kind}.weight", 1, Role.CONSUMER, str(kind), units, inner=width)
    return CouplingGroup(name, kind, units, (slot,), 10, frozen)


FREEZE = Freeze("attention mixes it", "aten.softmax.int", "block.attn")
GROUPS = (
    group("hidden", UnitKind.HIDDEN, 48, frozen=(FREEZE,)),
    group("0.heads", UnitKind.HEADS, 9, width=64),
    group("0.neurons", UnitKind.NEURONS, 1536),
)


def allocate(groups, asked):
    """Return what the groups of a model keep, where a budget is shared out uniformly."""
    sizes = {"hidden": 48, "heads": 576, "neurons": 1536}
    model = nn.ModuleDict({name: nn.Linear(inputs, 2) for name, inputs in sizes.items()})
    tensors = {
        one.slots[0].tensor: (Size.summed({(): 2}), Size.summed({(one.name,): one.slots[0].inner}))
        for one in groups
    }
    traced = DependencyGraph(tuple(groups), (), (), tensors)
    prepared = SimpleNamespace(model=model, groups=groups, every_group=groups, routed=(),
                               residual=frozenset(), sample={}, ranks=ALONE,
                               traced=traced, once=lambda _, make: make())  # fmt: skip
    if asked.has_budget:
        asked = dataclasses.replace(asked, allocation="uniform")
    return allocation.allocate(PruningTask(prepared, asked)).keep


def test_what_to_keep_is_a_fraction_or_a_count():
    for text, value in (
        *(("0.7", Fraction(7, 10)), (0.7, Fraction(7, 10)), ("2/3", Fraction(2, 3))),
        *(("70%", Fraction(7, 10)), ("100%", Fraction(1)), ("33.3 %", Fraction(333, 1000))),
        *(("512", 512), (512, 512), ("all", Fraction(1)), (1 / 768, Fraction(str(1 / 768)))),
    ):
        assert parse_keep(text) == value
    assert (type(parse_keep("all")), type(parse_keep(1))) == (Fraction, int)


KEPT = ("params", "heads", "neurons", "channels", "residual", "experts", "at_least")


@pytest.mark.parametrize("one", [1.0, "1.0", "1.", "1e0", "2/2", Fraction(1), np.float32(1)])
def test_one_head_and_all_heads_differ_by_more_than_a_dot(one):
    for name in KEPT:
        with pytest.raises(OptionError, match=f"{name} is .*; give 1 to keep one, or 'all'"):
            Asked(sparsity=0.3, **{name: one})
    with pytest.raises(OptionError, match=r"groups\.a is .*; give 1 to keep one, or 'all'"):
        Asked(groups={"a": one})
    for name in ("size", "memory"):
        with pytest.raises(OptionError, match=f"{name} is .*; give a fraction .* or a size"):
            Asked(**{name: one}, context=8)
    for wrong in (Fraction(3), 2.0, "3/2", 0, "0", "0%", -1, "All"):
        with pytest.raises(OptionError, match=r"give a fraction between 0 and 1, .* or 'all'"):
            Asked(heads=wrong)


def test_fractions_may_be_given_in_per_cent():
    asked = Asked(
        sparsity="30%", flops=" 62.5%", params="70%", size="80%", at_least="10%",
        correction_weight="50%", max_top1_drop=None, groups={"a": "25%"}, residual="90%",
    )  # fmt: skip
    assert (asked.sparsity, asked.flops, asked.correction_weight) == (0.3, 0.625, 0.5)
    assert [parse_keep(one) for one in (asked.params, asked.at_least, asked.groups["a"])] == [
        Fraction(7, 10), Fraction(1, 10), Fraction(1, 4)
    ]  # fmt: skip
    assert parse_size_kept(asked.size) == Fraction(4, 5)
    assert StudyDesign(sparsities=("25%", 0.5)).sparsities == (0.25, 0.5)
    for wrong in ({"sparsity": "130%"}, {"flops": "0%"}, {"params": "101%"}, {"sparsity": "a%"}):
        (name,) = wrong
        with pytest.raises(OptionError, match=rf"^{name} is .*; (it must be|give a fraction)"):
            Asked(**wrong)
    with pytest.raises(OptionError, match=r"groups\.1 is 1; it must be"):
        Asked(groups={1: 0.5})
    with pytest.raises(OptionError, match="max_divergence is '5%'; it"):  # nats are no fraction
        Asked(max_divergence="5%")


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (Asked(sparsity=0.3, round_to=1), {"0.heads": 6, "0.neurons": 1094}),
        (Asked(sparsity=0.3), {"0.heads": 6, "0.neurons": 1088}),
        (Asked(neurons=0.7), {"0.neurons": 1072}),
        (Asked(neurons=1075), {"0.neurons": 1075}),
        (Asked(heads=0.5, round_to=1), {"0.heads": 5}),
        (Asked(sparsity=0.5, heads="1/3"), {"0.heads": 3, "0.neurons": 768}),
        (Asked(sparsity=0.3, round_to=128), {"0.heads": 6, "0.neurons": 1024}),
        (Asked(sparsity=0.3, neurons="all", round_to=128), {"0.heads": 6}),
        (Asked(sparsity=0.5, groups={"0.neurons": 7}), {"0.heads": 4, "0.neurons": 7}),
    ],
)
def test_allocation(asked, kept):
    assert allocate(GROUPS, asked) == kept


@pytest.mark.parametrize(
    ("kind", "units", "at_least", "possible"),
    [
        (UnitKind.NEURONS, 16, None, range(1, 17)),
        (UnitKind.NEURONS, 17, None, (1, 4, 8, 16, 17)),
        (UnitKind.CHANNELS, 32, None, (1, 4, 8, 16, 24, 32)),
        (UnitKind.CHANNELS, 65, None, (1, 8, 16, 32, 48, 64, 65)),
        (UnitKind.NEURONS, 64, 20, (20, 24, 32, 40, 48, 56, 64)),
        (UnitKind.NEURONS, 96, 0.5, (48, 64, 80, 96)),
        (UnitKind.HEADS, 40, 30, range(30, 41)),
    ],
)
def test_widths_are_round_by_default_but_for_the_least_and_all(kind, units, at_least, possible):
    found = possible_widths(group("a", kind, units), Asked(flops=0.5, at_least=at_least).widths)
    assert found.tolist() == [*possible]


def test_equal_shares_spend_a_sparsity_to_the_last_neuron():
    for sparsity in (0.03, 0.3, 0.8):
        kept = allocate(GROUPS, Asked(sparsity=sparsity, round_to=1))
        heads, neurons = (kept.get(group.name, group.units) for group in GROUPS[1:])
        left = (1 - sparsity) * (9 * 128 + 1536 * 2) - (heads * 128 + neurons * 2)
        assert 0 <= left < 2
        assert abs(heads - 9 * neurons / 1536) < 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to prune"),
        ({"heads": 0.01}, "that is none of them"),
        ({"heads": 10}, "cannot keep 10 of '0.heads', which has 9 .*; give 1 to 9"),
        ({"groups": {"hidden": 3}}, r"attention mixes it \(aten.softmax.int in block.a"),
        ({"sparsity": 0.5, "skip": ["7.*"]}, r"no group is called '7\.\*', which skip .*names"),
    ],
)
def test_requests_that_make_no_sense_are_refused(asked, message):
    with pytest.raises(RequestError, match=message):
        allocate(GROUPS, Asked(**asked))


def test_numbers_of_other_libraries_are_plain_in_what_is_saved():
    given = {"sparsity": Fraction(1, 2), "damp": np.float32(0.5), "seed": np.int64(3)}
    given |= {"heads": Fraction(2, 3), "neurons": np.int64(7), "residual": np.float32(0.5)}
    given |= {"device": torch.device("cpu"), "backend_options": {"max_swaps": np.int64(3)}}
    data = json.loads(json.dumps(Asked(**given).to_json()))
    told = {"sparsity": 0.5, "damp": 0.5, "seed": 3, "heads": "2/3", "neurons": "7"}
    told |= {"residual": "0.5", "device": "cpu", "backend_options": {"max_swaps": 3}}
    assert data == {**Asked(sparsity=0.5).to_json(), **told}
    assert Asked(**data) == Asked(**told)
    asked = RecoveryRequest(max_memory=np.int64(10**9), steps=np.int32(3)).to_json()
    assert json.loads(json.dumps(asked)) == RecoveryRequest(max_memory="1GB", steps=3).to_json()


def test_help_and_signature_name_every_field():
    fields = [field.name for field in dataclasses.fields(Asked)]
    parameters = inspect.signature(osscar.prune).parameters
    assert inspect.signature(osscar.prune).return_annotation is not inspect.Signature.empty
    assert list(parameters) == ["model", "calibration", *fields]
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in fields)
    entries = re.findall(r"^(\w[\w, ]*)$", inspect.getdoc(osscar.prune), re.MULTILINE)
    described = {name for names in entries for name in names.split(", ")}
    assert described >= {"model", "calibration", *fields}
    assert "request" not in described


def test_a_request_is_read_without_torch_and_leaves_no_half_loaded_solvers():
    # A lazy module in the place of `solvers` would let `import solvers.errors` run that file twice.
    code = "import sys, osscar.request; sys.exit(bool({'torch', 'solvers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
