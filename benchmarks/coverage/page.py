"""docs/coverage.md, made of what was measured."""

from __future__ import annotations

import enum
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.coverage.lists import LISTS
from benchmarks.coverage.peer import Peer
from benchmarks.coverage.row import Row


class Outcome(enum.IntEnum):
    """What came of a model, worst first."""

    FAILED = 0
    NOT_TRACED = 1
    SOME_LEFT = 2
    NOTHING = 3
    WHOLE = 4


@dataclass(frozen=True)
class Entry:
    """What was measured of one architecture.

    listed, name: The list and its name there.
    row: What OSSCAR makes of it; None if it was not built.
    peer: What Torch-Pruning makes of it; None if it was not run.
    not_built: Why there is no model.
    """

    listed: str
    name: str
    row: Row | None = None
    peer: Peer | None = None
    not_built: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Read what `dataclasses.asdict` has made."""
        row, peer = data["row"], data["peer"]
        return cls(
            data["listed"],
            data["name"],
            None if row is None else Row(**row),
            None if peer is None else Peer(**peer),
            data["not_built"],
        )

    @property
    def outcome(self) -> Outcome:
        """What came of it."""
        assert self.row is not None
        if not self.row.traced:
            return Outcome.NOT_TRACED
        if self.row.failure:
            return Outcome.FAILED
        if self.row.left:
            return Outcome.SOME_LEFT
        return Outcome.WHOLE if self.row.parameters_after is not None else Outcome.NOTHING

    @property
    def order(self) -> tuple[int, float, str]:
        """What is missing first: failures, then groups skipped, then the lowest shares."""
        assert self.row is not None
        return (int(self.outcome), self.row.share, self.name)

    def brief(self) -> str:
        """Return a line for the terminal."""
        if self.row is None:
            return f"{self.listed} {self.name}: not built: {self.not_built}"
        row, other = self.row, self.peer or Peer()
        return (
            f"{self.listed} {self.name} ({row.variant}): {self.outcome.name} "
            f"{row.prunable}/{row.groups} {row.share:.0%} {row.form} {_smaller(row)} "
            f"{row.compared} {row.seconds:.0f}s {row.failure[:150]} {list(row.left)[:1]} | "
            f"{other.parameters_after} {other.failure[:80]} {other.seconds:.0f}s"
        )


_INTRODUCTION = """# Coverage

