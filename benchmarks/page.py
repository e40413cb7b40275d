"""The page: a table for each model, and the figure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import markdown, rows_in
from osscar.base.printable import share
from osscar.report.sections import file_of, legend, new_figure, shares

DENSE, OURS = "dense", "this toolkit"

TITLES = {
    "resnet20": "ResNet-20 on CIFAR-10",
    "demo": "The model that is shipped",
    "smollm2": "SmolLM2-135M-Instruct",
    "mobilenet": "MobileNetV2",
    "mixture": "A mixture of 8 experts",
}
MARKERS = "os^D"


@dataclass(frozen=True)
class Entry:
    """What one method came to at one size: its rows by seed, in one shot and after a recovery."""

    method: str
    dense: Mapping[str, Any]
    shots: tuple[Mapping[str, Any], ...]
    trained: tuple[Mapping[str, Any], ...] = ()

    @property
    def measure(self) -> str:
        """What tells quality: top1 of labelled images, agreement of others, or perplexity."""
        return str(next(iter(self.dense["quality"])))

    @property
    def original(self) -> float:
        """Quality of the dense model, which agrees with itself."""
        value = self.dense["quality"][self.measure]
        return 1.0 if value is None else float(value)

    @property
    def failed(self) -> str:
        """The exception, if all seeds ended in one."""
        failures = [row.get("failed", "") for row in self.shots]
        return failures[0] if failures and all(failures) else ""

    def values(self, name: str, trained: bool = False) -> list[float]:
        """Return one value a seed: of quality, of the size, or of what it took."""
        rows = [row for row in (self.trained if trained else self.shots) if "failed" not in row]
        if name == "quality":
            return [row["quality"][self.measure] for row in rows]
        if name == "forward":
            return [row["forward"]["model"] / row["forward"]["dense"] for row in rows]
        return [row[name] for row in rows]


def entries(directory: Path) -> dict[tuple[str, str], list[Entry]]:
    """Return what the rows of a directory come to, by model and size."""
    rows = rows_in(directory)
    order = list(TITLES)
    sizes = sorted({(order.index(row["task"]), row["setting"]) for row in rows})
    found: dict[tuple[str, str], list[Entry]] = {}
    for index, setting in sizes:
        here = [r for r in rows if (r["task"], r["setting"]) == (order[index], setting)]
        (dense,) = (row for row in here if row["method"] == DENSE)
        here.sort(key=lambda row: (row["method"] != OURS, row["method"], row["seed"]))
        for method in dict.fromkeys(row["method"] for row in here if row is not dense):
            own = [row for row in here if row["method"] == method]
            shots = tuple(row for row in own if not row["steps"])
            trained = tuple(row for row in own if row["steps"])
            found.setdefault((order[index], setting), []).append(
                Entry(method, dense, shots, trained)
            )
    return found


def write_page(directory: Path) -> str:
    """Write `peers.md` and its figure, and return the page."""
    known = entries(directory)
    (directory / "images").mkdir(exist_ok=True)
    (directory / "images" / "peers.svg").write_bytes(drawing(known))
    page = "\n".join(lines(known)) + "\n"
    (directory / "peers.md").write_text(page, encoding="utf-8")
    return page


def lines(known: Mapping[tuple[str, str], list[Entry]]) -> Iterator[str]:
    """Yield the page."""
    yield from ("## Quality over time", "", f"![{ALTERNATIVE}](images/peers.svg)")
    yield from tables(known)
    failures = {(e.method, e.failed) for here in known.values() for e in here if e.failed}
    if failures:
        yield from ("", "## What failed", "")
        yield from (f"- {method}: `{failed}`" for method, failed in sorted(failures))


def tables(known: Mapping[tuple[str, str], list[Entry]]) -> Iterator[str]:
    """Yield a table for each model, with the rows of all of its sizes."""
    for task in dict.fromkeys(task for task, _ in known):
        sizes = {setting: here for (name, setting), here in known.items() if name == task}
        first = next(iter(sizes.values()))[0]
        only = f": {next(iter(sizes))}" if len(sizes) == 1 else ""
        dense = told(first.measure, [first.original])
        yield from ("", f"## {TITLES[task]}{only}", "", f"Dense: {dense}.", "")
        yield from table(sizes)


ALTERNATIVE = "Quality over the time of a forward pass, one line a method"


def table(sizes: Mapping[str, Sequence[Entry]]) -> list[str]:
    """Return the rows of one model; a column that would say nothing is left out."""
    several = len(sizes) > 1
    trained = any(entry.trained for here in sizes.values() for entry in here)
    shown = (False, True) if trained else (False,)
    names = ("size", "method")[not several :]
    limited = set(next(iter(sizes.values()))[0].dense["size"])
    left = {"parameters": "parameters", "operations": "flops"}
    del left["operations" if "flops" in limited else "parameters"]
    head = (*names, *left, *("one shot", "recovered")[: len(shown)])
    head = (*head, "forward pass", "pruning, s", "memory, GB")
    lines: list[Sequence[str]] = [head]
    for size, entry in ((size, entry) for size, here in sizes.items() for entry in here):
        row = [size, entry.method][not several :]
        if entry.failed:
            lines.append([*row, "failed", *[""] * (len(head) - len(row) - 1)])
            continue
        for name in left.values():
            row.append(share(statistics.mean(entry.values(name)) / entry.dense[name]))
        row += [told(entry.measure, entry.values("quality", trained)) for trained in shown]
        forward, seconds, peak = (
            statistics.mean(entry.values(name)) for name in ("forward", "seconds", "peak_bytes")
        )
        row += [f"{forward:.2f}", f"{seconds:.0f}", f"{peak / 1e9:.2f}"]
        lines.append(row)
    return markdown(lines, len(names))


def told(measure: str, values: Sequence[float]) -> str:
    """Write a mean over seeds, and the least and the greatest."""
    if not values:
        return ""
    form: Callable[[float], str] = (
        (lambda x: f"{x:.2f}") if measure == "perplexity" else (lambda x: f"{100 * x:.1f} %")
    )
    mean, *ends = (form(x) for x in (statistics.mean(values), min(values), max(values)))
    least, greatest = (end.removesuffix(" %") for end in ends)
    return mean if least == greatest else f"{mean} ({least}–{greatest})"


def drawing(known: Mapping[tuple[str, str], list[Entry]]) -> bytes:
    """Return the figure: a row a model, in one shot and recovered, one line a method.

    Models of one size alone are left out where others have several.
    """
    sizes = Counter(task for task, _ in known)
    tasks = [task for task, count in sizes.items() if count > 1] or list(sizes)
    drawn = [entry for (task, _), here in known.items() if task in tasks for entry in here]
    methods = list(dict.fromkeys(entry.method for entry in drawn))
    both = any(entry.trained for entry in drawn)
    figure, panels = new_figure(len(tasks), 1 + both, width=8.8, height=1.2 + 3 * len(tasks))
    for index, axes in enumerate(panels):
        task, trained = tasks[index // (1 + both)], bool(index % (1 + both))
        here = [entry for (name, _), found in known.items() if name == task for entry in found]
        for number, method in enumerate(methods):
            points = sorted(
                (statistics.mean(entry.values("forward")), entry.values("quality", trained))
                for entry in here
                if entry.method == method and entry.values("quality", trained)
            )
            if not points:
                continue
            sizes, values = zip(*points, strict=True)
            means = [statistics.mean(one) for one in values]
            spread = [
                [mean - min(one) for mean, one in zip(means, values, strict=True)],
                [max(one) - mean for mean, one in zip(means, values, strict=True)],
            ]
            marker = MARKERS[number // 8 % len(MARKERS)]
            axes.errorbar(
                sizes, means, spread, marker=marker, markersize=4, linewidth=1, capsize=2,
                color=f"C{number}", label=method,
            )  # fmt: skip
        first = here[0]
        axes.axhline(first.original, color="black", linewidth=0.7)
        if first.measure == "perplexity":
            axes.set_yscale("log")
        axes.set_xlabel("time of a forward pass, over the dense model's")
        axes.xaxis.set_major_formatter(shares)
        axes.set_ylabel({"top1": "top-1"}.get(first.measure, first.measure))
        axes.set_title(f"{TITLES[task]}, {'recovered' if trained else 'one shot'}", fontsize=9)
    legend(figure)
    return file_of(figure, "svg")
