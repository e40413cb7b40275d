"""Random programs: what is proved of a smaller model, beside the model with its units masked.

    python -m benchmarks.fuzz --programs 2000

A program is a layer, a few steps over rows of features, and a layer that reads them.  A step is an
operator that has a propagation rule, with arguments drawn from its schema (flags, dimensions,
numbers, tensors that are written to), or a layer or a rearrangement with settings drawn alike.
Each program loses units of all groups that are prunable, and is then run at three batch sizes and
three lengths that it was not traced with.  *Wrong* is a smaller model that was proved for these
sizes and returns something else than the masked one.

Takes about a second a program.
"""

from __future__ import annotations

import argparse
import copy
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe, get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graph
from benchmarks.measuring import markdown
from osscar.base.errors import OsscarError
from osscar.proof.plan import GroupPlan, PruningPlan
from osscar.proof.structural import DensePrograms, dense_programs
from osscar.shrinking.shrink import shrink
from tests.osscar.programs import without_units

FEATURES = 6
EXAMPLE = (3, 8)
"""Samples and positions with which programs are traced."""
OTHERS = [(batch, length) for batch in (1, 2, 5) for length in (5, 7, 12)]
MOST = 1e4
"""Programs whose values are larger are not kept."""

Step = Callable[["Program", list[Tensor]], Tensor]
"""Makes the next value of all values before it."""