Every model below has random weights and is traced, and loses half of the units of *every* prunable
group. What becomes smaller, its modules or its exported program, is what `--form auto` chooses; a
group that neither can do without stays as it is, and is named with the cause. The rest is proved
as `osscar.prune` proves it, [by its program](mathematics.md#what-is-proved-of-a-smaller-model), and
compared once more by code that shares nothing with the proof: the
dense model, in which whatever reads a removed unit is zero, against the smaller one, on other
random inputs and in float64 (float32 where code or kernels know nothing else).

Which models there are is read from the installed packages: a small variant of each module of
torchvision and timm, and of transformers each family with a head for text or images, its config
shrunk by rules on the names of its fields. Models with more than 60 million parameters are left
out (150 in torchvision, where VGG has no smaller one). Inputs are as small as the model takes.
Where fewer are measured than there are, the others are named below the tables, with what keeps
them from being built, or have not been run yet.

Each model also goes to [Torch-Pruning](https://github.com/VainF/Torch-Pruning), by the same
command, where that has been run yet: `BasePruner`, `MagnitudeImportance`, half of the channels, the
output layer ignored. It is told nothing of the model, as OSSCAR is told nothing; with counts of
heads, or rules for single modules, it does more of them than this. It counts if the pruned model
runs, puts out the shapes it did, and has fewer parameters; what it computes is not compared, since
nothing is promised there. Both tools have two minutes of CPU time and 5 GiB for each model; what
says that it was not done within 30 s had half a minute.

    python -m benchmarks.coverage run DIR     # goes on where it was stopped; an hour of CPU time
    python -m benchmarks.coverage page DIR    # writes this page

Whole experts of mixtures are no groups of a trace, and are not in these tables. Of transformers
they can leave DeepSeek-V2 and V3, ERNIE 4.5, GLM-4-MoE, GPT-OSS, Granite-MoE, Hunyuan, Jamba,
LFM2-MoE, MiniMax and MiniMax-M2, Mixtral, Nemotron-H, OLMoE, Qwen2-MoE and Qwen3-MoE: a tiny
model of each is pruned, proved, saved under its family's config and read by plain transformers
(`tests/osscar/test_expert_groups.py`, with `-m "slow or not slow"`). PhiMoE's stay (its router
follows another rule), and Llama 4's (its experts are not called with tokens and experts); other
families have not been tried. Those of one's own may be a list of modules, once
their block is declared (`tests/osscar/test_expert_lists.py`).

"""

_LEGEND = """
- **prunable**: coupling groups that may be pruned, of all groups; **share**: of the parameters,
  those that belong to one.
- **smaller**: parameters after the cut, as a share of those before; **form**: what became smaller.
- **program**: whether the smaller model's program was *proved* to be the dense one without those
  units, or outputs alone could be *compared*. An exported program is right as it is made.
- **apart**: largest difference in the independent comparison, relative to the largest output.
- **s**: CPU seconds of tracing, grouping, trying, shrinking and proving; of these **proof**,
  seconds of shrinking and proving.
- **Torch-Pruning**: parameters left, as a share; or what it raises.
- **what is missing**: failures and groups skipped, with the cause; then what may not be pruned,
  and why, apart from inputs and outputs of the model. `N x` counts groups; the operator that froze
  them is in brackets.
"""


def _table(*columns: str) -> str:
    """Return the head of a table; columns that begin with a blank are aligned to the right."""
    lines = "".join(f"| {'---:' if column[:1] == ' ' else '---'} " for column in columns)
    return f"| {' | '.join(column.strip() for column in columns)} |\n{lines}|\n"


_HEADER = _table(
    *("model", " parameters", " prunable", " share", " smaller", "form", "program", " apart"),
    *(" s", " proof", "Torch-Pruning", "what is missing"),
)
_SUMMARY = _table(
    *(
        "list",
        " models there are",
        " measured",
        " traced",
        " pruned, nothing skipped",
        " pruned, some skipped",
    ),
    *(" nothing prunable", " failed", " proved", " compared", " slowest, s"),
    " Torch-Pruning runs, of those it was given",
)

_MOST_REASONS = 3
_LEAST_EFFECT = 1e-4
"""Of masking, as a share of the largest output."""


def page(entries: Iterable[Entry], listed: Mapping[str, int]) -> str:
    """Return the whole page.

    entries: What was measured.
    listed: How many models there are on each list, measured or not.
    """
    of_lists: dict[str, list[Entry]] = {}
    for entry in entries:
        of_lists.setdefault(entry.listed, []).append(entry)
    built = {listed: [e for e in found if e.row] for listed, found in of_lists.items()}
    rows = "".join(_summed(LISTS[name].title, listed[name], found) for name, found in built.items())
    every = [entry for found in built.values() for entry in found]
    total = _summed("**together**", sum(listed[name] for name in built), every)
    sections = "".join(_section(name, found) for name, found in of_lists.items())
    summary = f"{_SUMMARY}{rows}{total}{_versions()}{_freezes(every)}"
    return f"{_INTRODUCTION}{summary}\n## The tables\n{_LEGEND}{sections}"


def models_by_title(text: str) -> dict[str, set[str]]:
    """Return the names of the models that each list of a page has, by the list's title."""
    found = {}
    for section in text.split("\n### ")[1:]:
        lines = section.splitlines()
        found[lines[0]] = {line.split("`")[1] for line in lines if line[:3] in ("| `", "- `")}
    return found


def _versions() -> str:
    names = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
    return f"\nWith {', '.join(f'{name} {_version(name)}' for name in names)}.\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # the page can be made where nothing is measured
        return "(not installed)"


def _summed(title: str, listed: int, entries: Sequence[Entry]) -> str:
    count = Counter(entry.outcome for entry in entries)
    rows = [entry.row for entry in entries if entry.row]
    peers = [entry.peer for entry in entries if entry.peer]
    cells = (
        title,
        listed,
        len(entries),
        sum(row.traced for row in rows),
        count[Outcome.WHOLE],
        count[Outcome.SOME_LEFT],
        count[Outcome.NOTHING],
        count[Outcome.FAILED],
        sum(row.proved is not None for row in rows),
        sum(bool(row.unproved) for row in rows),
        f"{max((row.seconds for row in rows), default=0):.0f}",
        f"{sum(p.parameters_after is not None for p in peers)} of {len(peers)}",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def _freezes(entries: Sequence[Entry]) -> str:
    """Tell what freezes groups in the most models."""
    counted: Counter[str] = Counter()
    for entry in entries:
        assert entry.row is not None
        counted.update({re.sub(r"\.\d+\.", ".*.", cause) for cause in entry.row.frozen})
    lines = "".join(f"| {_plain(reason)} | {n} |\n" for reason, n in counted.most_common(25))
    return (
        "\n## What freezes groups\n\nIn how many models each cause freezes a group, the most "
        f"frequent first.\n\n| cause | models |\n| --- | ---: |\n{lines}"
    )


def _section(listed: str, entries: Sequence[Entry]) -> str:
    built = sorted((entry for entry in entries if entry.row), key=lambda entry: entry.order)
    lines = "\n".join(map(_line, built))
    absent = [entry for entry in entries if not entry.row]
    told = "".join(f"- `{entry.name}`: {_plain(entry.not_built)}\n" for entry in absent)
    none = "of which no model was built, since the rules or the limits do not fit them"
    more = f"\n{len(absent)} more, {none}:\n\n{told}" if absent else ""
    return f"\n### {LISTS[listed].title}\n\n{_HEADER}{lines}\n{more}"


def _line(entry: Entry) -> str:
    row = entry.row
    assert row is not None
    named = f"`{entry.name}`"
    if row.variant and row.variant != entry.name:
        named += f" ({row.variant})"
    cells = (
        named,
        f"{row.parameters:,}",
        f"{row.prunable} of {row.groups}" if row.traced else "not traced",
        f"{row.share:.1%}",
        _smaller(row),
        row.form,
        "proved" if row.proved is not None else "compared" if row.unproved else "",
        _power(row.compared) + (" (float32)" if row.precision == "float32" else ""),
        f"{row.seconds:.1f}",
        f"{row.shrink_seconds:.1f}" if row.shrink_seconds else "",
        _peer(entry.peer, row.parameters),
        _plain("; ".join(_missing(row))) or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def _smaller(row: Row) -> str:
    return "" if row.parameters_after is None else f"{row.parameters_after / row.parameters:.2f}x"


def _power(error: float | None) -> str:
    if error is None or not math.isfinite(error):
        return "" if error is None else "everything"
    return f"< 1e{math.ceil(math.log10(error))}" if error else "0"


def _peer(peer: Peer | None, parameters: int) -> str:
    if peer is None:
        return "not run"
    if peer.parameters_after is None:
        return _plain(f"{peer.failure:.90}")
    return f"{peer.parameters_after / parameters:.2f}x"


def _missing(row: Row) -> list[str]:
    failure = [f"**{row.failure}**"] if row.failure else []
    unproved = [f"**compared, not proved**: {row.unproved}"] if row.unproved else []
    left = [f"**skipped**: {_times(row.left)}"] if row.left else []
    refit = [f"not refitted by `osscar.prune`: {_times(row.unrefitted)}"] if row.unrefitted else []
    idle = row.effect is not None and row.effect < _LEAST_EFFECT
    moved = ["masking moves the outputs too little for the comparison to tell"] if idle else []
    unread = [f"not run in evaluation mode: {', '.join(row.unread)}"] if row.unread else []
    return [
        *failure,
        *unproved,
        *moved,
        *left,
        *refit,
        *([_times(row.frozen)] if row.frozen else []),
        *unread,
    ]


def _times(reasons: Mapping[str, int]) -> str:
    most = sorted(reasons.items(), key=lambda item: -item[1])
    told = [f"{count} x {reason}" for reason, count in most[:_MOST_REASONS]]
    rest = sum(count for _, count in most[_MOST_REASONS:])
    return "; ".join([*told, *([f"{rest} more"] if rest else [])])


def _plain(text: str) -> str:
    """Return text that breaks no table."""
    return " ".join(text.replace("|", "/").replace("<", "&lt;").split())
