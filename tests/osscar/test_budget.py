"""One budget for all layers: curves, costs, the search, and what a request comes to."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import osscar
from osscar.allocation.allocate import allocate
from osscar.allocation.budget import Budget
from osscar.allocation.costs import Cost, Costs, CountedCost, count
from osscar.allocation.divergence import Distance, Reference, as_logits, table_of
from osscar.allocation.measured import summed_losses
from osscar.allocation.search import Search
from osscar.base.errors import NonFiniteError, RequestError
from osscar.base.printable import engineering
from osscar.data.batches import ModelInputs
from osscar.evaluation.size import count_owned
from osscar.network.modules import copied, count_parameters
from osscar.network.operations import count_flops
from osscar.preparation.prepare import prepare
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.request import BudgetKind
from osscar.request import PruningRequest as Asked
from osscar.run.widths import goal
from osscar.shrinking.slice import slice_units
from solvers import SubsetProblem
from solvers.closed_forms.elimination import eliminate
from solvers.closed_forms.refit import refit
from tests.osscar.families import tiny, tokens

# ---- the search --------------------------------------------------------------------------


def searched(losses, *costs):
    """Return a search over groups with a loss for each width, whose units cost so much each."""
    units = {name: len(some) - 1 for name, some in losses.items()}
    options = {name: np.arange(len(some)) for name, some in losses.items()}
    return Search(options, losses, {}, Costs(tuple(CountedCost((), 0.0, c, units) for c in costs)))


@st.composite
def groups_with_losses(draw):
    """Losses of a few groups by what they keep, convex or not, costs of a unit, and a limit."""
    losses = {}
    for index, units in enumerate(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))):
        falls = draw(st.lists(st.floats(0, 8), min_size=units, max_size=units))
        curve = np.append(np.cumsum(falls)[::-1], 0.0) * 10.0 ** draw(st.integers(-6, 2))
        losses[str(index)] = curve
    costs, limits = [], []
    for _ in range(draw(st.integers(1, 3))):
        units = {name: float(draw(st.integers(0, 19))) for name in losses}
        most = sum(cost * (len(losses[name]) - 1) for name, cost in units.items())
        costs.append(units)
        limits.append(draw(st.floats(0, 1)) * most)
    return losses, costs, limits


@given(groups_with_losses())
@example(({"0": np.array([1.0, 5e-324, 0.0])}, [{"0": 2.0}], [2.0]))
@example(
    (  # what HiGHS would take for within the limit
        {"0": np.array([1.0, 0.0]), "1": np.array([1.0, 0.0]), "2": np.array([1.5, 0.0])},
        [{"0": 1.0, "1": 1.0, "2": 1.0}],
        [2 * (1 - 3e-8)],
    )
)
@settings(max_examples=200, deadline=None)
def test_widths_are_nearly_those_that_trying_everything_finds(problem):
    losses, costs, limits = problem
    search = searched(losses, *costs)

    def within(widths, slack):
        spent = (sum(cost[name] * k for name, k in widths.items()) for cost in costs)
        return all(one <= limit * (1 + slack) for one, limit in zip(spent, limits, strict=True))

    every = itertools.product(*(range(len(some)) for some in losses.values()))
    choices = (dict(zip(losses, counts, strict=True)) for counts in every)
    best = min(search.loss(widths) for widths in choices if within(widths, 1e-12))
    kept, bound, prices = search.choose(limits)
    assert within(kept, 1e-9)
    assert (prices >= 0).all()
    assert best <= search.loss(kept) * (1 + 1e-12) <= 1.005 * best + 1e-300
    assert bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("limits", [1, 2, 3])
def test_a_search_over_many_widths_has_a_small_gap(limits):
    random = np.random.default_rng(0)
    falls = {str(g): np.sort(random.exponential(size=1536) ** 3) for g in range(60)}
    losses = {name: np.append(some.cumsum()[::-1], 0.0) for name, some in falls.items()}
    costs = [{name: float(random.integers(1000, 9000)) for name in losses} for _ in range(limits)]
    search = searched(losses, *costs)
    kept, bound, _ = search.choose([0.6 * cost.dense for cost in search.costs.each])
    assert search.loss(kept) - bound < 1e-4 * search.loss(kept)


def test_groups_whose_losses_are_their_costs_are_searched_to_an_end():
    losses = {str(g): np.arange(50.0)[::-1] * (g + 1) for g in range(12)}
    search = searched(losses, {str(g): float(g + 1) for g in range(12)})
    kept, bound, _ = search.choose([0.5 * search.costs.each[0].dense])
    assert search.loss(kept) - bound <= 1e-3 * search.loss(kept)


# ---- costs -------------------------------------------------------------------------------


class Net(nn.Module):
    """A plain CNN: filters shrink along both dimensions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(12, 16, 3, stride=2), nn.ReLU())
        self.third = nn.Conv2d(16, 10, 3, groups=2)
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(torch.relu(self.third(self.second(self.first(x)))).mean((2, 3)))


