"""What reports show: points inside of their axes, numbers and names whole, columns from fields."""

import io
import re
from dataclasses import asdict, dataclass
from typing import Annotated

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from osscar.base.printable import decimals, engineering
from osscar.cli.common import _PlainConsole
from osscar.evaluation.evaluate import Comparison, Evaluation
from osscar.evaluation.quality import SampleQuality, TextQuality
from osscar.evaluation.size import Footprint
from osscar.evaluation.speed import SampleSpeed, Speed
from osscar.evaluation.tables import comparison_table, evaluation_table
from osscar.report import html
from osscar.report.sections import Table, Text, longest_stages, settings, settings_table, table
from osscar.report.shown import Column, columns, notes
from osscar.report.terminal import print_section
from osscar.request import PruningRequest
from osscar.run import prune_page
from osscar.study.cases import Case
from osscar.study.figures import gaps_figure
from osscar.study.records import Record

FINE = (0.025, 0.05, 0.075, 0.1, 0.125)


def case(name, sparsity, loss, bound):
    row = Record(
        instance=name, kind="heads", file="x", units=40, width=1, keep=round(40 * (1 - sparsity)),
        backend="perspective", options={}, status="FEASIBLE", loss=loss,
        relative_loss=loss, lower_bound=bound, seconds=1.0, sparsities=(sparsity,),
    )  # fmt: skip
    return Case((row,))


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure


# ---- figures -----------------------------------------------------------------------------


def test_axes_tell_shares_apart_and_legends_lie_within_their_figures():
    cases = [case(f"layer{i}", s, 0.9, 0.9 * (1 - s / 100)) for i in range(3) for s in FINE]
    figure = drawn(gaps_figure(cases))
    labels = [label.get_text() for label in figure.axes[0].yaxis.get_ticklabels()]
    assert len(set(labels)) == len(labels) > 2
    assert all(label.endswith("%") for label in labels)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(FINE)
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def assert_markers_are_whole(axes):
    """Check that the axes cut off no marker, but the lower half of one that sits on the floor."""
    frame = axes.get_window_extent()
    for line in axes.get_lines():
        radius = line.get_markersize() / 2 * axes.figure.dpi / 72
        for x, y in line.get_xydata():
            across, up = axes.transData.transform((x, y))
            assert frame.x0 <= across - radius < across + radius <= frame.x1
            assert frame.y0 - 1e-6 <= up < up + radius <= frame.y1


def layer(name, loss, bound=None):
    return {
        **{"name": name, "kind": name.rpartition(".")[2], "kept": 5, "units": 10},
        **{"relative_loss": loss, "relative_bound": bound, "lower_bound": bound},
    }


def depth_figure(layers):
    return drawn(prune_page.depth_figure({one["name"]: one for one in layers}, layers)).axes


@pytest.mark.parametrize("losses", [(0.9, 0.9, 0.9), (0.0, 0.0), (1.0,), (1e-9, 1e-3)])
def test_losses_lie_within_their_plots(losses):
    layers = [layer(f"layers.{i}.heads", loss, 0.9 * loss) for i, loss in enumerate(losses)]
    axes = depth_figure(layers)[1]
    low, high = axes.get_ylim()
    assert low == 0 < high
    assert high >= 1.05 * max(losses)
    assert_markers_are_whole(axes)


def test_what_groups_keep_and_lose_is_drawn_over_their_places():
    kept = (("layers.2.heads", 8), ("layers.2.neurons", 4), ("layers.5.heads", 2))
    groups = {
        name: {"kind": name.rpartition(".")[2], "kept": count, "units": 8} for name, count in kept
    }
    layers = [layer("layers.2.neurons", 0.3), layer("layers.5.heads", 0.2)]  # heads of 2 stay
    above, below = drawn(prune_page.depth_figure(groups, layers)).axes
    found = {line.get_label(): line.get_xydata().tolist() for line in above.get_lines()}
    assert found == {"heads": [[1, 1.0], [2, 0.25]], "neurons": [[1, 0.5]]}
    assert [line.get_xydata().tolist() for line in below.get_lines()] == [[[2, 0.2]], [[1, 0.3]]]
    assert above.get_xlim() == below.get_xlim()
    assert_markers_are_whole(above)
    for count in (1, 3, 60):  # groups are counted in whole numbers
        _, axes = depth_figure([layer(f"layers.{i}.neurons", 0.3) for i in range(count)])
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == round(tick) for tick in ticks)


# ---- tables of evaluations ---------------------------------------------------------------

TEXT = Evaluation(
    "token", TextQuality(20.0, 511, 1, 512), Speed(1e4, 100.0, 512, 32, 5),
    Footprint(2_000_000, 8_000_000, 4e6, None, None), "cpu", "float32",
)  # fmt: skip
IMAGES = Evaluation(
    "image", SampleQuality(40, "output", 0, None, None, None, 0.5, 0.1, {}),
    SampleSpeed(200.0, 32, 5),
    Footprint(1_000_000, 4_000_000, 2e9, 10**9, 4_000_000), "cpu", "float32",
)  # fmt: skip


