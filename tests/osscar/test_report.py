"""What reports show: points inside of their axes, numbers and names whole, columns from fields."""

import io
import re
from dataclasses import asdict, dataclass
from typing import Annotated

import pytest

from osscar.base.printable import decimals, engineering
from osscar.cli.common import _PlainConsole
from osscar.evaluation.evaluate import Comparison, Evaluation, comparison_table, evaluation_table
from osscar.evaluation.quality import SampleQuality, TextQuality
from osscar.evaluation.speed import Footprint, SampleSpeed, Speed
from osscar.report import shown as html
from osscar.report.sections import (
    Table,
    Text,
    longest_stages,
    settings,
    settings_table,
    stages_table,
    table,
)
from osscar.report.shown import Column, columns, notes, print_section
from osscar.request import PruningRequest
from osscar.run import prune_page

# ---- tables of evaluations ---------------------------------------------------------------

TEXT = Evaluation(
    "token", TextQuality(20.0, 511, 1, 512), Speed(1e4, 100.0, 512, 32, 5),
    Footprint(2_000_000, 8_000_000, 4e6, None), "cpu", "float32",
)  # fmt: skip
IMAGES = Evaluation(
    "image", SampleQuality(40, "output", 0, None, None, None, 0.5, 0.1, {}),
    SampleSpeed(200.0, 32, 5),
    Footprint(1_000_000, 4_000_000, 2e9, 4_000_000), "cpu", "float32",
)  # fmt: skip


def test_models_of_every_sort_have_one_table():
    both = Comparison.of(IMAGES, IMAGES)
    assert both.ratios["top1"] is None
    rows = {label: cells for label, *cells in comparison_table(asdict(both), "small").rows}
    assert rows["parameters"] == ["1,000,000", "1,000,000", "1.00x"]
    assert rows["agreement with dense"] == ["50.00%", "50.00%", ""]
    assert "top-1" not in rows
    assert {"images/s (32 at once)", "FLOPs per image"} <= rows.keys()
    alone = {label for label, _ in evaluation_table(asdict(TEXT), "demo").rows}
    assert {"perplexity", "decode, tokens/s", "FLOPs per token"} <= alone
    for result in (both, TEXT):
        one = result.model if isinstance(result, Comparison) else result
        for number in (f"{one.footprint.parameters:,}", engineering(one.footprint.flops)):
            assert number in result.summary()
            assert number in result._repr_html_()


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
    assert longest_stages({"other": 9.0, "walk": 1.0}) == " (walk 1.0, other 9.0)"
    rows = stages_table({"walk": 1.0, "other": 3.0}).rows
    assert rows == (("walk", "1.0", "25%"), ("other", "3.0", "75%"))
