"""The Python that README and the site show runs, page by page, on small data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graph
import osscar
import osscar.shrinking.follow
from osscar.data.prose import Split, builtin_text
from tests.docs.pages import PAGES, blocks

SMALL = {
    '"smollm2-135m"': '"demo"',
    "samples=32, seqlen=512": "samples=4, seqlen=64",
    "samples=264, seqlen=512": "samples=12, seqlen=32",
    "steps=64": "steps=4",
}

PAGES_WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def run(page: str) -> dict[str, Any]:
    """Run all blocks of a page in order, in one namespace, and return it."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        for word, small in SMALL.items():
            block = block.replace(word, small)
        exec(compile(block, page, "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the files that pages name, and tables that are put back afterwards."""
    (tmp_path / "calibration.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "training.txt").write_text(builtin_text(Split.CALIBRATION))
    monkeypatch.chdir(tmp_path)
    rules, adapters = graph.DEFAULT_RULES, osscar.shrinking.follow
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))


def test_every_page_with_python_is_run() -> None:
    assert set(PAGES_WITH_PYTHON) == set(CHECKS)


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:.*rank-deficient")
@pytest.mark.parametrize("page", PAGES_WITH_PYTHON)
def test_the_python_of_a_page_runs(page: str) -> None:
    CHECKS[page](run(page))


def check_readme(names: dict[str, Any]) -> None:
    assert names["result"].parameters_after < names["result"].parameters_before
    assert Path("smaller").is_dir()
    assert names["recovery"].after <= names["recovery"].before
    assert Path("recovered").is_dir()


def check_start(names: dict[str, Any]) -> None:
    counts = [
        sum(p.numel() for p in m.parameters()) for m in (names["smaller"], names["loaded"].model)
    ]
    assert counts[0] < counts[1]


def check_estimate(names: dict[str, Any]) -> None:
    told = names["estimate"]
    assert 0 < told.low < told.seconds < told.high
    assert told.peak_bytes > 0


def check_walk(names: dict[str, Any]) -> None:
    weights = names["prepared"].model.get_submodule("model.decoder.layers.0.fc2").weight
    assert int((weights == 0).all(0).sum()) == 320
    assert names["way"].passes == 1


def check_vision(names: dict[str, Any]) -> None:
    model, example, stated = names["stating"]()
    assert model(example).shape == (2, 10)
    assert stated == osscar.Preprocessing(mean=(0.49, 0.48, 0.45), std=(0.25,), channels=3)


def check_recover(names: dict[str, Any]) -> None:
    first, again = names["recovery"], names["again"]
    assert first.after <= first.before
    assert (first.measure, again.measure) == ("nats", "loss")
    assert Path("recovered").is_dir()


def check_mathematics(names: dict[str, Any]) -> None:
    assert names["solution"].backend == "branch_and_bound"


def check_backend(names: dict[str, Any]) -> None:
    assert 0 < names["solution"].gap < 1


def check_architecture(names: dict[str, Any]) -> None:
    assert names["group"].prunable
    assert names["model"].up.out_features == names["model"].down.in_features == 20
    assert names["traced"].group("neurons").units == 40


def check_module(names: dict[str, Any]) -> None:
    assert "Attention" in str(names["told"])
    assert names["model"].layout == [3, 8]
    assert names["proof"].error < 1e-5


def check_forms(names: dict[str, Any]) -> None:
    assert names["result"].form == "exported"
    assert not names["result"].skipped
    assert names["archive"].inputs == {"input": (-1, -1, 8)}


def check_frozen(names: dict[str, Any]) -> None:
    groups = graph.trace(names["model"], (names["x"],)).groups
    assert {group.units: group.prunable for group in groups if group.units > 8} == {
        16: False,
        32: True,
    }
    assert not torch.allclose(names["before"], names["masked"])


def check_formats(names: dict[str, Any]) -> None:
    assert names["saved"].with_code
    ids = torch.arange(12)[None]
    own, read = names["result"].model, names["model"].float().eval()
    assert type(read).__module__.endswith(".modeling_pruned")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, own(ids).logits, rtol=0.05, atol=0.05)


def check_own_model(names: dict[str, Any]) -> None:
    quality = names["compared"].model.quality
    assert quality.top1 > 0.8
    assert 0 < quality.errors["output"] < 0.1
    assert names["again"].head.in_features < names["model"].head.in_features


CHECKS = {
    "README.md": check_readme,
    "docs/index.md": check_start,
    "docs/howto/estimate.md": check_estimate,
    "docs/vision.md": check_vision,
    "docs/walk.md": check_walk,
    "docs/recover.md": check_recover,
    "docs/mathematics.md": check_mathematics,
    "docs/howto/backend.md": check_backend,
    "docs/howto/architecture.md": check_architecture,
    "docs/howto/module.md": check_module,
    "docs/howto/own-model.md": check_own_model,
    "docs/howto/forms.md": check_forms,
    "docs/howto/frozen.md": check_frozen,
    "docs/howto/formats.md": check_formats,
}