def test_models_of_every_sort_have_one_table():
    both = Comparison.of(IMAGES, IMAGES)
    rows = {label: cells for label, *cells in comparison_table(asdict(both), "small").rows}
    assert rows["parameters"] == ["1,000,000", "1,000,000", "1.00x"]
    assert rows["agreement with dense"] == ["50.00%", "50.00%", ""]
    assert "top-1" not in rows
    assert {"images/s (32 at once)", "FLOPs per image"} <= rows.keys()
    alone = {label for label, _ in evaluation_table(asdict(TEXT), "demo").rows}
    assert {"perplexity", "decode, tokens/s", "FLOPs per token"} <= alone
    assert "peak memory" not in alone
    for result in (both, TEXT):
        one = result.model if isinstance(result, Comparison) else result
        for number in (f"{one.footprint.parameters:,}", engineering(one.footprint.flops)):
            assert number in result.summary()
            assert number in result._repr_html_()


def test_ratios_bear_the_names_of_the_numbers_and_are_none_where_nobody_knows():
    ratios = Comparison.of(TEXT, TEXT).ratios
    assert ratios["perplexity"] == ratios["flops"] == 1
    assert ratios["disk_bytes"] is None
    assert not {"tokens", "windows", "peak_memory_bytes", "top1"} & ratios.keys()
    assert Comparison.of(IMAGES, IMAGES).ratios["top1"] is None


# ---- tables in a terminal ----------------------------------------------------------------

LONG = "@" * 66
LAYERS = [
    {
        **{"name": LONG, "kept": 12_345, "units": 16_384, "relative_loss": 0.0852},
        **{"status": "SWAP_OPTIMAL", "solve_seconds": 1234.56, "dead": 7777, "lower_bound": 0.1},
        **{"relative_bound": 0.0747, "gap": 0.1234, "unrefitted": ("a", "b"), "growth": 1.64e4},
        **{"proved_optimal": False, "recomputed_bound": 0.1},
    }
]  # fmt: skip
NUMBERS = ("12345 of 16384", "0.0852", "0.0747", "1234.56", "7777", "12.3%", "1.64e+04x")


def shown(section, width, terminal=True):
    file = io.StringIO()
    console = _PlainConsole(width=width, force_terminal=terminal, file=file, no_color=True)
    print_section(console, section)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("width", [20, 60, 100, 200])
def test_a_terminal_of_any_width_shows_every_number_and_name_whole(width):
    text = shown(prune_page.layers_table(LAYERS), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    assert all(number in text for number in NUMBERS)
    assert text.count("@") == len(LONG)


def test_names_are_folded_only_where_nothing_else_makes_room_and_in_files_nowhere():
    found = Table("", ("group", "why"), ((LONG, "its size is written in the code"),))
    assert LONG in shown(found, 90)
    assert LONG not in shown(found, 60)
    row = ("n" * 300, "1,234", "its size is written in the code of a module")
    found = Table("", ("group", "units >", "why"), (row,))
    (line,) = (line for line in shown(found, 140, terminal=False).splitlines() if "nn" in line)
    assert line.split()[:2] == ["n" * 300, "1,234"]
    assert shown(Text(("a sentence of words " * 9,)), 40, terminal=False).count("\n") == 1


# ---- columns from fields, and settings ---------------------------------------------------


@dataclass
class Base:
    seconds: Annotated[float, Column("seconds >")]


@dataclass
class Planted(Base):
    name: Annotated[str, Column("group")]
    loss: Annotated[float | None, Column("loss >", decimals, note="of the planted field")]
    hidden: int
    seconds: Annotated[
        float, Column("took >", row=lambda row: f"{row['seconds']} of {row['hidden']}")
    ]
    empty: Annotated[str, Column("empty")] = ""


def test_a_field_with_a_column_is_shown_everywhere_and_others_are_not():
    rows = [
        vars(Planted(name="<a>\x1b", loss=0.0, hidden=7, seconds=2.0)),
        vars(Planted(name="b", loss=None, hidden=8, seconds=3.0)),
    ]
    found = table("planted", columns(Planted), rows)
    assert found.columns == ("group", "loss >", "took >")
    assert found.rows == (("<a>\x1b", "0.0000", "2.0 of 7"), ("b", "", "3.0 of 8"))
    assert notes(Planted) == {"loss >": "of the planted field"}
    text = shown(found, 80)
    page = html.page("a title", [found, Text(()), Table("left out", ("x",), ())])
    for one in ("loss", "0.0000", "2.0 of 7"):
        assert one in text
        assert one in page
    assert "<a>\\x1b" in text
    assert "&lt;a&gt;\\x1b" in page
    assert "left out" not in page


def test_settings_that_somebody_asked_for_come_first():
    asked = {"backend": "greedy", "seed": 0, "sparsity": 0.5, "damp": None, "skip": []}
    found = settings_table(
        settings(asked, PruningRequest, chosen={"damp": 0.1}), settings({"model": "demo"})
    )
    assert found.rows == (
        ("backend", "greedy", "asked"),
        ("sparsity", "0.5", "asked"),
        ("model", "demo", "asked"),
        ("seed", "0", "by default"),
        ("damp", "0.1", "chosen"),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_parts_of_a_time_add_up_to_the_whole(count):
    stages = {f"part {index}": 10 / (index + 3) + 0.0499 for index in range(count)}
    said = longest_stages(stages)
    parts = [float(one) for one in re.findall(r" (-?[\d.]+)(?=[,)])", said)]
    assert len(parts) == min(count, 4)
    assert sum(parts) == pytest.approx(float(f"{sum(stages.values()):.1f}"), abs=1e-9)
    assert ("the rest" in said) == (count > 3)
    assert said.startswith(" (part 0 3.4")
    assert longest_stages({}) == ""