class Program(nn.Module):
    """Steps between two layers.  A step may keep a layer of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList()
        self.tensors = nn.ParameterList()
        self.steps: list[Step] = []
        self.said: list[str] = []
        self.leave: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values = [self.enter(x)]
        for step in self.steps:
            values.append(step(self, values))
        return self.leave(values[-1])


# ---- arguments drawn from a schema -------------------------------------------------------

_WORDS = {
    "approximate": ("none", "tanh"),
    "rounding_mode": ("floor", "trunc"),
    "mode": ("constant", "reflect", "replicate", "circular"),
    "reduce": ("sum", "mean", "amax", "amin", "prod"),
    "norm": ("ortho", "forward", "backward"),
    "equation": ("btf->bft", "btf,btf->bt", "btf,btg->bfg", "btf->bf", "b...f->b...f"),
    "padding": ("same", "valid"),
}
_SCALARS = (2, 0.5, -1.0, 1)


class Unfit(Exception):
    """No argument can be drawn."""


@dataclass
class Drawing:
    """Draws the arguments of an operator on a program's last value."""

    rng: random.Random
    program: Program
    values: list[Tensor]

    def arguments(self, schema: Any) -> dict[str, Callable[[Program, list[Tensor]], Any]]:
        """Return what makes each argument, by name."""
        made: dict[str, Callable[[Program, list[Tensor]], Any]] = {}
        for argument in schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and argument.name != "self":
                made[argument.name] = self.rng.choice(_WRITTEN)
                continue
            if argument.has_default_value() and self.rng.random() < 0.4:
                continue
            drawn = self._drawn(argument.name, str(argument.type), first=not made)
            if drawn is not None:
                made[argument.name] = drawn
        return made

    def _drawn(
        self, name: str, kind: str, *, first: bool
    ) -> Callable[[Program, list[Tensor]], Any] | None:
        if kind.startswith("Optional["):
            if self.rng.random() < 0.4:
                return lambda net, values: None
            kind = kind.removeprefix("Optional[").removesuffix("]")
        if kind == "Tensor":
            return self._tensor(name, first=first)
        if kind == "List[Tensor]":
            others = [self._tensor("other", first=i == 0) for i in range(self.rng.randint(1, 3))]
            return lambda net, values: [one(net, values) for one in others]
        if kind == "List[Optional[Tensor]]":
            dim = self.rng.randrange(self.values[-1].dim())
            index = self._tensor("index", first=False)
            return lambda net, values: [None] * dim + [index(net, values)]
        value = self._plain(name, kind)
        return lambda net, values: value

    def _plain(self, name: str, kind: str) -> Any:
        rank, rng = self.values[-1].dim(), self.rng
        if name in _WORDS and kind == "str":
            return rng.choice(_WORDS[name])
        if name in ("dim", "dims", "dim0", "dim1", "axis0", "axis1", "start_dim", "end_dim"):
            if kind.startswith("List"):
                return rng.sample(range(rank), rng.randint(1, rank)) if rank else []
            return rng.randrange(-rank, rank) if rank else 0
        if name in ("source", "destination") and kind == "int":
            return rng.randrange(rank)
        if name in ("dtype", "out_dtype"):
            return rng.choice((torch.float64, torch.float32))
        match kind:
            case "bool":
                return rng.random() < 0.5
            case "int":
                return rng.choice((0, 1, 2, 3, -1, self.values[-1].shape[-1] // 2))
            case "float" | "number":
                return rng.choice(_SCALARS)
            case "List[int]":
                return [rng.choice((0, 1, 2, 3)) for _ in range(rng.randint(1, max(rank, 1)))]
        raise Unfit(kind)

    def _tensor(self, name: str, *, first: bool) -> Callable[[Program, list[Tensor]], Tensor]:
        last, rng = self.values[-1], self.rng
        if name in ("condition", "mask"):
            return lambda net, values: values[-1] > 0
        if name in ("index", "indices"):
            return self._index()
        if first or name in ("self", "input"):
            return lambda net, values: values[-1]
        if name == "grid" or not last.dim():
            raise Unfit(name)
        shape = list(last.shape)
        choice = rng.randrange(5)
        if choice == 0:
            number = rng.randrange(len(self.values))
            return lambda net, values: values[number]
        if choice == 1:
            return lambda net, values: values[-1].tanh()
        if choice == 2:
            return lambda net, values: values[-1].mean()
        if choice == 3:
            return lambda net, values: values[-1].sigmoid().flip(0)
        self.program.tensors.append(torch.rand(shape[-1:], dtype=torch.float64) + 0.5)
        number = len(self.program.tensors) - 1
        return lambda net, values: net.tensors[number]

    def _index(self) -> Callable[[Program, list[Tensor]], Tensor]:
        last, rng = self.values[-1], self.rng
        dim = rng.randrange(max(last.dim(), 1))
        if rng.random() < 0.4:
            return lambda net, values: values[-1].argsort(dim)
        written = rng.sample(range(3), 3) if rng.random() < 0.5 else [1, 2]
        return lambda net, values: torch.tensor(written)


_WRITTEN = (
    lambda net, values: torch.zeros_like(values[-1]),
    lambda net, values: values[-1].new_zeros(values[-1].shape[:-1]),
    lambda net, values: values[-1].new_zeros(values[-1].shape[1:]),
    lambda net, values: values[-1].new_zeros(values[-1].shape[:1] + values[-1].shape[2:]),
)
"""Tensors to write to: of the shape of the last value, or of that without a dimension."""


def operators() -> list[Any]:
    """Return every overload of every public ATen operator that has a rule and takes tensors.

    Kernels that others call, such as `native_group_norm`, trust their arguments and may crash.
    """
    found = []
    for name in graph.DEFAULT_RULES:
        parts = name.split(".")
        if parts[0] != "aten" or parts[1].startswith(("_", "native_")):
            continue
        for suffix in ("", "_"):
            packet = getattr(torch.ops.aten, f"{parts[1]}{suffix}", None)
            for overload in packet.overloads() if packet is not None else ():
                made = getattr(packet, overload)
                kinds = [str(argument.type) for argument in made._schema.arguments]
                if "Tensor" in kinds or "List[Tensor]" in kinds:
                    found.append(made)
    return sorted(set(found), key=str)


def _called(rng: random.Random, program: Program, values: list[Tensor], all_of: list[Any]) -> Step:
    operator = rng.choice(all_of)
    made = Drawing(rng, program, values).arguments(operator._schema)
    pick = rng.randrange(4)

    def step(net: Program, values: list[Tensor]) -> Tensor:
        given = {name: make(net, values) for name, make in made.items()}
        writes = {
            argument.name: argument.alias_info is not None and argument.alias_info.is_write
            for argument in operator._schema.arguments
        }
        result = operator(**given)
        written = [given[name] for name, yes in writes.items() if yes and name != "self"]
        result = written[0] if written and pick % 2 else result
        if isinstance(result, list | tuple):
            result = torch.cat(list(result), -1) if pick == 3 else result[pick % len(result)]
        return result

    program.said.append(str(operator))
    return step


# ---- layers and rearrangements -----------------------------------------------------------


def _layer(net: Program, layer: nn.Module) -> int:
    net.layers.append(layer.double())
    return len(net.layers) - 1


def _of_layer(number: int, around: Callable[[nn.Module, Tensor], Tensor]) -> Step:
    return lambda net, values: around(net.layers[number], values[-1])


def _drawn_layer(rng: random.Random, net: Program, values: list[Tensor], _: list[Any]) -> Step:
    last = values[-1]
    if last.dim() != 3:
        raise Unfit("a layer of rows")
    width, out = last.shape[-1], rng.choice((4, 6, 8, 12))
    groups = rng.choice([g for g in (1, 2, 3, 4, width) if width % g == 0 and out % g == 0] or [1])
    stats = rng.random() < 0.7

    def across(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.transpose(1, 2)).transpose(1, 2)

    def plain(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    mode = rng.choice(("zeros", "reflect", "replicate", "circular"))
    conv = {"stride": rng.choice((1, 2)), "groups": groups, "bias": rng.random() < 0.5}
    made: list[tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = [
        (nn.Linear(width, out, bias=rng.random() < 0.5), plain),
        (nn.Linear(width, out), plain),
        (nn.Conv1d(width, out, 3, padding=1, padding_mode=mode, **conv), across),  # type: ignore[arg-type]
        (nn.Conv1d(width, out, 1, **conv), across),  # type: ignore[arg-type]
        (nn.Conv1d(width, out, 3, dilation=2, padding="same", groups=groups), across),
        (nn.ConvTranspose1d(width, out, 3, padding=1, output_padding=0, **conv), across),  # type: ignore[arg-type]
        (nn.BatchNorm1d(width, affine=rng.random() < 0.5, track_running_stats=stats), across),
        (nn.InstanceNorm1d(width, affine=rng.random() < 0.5, track_running_stats=stats), across),
        (nn.GroupNorm(groups, width) if width % groups == 0 else nn.Identity(), across),
        (nn.LayerNorm(width, elementwise_affine=rng.random() < 0.5), plain),
        (nn.RMSNorm(width), plain),
        (nn.PReLU(rng.choice((1, width))), across),
        (
            nn.LSTM(width, 4, 1, batch_first=rng.random() < 0.5, bidirectional=rng.random() < 0.5),
            lambda layer, x: layer(x)[0],
        ),
        (nn.GRU(width, 4, 2, batch_first=True), lambda layer, x: layer(x)[0]),
        (nn.AvgPool1d(3, 1, 1, count_include_pad=stats), across),
        (nn.MaxPool1d(3, rng.choice((1, 2)), 1, ceil_mode=stats), across),
        (nn.utils.parametrizations.weight_norm(nn.Linear(width, out)), plain),
    ]
    layer, around = rng.choice(made)
    net.said.append(type(layer).__name__)
    return _of_layer(_layer(net, layer), around)


def _moved(rng: random.Random, net: Program, values: list[Tensor], _: list[Any]) -> Step:
    last = values[-1]
    if last.dim() != 3:
        back = [
            lambda net, v: v[-1].reshape(v[0].shape[0], -1, v[-1].shape[-1]),
            lambda net, v: v[-1].flatten(-2) if v[-1].dim() > 3 else v[-1].unsqueeze(1),
        ]
        net.said.append("back to three dimensions")
        return rng.choice(back)
    width = last.shape[-1]
    parts = rng.choice([n for n in (1, 2, 3, 4, 5, 6) if width % n == 0])
    any_number = rng.choice((2, 3, 4, 5))
    number = rng.randrange(len(values))
    causal, gqa = rng.random() < 0.5, rng.random() < 0.5
    cut = rng.randrange(1, width) if width > 1 else 1

    def heads(x: Tensor, count: int) -> Tensor:
        return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)

    def attend(net: Program, v: list[Tensor]) -> Tensor:
        q = heads(v[-1], parts)
        k = heads(v[-1].tanh(), parts)
        keys = k[:, : max(parts // 2, 1)] if gqa else k
        y = F.scaled_dot_product_attention(q, keys, keys, is_causal=causal, enable_gqa=gqa)
        return y.transpose(1, 2).flatten(2)

    choices: dict[str, Step] = {
        "heads": lambda net, v: heads(v[-1], parts).relu().transpose(1, 2).flatten(2),
        "view across positions": lambda net, v: v[-1].reshape(len(v[-1]), any_number, -1),
        "view across all": lambda net, v: v[-1].reshape(any_number, -1, v[-1].shape[-1]),
        "flatten and back": lambda net, v: (
            v[-1].flatten(0, 1).softmax(rng_dim).reshape(v[-1].shape)
        ),
        "positions of a run": lambda net, v: (
            v[-1].reshape(len(v[-1]), any_number, -1).softmax(1).reshape(v[-1].shape)
        ),
        "attention": attend,
        "swap": lambda net, v: torch.cat((v[-1][..., cut:], v[-1][..., :cut]), -1),
        "gate": lambda net, v: (lambda a, b: a * b.sigmoid())(*v[-1].chunk(2, -1)),
        "split": lambda net, v: torch.cat([p.relu() for p in v[-1].split(parts, -1)], -1),
        "sum with another": lambda net, v: v[-1] + v[number],
        "joined with another": lambda net, v: torch.cat((v[-1], v[number]), -1),
        "repeat": lambda net, v: v[-1].repeat(1, 1, any_number),
        "interleave": lambda net, v: v[-1].repeat_interleave(2, -1),
        "expand": lambda net, v: v[-1].unsqueeze(2).expand(-1, -1, any_number, -1).flatten(2),
        "pad": lambda net, v: F.pad(v[-1], (1, any_number - 2)),
        "mean of positions": lambda net, v: v[-1] - v[-1].mean(1, keepdim=True),
        "matrix product": lambda net, v: v[-1] @ v[-1].transpose(1, 2) @ v[-1],
        "transposed": lambda net, v: v[-1].transpose(1, 2),
        "first positions": lambda net, v: v[-1][:, : v[-1].shape[1] // 2],
        "every other": lambda net, v: v[-1][..., ::2],
        "written in part": lambda net, v: _filled_in_part(v[-1], cut),
        "roll": lambda net, v: v[-1].roll(1, rng_dim + 1),
        "written view": lambda net, v: _halved_view(v[-1], parts),
    }
    rng_dim = rng.randrange(2)
    said, step = rng.choice(sorted(choices.items()))
    net.said.append(said)
    return step


def _filled_in_part(x: Tensor, cut: int) -> Tensor:
    x = x.clone()
    x[..., :cut] = x[..., :cut].relu()
    return x


def _halved_view(x: Tensor, parts: int) -> Tensor:
    x = x.clone()
    x.view(*x.shape[:-1], parts, -1)[..., 0, :].mul_(0.5)
    return x


# ---- programs ----------------------------------------------------------------------------


def inputs(batch: int, length: int) -> Tensor:
    """Return the samples of one size."""
    generator = torch.Generator().manual_seed(100 * batch + length)
    return torch.randn(batch, length, FEATURES, generator=generator, dtype=torch.float64)


def drawn(seed: int, all_of: list[Any]) -> Program:
    """Return a program that runs on the example, with layers of its own on both sides."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    program = Program(rng.choice((4, 6, 8, 12))).double().eval()
    makers = (_called, _called, _called, _drawn_layer, _moved, _moved)
    wanted, values = rng.randint(1, 5), _values(program)
    for _ in range(60):
        if len(program.steps) == wanted:
            break
        kept = len(program.said), len(program.layers), len(program.tensors)
        try:
            with torch.no_grad():
                made = rng.choice(makers)(rng, program, values, all_of)
                program.steps.append(_as_float(made))
                program.eval()
                tried = _values(program)
            if not tried[-1].numel() or not tried[-1].abs().max() < MOST:
                raise Unfit("numbers that are not finite, or large")
        except (Unfit, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            del program.said[kept[0] :], program.steps[len(values) - 1 :]
            program.layers = program.layers[: kept[1]]
            program.tensors = nn.ParameterList([*program.tensors][: kept[2]])
            continue
        values = tried
    if values[-1].dim():
        program.leave = nn.Linear(values[-1].shape[-1], 5).double()
    return program.eval()


@torch.no_grad()
def _values(program: Program) -> list[Tensor]:
    values = [program.enter(inputs(*EXAMPLE))]
    for step in program.steps:
        values.append(step(program, values))
    return values


def _as_float(step: Step) -> Step:
    def real(net: Program, values: list[Tensor]) -> Tensor:
        result = step(net, values)
        if not isinstance(result, Tensor) or result.is_complex():
            raise Unfit("no tensor of real numbers")
        return result.to(torch.float64)

    return real


@dataclass
class Outcome:
    """What became of a program, and what was wrong of it."""

    seed: int
    said: Sequence[str]
    ended: str = "frozen"
    """Or: crashed, untraced, random, refused, unproved, proved, wrong."""
    sizes: int = 0
    """At how many sizes a proved model was compared."""
    wrong: list[str] = field(default_factory=list)


def outcome(seed: int, all_of: list[Any]) -> Outcome:
    """Prune one random program and compare it with its mask."""
    program = drawn(seed, all_of)
    found = Outcome(seed, program.said)
    x = inputs(*EXAMPLE)
    with torch.no_grad():
        try:
            one, other = (copy.deepcopy(program)(x) for _ in range(2))
        except RuntimeError:
            found.ended = "untraced"
            return found
    if not torch.equal(one, other):
        found.ended = "random"
        return found
    try:
        groups = graph.trace(copy.deepcopy(program), (x,)).prunable
    except graph.GraphError:
        found.ended = "untraced"
        return found
    if not groups:
        return found
    programs = dense_programs(copy.deepcopy(program), {"x": x})
    found.ended = "refused"
    for some in _together_or_alone(groups):
        plan = _plan(some, seed)
        smaller = copy.deepcopy(program)
        try:
            structure = shrink(smaller, plan, [(x,)], programs=programs).certificate.structure
        except OsscarError:
            continue
        found.ended = "unproved" if structure is None else "proved"
        if structure is not None:
            _compare(found, program, smaller, plan, programs)
        break
    if found.wrong:
        found.ended = "wrong"
    return found


def _together_or_alone(groups: Sequence[Any]) -> Iterator[Sequence[Any]]:
    yield groups
    if len(groups) > 1:
        yield from ([group] for group in groups)


def _plan(groups: Sequence[Any], seed: int) -> PruningPlan:
    rng = random.Random(seed)
    kept = (
        (group, rng.sample(range(group.units), rng.randint(1, max(group.units - 1, 1))))
        for group in groups
    )
    return PruningPlan(tuple(GroupPlan.of(group, tuple(sorted(some))) for group, some in kept))


def _compare(
    found: Outcome, program: Program, smaller: nn.Module, plan: PruningPlan, programs: DensePrograms
) -> None:
    reference = without_units(program, plan)
    with torch.no_grad():
        for size in OTHERS:
            x = inputs(*size)
            if not any(one.traced.standalone.takes({"x": x}) for one in programs.programs):
                continue
            try:
                due = reference(x.clone())
            except (RuntimeError, IndexError):
                continue  # nor does the original program take this size
            try:
                made = smaller(x.clone())
            except (RuntimeError, IndexError) as error:
                found.wrong.append(f"{size}: {str(error)[:100]}")
                continue
            found.sizes += 1
            if made.shape != due.shape:
                found.wrong.append(f"{size}: {tuple(made.shape)} for {tuple(due.shape)}")
            elif not torch.allclose(made, due, rtol=1e-6, atol=1e-6, equal_nan=True):
                found.wrong.append(f"{size}: off by {float((made - due).abs().max()):.2g}")


def run(count: int, seed: int) -> Iterator[Outcome]:
    """Try so many random programs."""
    all_of = operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            yield _apart(seed + number, all_of)


def _apart(seed: int, all_of: list[Any]) -> Outcome:
    """Try a program in a process of its own, since torch may crash on rare arguments."""
    receiver, sender = Pipe(duplex=False)
    process = get_context("fork").Process(target=lambda: sender.send(outcome(seed, all_of)))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        return Outcome(seed, [], "crashed")
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # before any process is forked
    found = []
    for one in run(arguments.programs, arguments.seed):
        found.append(one)
        if one.wrong:
            print(f"seed {one.seed}: {', '.join(one.said)}: {'; '.join(one.wrong)}", flush=True)
    ends = Counter(one.ended for one in found)
    names = {name for one in found if one.ended == "proved" for name in one.said}
    lines = [["programs", *ends, "steps proved", "comparisons"]]
    numbers = [len(found), *ends.values(), len(names), sum(one.sizes for one in found)]
    lines.append([f"{number:,}" for number in numbers])
    print(*markdown(lines, 0), sep="\n")


if __name__ == "__main__":
    main()