def experts(kernel="grouped_mm"):
    """Build a Mixtral."""
    config = MixtralConfig(
        vocab_size=97, hidden_size=16, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(kernel)
    return model


MODELS = {
    "experts": (experts, lambda: tokens(8, 24)),
    "opt": (lambda: tiny("opt"), lambda: tokens(8, 24)),
    "gpt2": (lambda: tiny("gpt2"), lambda: tokens(8, 24)),
    "llama-gqa": (lambda: tiny("llama-gqa"), lambda: tokens(8, 24)),
    "cnn": (Net, lambda: torch.randn(12, 3, 14, 14)),
}


@pytest.fixture(params=[name for name in MODELS if name != "experts"])
def subject(request):
    torch.manual_seed(0)
    build, data = MODELS[request.param]
    return build().eval(), data()


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "experts"])
def prepared(request):
    """One of the models with its data, open."""
    torch.manual_seed(0)
    build, data = MODELS[request.param]
    with prepare(build().eval(), data()) as prepared:
        yield prepared


@pytest.fixture(scope="module")
def opt():
    with prepare(tiny("opt"), tokens(8, 24)) as prepared:
        yield prepared


@pytest.mark.sampled(3)
@pytest.mark.parametrize("subject", MODELS, indirect=True)
@pytest.mark.parametrize("cost", [Cost.PARAMETERS, Cost.FLOPS])
def test_costs_are_those_of_the_model_that_is_really_smaller(subject, cost):
    model, data = subject
    with prepare(model, data) as prepared:
        found = count(cost, prepared.model, prepared.groups, prepared.sample)
        groups = [group for group in prepared.groups if group.prunable and group.units > 1]
        counts = {g.name: max(1, g.units // (2 + index % 2)) for index, g in enumerate(groups)}
        sample, smaller = prepared.sample, copied(prepared.model)
    slice_units(
        smaller, PruningPlan(tuple(GroupPlan.of(g, tuple(range(counts[g.name]))) for g in groups))
    )

    def measured(network):
        return (
            count_parameters(network) if cost is Cost.PARAMETERS else count_flops(network, sample)
        )

    assert found.dense == pytest.approx(measured(model))
    assert found.of(counts) == pytest.approx(measured(smaller))
    name = next(iter(counts))
    fewer = {**counts, name: counts[name] - 1}
    over = found.over(name, np.array([counts[name] - 1, counts[name]]), counts)
    assert over[1] - over[0] == pytest.approx(found.of(counts) - found.of(fewer))


def test_operations_of_experts_are_the_same_whichever_kernel_multiplies():
    inputs = {"input_ids": torch.arange(24)[None]}
    counted = {count_flops(experts(kernel), inputs) for kernel in ("grouped_mm", "batched_mm")}
    counted.add(count_flops(experts("eager"), inputs))
    (found,) = counted
    # A gate has two matrices, the output one; each row meets two experts, in two layers.
    of_experts = 2 * 2 * (24 * 2) * 3 * 16 * 48
    layers = (m for m in experts().modules() if isinstance(m, nn.Linear | MixtralTopKRouter))
    of_layers = sum(2 * 24 * layer.weight.numel() for layer in layers)
    scores = 2 * 2 * 24 * 24 * 16 * 2  # and weighted sums
    assert found == of_experts + of_layers + scores


# ---- curves ------------------------------------------------------------------------------


def test_a_shape_is_that_of_fresh_refits():
    torch.manual_seed(0)
    X, W0 = torch.randn(40, 9).double(), torch.randn(9, 3).double()
    problem = SubsetProblem.from_gram(X.T @ X / 40, W0, keep=9)
    curve = summed_losses(problem, eliminate(problem, 8))
    assert len(curve) == 10
    assert curve[9] == 0
    assert curve[0] == pytest.approx(problem.scale)
    assert (np.diff(curve) <= 0).all()
    best_of_eight = min(
        refit(problem, torch.tensor([u for u in range(9) if u != gone]))[1] for gone in range(9)
    )
    assert curve[8] == pytest.approx(best_of_eight)


# ---- requests ----------------------------------------------------------------------------


@pytest.mark.sampled(8)
@pytest.mark.parametrize("allocation", ["measured", "uniform"])
@pytest.mark.parametrize(
    "asked",
    [
        {"sparsity": 0.4},
        {"params": 0.8},
        {"size": 0.8},
        {"flops": 0.7},
        {"sparsity": 0.5, "round_to": 2},
        {"params": 0.8, "at_least": "1/3"},
        {"params": 0.8, "flops": 0.7},
        {"sparsity": 0.2, "params": 0.9, "size": 0.8, "flops": 0.8},
    ],
)
def test_budgets_are_kept_and_reports_are_right(prepared, asked, allocation):
    found = allocate(prepared, Asked(**asked, allocation=allocation))
    budget = found.budget
    assert {one.budget for one in budget.limits} == asked.keys() & {*BudgetKind}
    assert budget.tightest.reached >= 0.7 * budget.tightest.limit
    for one in budget.limits:
        assert one.reached <= one.limit * (1 + 1e-9)
        cost = count(one.cost, prepared.model, prepared.groups, prepared.sample)
        assert one.dense == cost.dense
        assert one.reached == pytest.approx(cost.of(found.keep), rel=1e-12)
        assert (one.price is None) == (allocation == "uniform")
    assert {n: w.kept for n, w in budget.widths.items() if w.kept < w.units} == found.keep
    if budget.tightest.cost is Cost.PARAMETERS:
        assert budget.tightest.dense == count_parameters(prepared.model)
    if "at_least" in asked:
        assert all(3 * width.kept >= width.units for width in budget.widths.values())
    if allocation == "measured":
        assert budget.predicted > 0
        assert budget.gap <= 1e-3


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_a_slack_budget_changes_nothing_and_a_binding_one_is_said_to_bind(opt, allocation):
    def allocated(**asked):
        return allocate(opt, Asked(**asked, allocation=allocation))

    alone = allocated(flops=0.7)
    both = allocated(flops=0.7, params=1.0)
    assert both.keep == alone.keep
    assert both.budget.tightest.budget == "flops"
    assert both.budget.frontier == alone.budget.frontier
    if allocation == "measured":
        assert [one.price > 0 for one in both.budget.limits] == [True, False]
        assert both.budget.gap <= 1e-3
    with pytest.raises(RequestError, match=r"^flops=0.01 cannot be met"):
        allocated(flops=0.01, params=0.9)
    with pytest.raises(RequestError, match=r"^params=1 size=10MB asks for no less than there is"):
        allocated(size="10MB", params=1.0)


def test_buffers_count_and_the_most_that_one_may_ask_for_is_all():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    net = net.eval().half().float()
    with prepare(net, torch.randn(4, 3, 8, 8)) as prepared:
        cost = count(Cost.BYTES, prepared.model, prepared.groups, prepared.sample)
    entries = sum(4 * p.numel() for p in net.parameters()) + 2 * 8 * 4 + 8  # and an int64
    assert cost.dense == entries


def test_uniform_shares_do_not_miss_a_budget_for_what_is_kept_at_least(opt):
    few = Asked(sparsity=0.7, at_least=0.9, allocation="uniform")
    with pytest.raises(RequestError, match=r"sparsity=0.7 cannot be met"):
        allocate(opt, few)
    assert allocate(opt, Asked(sparsity=0.3, at_least=0.2, allocation="uniform")).keep


def test_every_group_keeps_what_it_is_to_keep_at_least(opt):
    def fewest(least):
        widths = allocate(opt, Asked(sparsity=0.6, at_least=least)).budget.widths.values()
        return min(width.kept / width.units for width in widths)

    assert fewest(None) < 1 / 3 <= fewest("1/3")
    assert fewest(3) >= 3 / 40
    with pytest.raises(RequestError, match="cannot be met"):
        fewest("0.9")


def test_kinds_that_are_named_take_no_part_in_the_budget(opt):
    units = {group.name: (group.kind, group.units) for group in opt.groups}
    found = allocate(opt, Asked(sparsity=0.5, heads=1.0))
    assert {units[name][0] for name in found.keep} == {"neurons"}
    half = allocate(opt, Asked(params=0.6, heads="1/2"))
    kept = {name: k for name, k in half.keep.items() if units[name][0] == "heads"}
    assert set(kept.values()) == {opt.model.config.num_attention_heads // 2}
    assert half.budget.tightest.reached <= 0.6 * half.budget.tightest.dense


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_a_budget_out_of_reach_says_what_is_in_reach(allocation, opt):
    message = r"cannot be met: .* comes to [\d,]+ of [\d,]+ at l"
    with pytest.raises(RequestError, match=message):
        allocate(opt, Asked(params=0.01, allocation=allocation))


class Shortcut(nn.Sequential):
    """Two convolutions whose outputs are added to what they read."""

    def forward(self, x):
        return x + super().forward(x)


def test_a_budget_out_of_reach_names_residual_channels_that_it_leaves_alone():
    torch.manual_seed(0)
    block = Shortcut(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 7), block, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = torch.randn(8, 3, 8, 8)
    message = r"or let residual channels leave, too, .*\(residual=\): '.*channels'$"
    with pytest.raises(RequestError, match=message):
        osscar.prune(model, x, flops=0.5, allocation="uniform")
    found = osscar.prune(model, x, flops=0.5, residual=0.25, allocation="uniform")
    assert found.model[0].out_channels == 2


# ---- what is not in a layer --------------------------------------------------------------


class FunctionalHead(nn.Module):
    """A block with heads and neurons; its output layer is no module."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(40, 16))
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.scale * self.down(torch.relu(self.up(x)))
        return x @ self.embedding.T


class Scaled(nn.Module):
    """A module with a weight of its own that has layers inside."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x @ self.weight)))


@pytest.mark.parametrize("build", [FunctionalHead, Scaled])
@pytest.mark.parametrize("share", [0.9, 0.75])
def test_operations_outside_of_layers_are_no_groups(build, share):
    torch.manual_seed(0)
    model = build().eval()
    x = torch.randn(16, 5, 16) if build is FunctionalHead else torch.randn(16, 6)
    result = osscar.prune(model, x, flops=share, backend="wanda")
    with prepare(model, x) as prepared:  # attention calls its output layer there, as it is counted
        dense = count_flops(prepared.model, prepared.sample)
        smaller = count_flops(result.model, prepared.sample)
    assert smaller <= share * dense * 1.001
    assert result.budget.tightest.reached / result.budget.tightest.dense == pytest.approx(
        smaller / dense, rel=1e-3
    )


# ---- what is no prediction ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "x", "expected"),
    [
        ((8, 5), (8, 3, 6, 6), True),  # a classifier of images
        ((8, 5), (8, 3), False),  # a regression, for all that is known
        ((8, 5, 4, 4), (8, 3, 4, 4), False),  # a map for each class
        ((8,), (8, 3), False),
        ((), (8, 3), False),
    ],
)
def test_what_is_taken_for_logits(shape, x, expected):
    batch = {"x": torch.randn(x)}
    found = table_of(torch.randn(shape), batch, ModelInputs(batch))
    assert (found is not None) == expected


def test_probabilities_are_taken_for_what_they_are():
    logits = torch.randn(8, 5)
    batch = {"x": torch.randn(8, 3, 6, 6)}
    found = as_logits(table_of(logits.softmax(-1), batch, ModelInputs(batch)))
    torch.testing.assert_close(found.softmax(-1), logits.softmax(-1))


def test_a_divergence_is_from_the_dense_predictions_and_from_nothing_finite_an_error():
    logits = torch.randn(2, 4, 5)
    logits[0, :, 0] = -torch.inf
    dense, other = logits.log_softmax(-1)
    batch = {"x": torch.zeros(4, 3, 2, 2)}

    class Puts(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.out = nn.Parameter(out)

        def forward(self, x):
            return self.out

    distance = Distance(ModelInputs(batch), "nats")
    reference = Reference(distance, [batch], [dense])
    assert reference.divergence(Puts(dense)) == pytest.approx(0.0, abs=1e-6)
    terms = (dense.exp() * (dense - other))[:, 1:]
    assert reference.divergence(Puts(other)) == pytest.approx(float(terms.sum(-1).mean()))
    with pytest.raises(NonFiniteError, match="logits are NaN"):
        reference.divergence(Puts(dense * torch.nan))


@pytest.mark.parametrize(
    ("predicted", "bound", "gap"),
    [(2.0, 1.5, 0.25), (2.0, 2.0 * (1 - 1e-16), 0.0), (0.0, 0.0, 0.0), (math.nan, 1.0, math.nan)],
)
def test_only_what_rounding_parts_from_its_bound_is_the_least(predicted, bound, gap):
    budget = Budget((), predicted=predicted, lower_bound=bound)
    assert budget.gap == pytest.approx(gap, nan_ok=True)


# ---- what is told of it beforehand ---------------------------------------------------------


def test_what_is_kept_and_removed_is_told_in_numbers_beforehand():
    model = tiny("opt")
    dense = count_parameters(model)
    with prepare(model, tokens(8, 24)) as prepared:
        owned = count_owned(prepared.model, [one for one in prepared.groups if one.prunable])

        def told(**asked):
            return goal(prepared, Asked(**asked), ())

        for kept, asked in (
            (0.3 * dense, {"params": 0.3}),
            (dense - 7, {"params": dense - 7}),
            (dense - 0.3 * owned, {"sparsity": 0.3}),
        ):
            kept, of, gone = map(engineering, (kept, dense, dense - kept))
            assert told(**asked) == f"keeps {kept} of {of} parameters, removes {gone}"
        assert told(flops=0.3) == "keeps 30% of the operations, removes 70%"
        assert told(size="20KB") == "keeps 20KB of the bytes that the weights take on disk"
        assert told(flops=0.5, size=0.8) == (
            "keeps 0.8 of the bytes that the weights take on disk; keeps 50% of the operations, "
            "removes 50%"
        )
        assert told(speedup=2.0) == "is to be 2 times as fast as the dense model"
    result = osscar.prune(model, tokens(8, 24), heads=0.5, neurons=0.25, backend="magnitude")
    with prepare(model, tokens(8, 24)) as prepared:
        found = goal(prepared, Asked(heads=0.5, neurons=0.25), ())
    assert found.startswith(f"keeps {engineering(result.parameters_after)} of ")
