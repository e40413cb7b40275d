"""Write docs/coverage.md: which architectures are pruned, how much of them, and what is frozen.

    python benchmarks/coverage.py                 # everything, about a quarter of an hour
    python benchmarks/coverage.py resnet18 llama  # prints the rows of a few

Every model runs in a process of its own, so that the largest ones have the memory to themselves.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.coverage.measure import Coverage, measure  # noqa: E402
from tests.coverage.zoo import (  # noqa: E402
    FAMILIES,
    torchvision_case,
    torchvision_names,
    transformers_case,
)

TARGET = ROOT / "docs" / "coverage.md"

INTRODUCTION = """# Coverage

Every model below has random weights, is traced, loses half of the units of *every* prunable group,
and is proved: the outputs of the shrunk model equal those of the dense one whose removed units are
zero at what reads them, on random inputs of two sizes (batch, and length or resolution where the
model allows), in evaluation mode and float32. `python benchmarks/coverage.py` writes this page.

- **prunable**: coupling groups that may be pruned, of all groups.
- **share**: of the parameters, those that belong to a prunable group.
- **smaller**: parameters after the cut, as a share of those before.
- **error**: bound on the largest difference between outputs, relative to the largest output.
- **frozen**: what may not be pruned, and why, apart from the inputs and outputs of the model.
  `N x` counts groups; the operator that froze them is in brackets.
"""

HEADER = """
| model | parameters | prunable | share | smaller | error | frozen |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
"""


def row(found: Coverage) -> str:
    bound = f"1e{math.ceil(math.log10(found.error))}" if found.error else "0"
    cells = (
        f"`{found.name}`",
        f"{found.parameters:,}",
        f"{found.prunable} of {found.groups}",
        f"{found.share:.1%}",
        f"{found.parameters_after / found.parameters:.2f}x",
        f"< {bound}" if found.error else "0",
        found.frozen or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def find(name: str) -> Coverage:
    case = transformers_case(name) if name in FAMILIES else torchvision_case(name)
    return measure(name, case.build(), case.make_inputs())


def find_apart(name: str) -> Coverage:
    """Measure one model in another process."""
    run = subprocess.run(
        [sys.executable, __file__, "--json", name], capture_output=True, text=True, cwd=ROOT
    )
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr.strip().splitlines()[-1]}")
    found = Coverage(**json.loads(run.stdout))
    print(row(found), flush=True)
    return found


def table(names: list[str]) -> tuple[str, int]:
    rows = [row(find_apart(name)) for name in names]
    return HEADER + "\n".join(rows) + "\n", len(rows)


def write() -> None:
    vision, vision_count = table(torchvision_names())
    families, family_count = table(list(FAMILIES))
    TARGET.write_text(
        f"{INTRODUCTION}\n## torchvision: all {vision_count} classification models\n{vision}"
        f"\n## transformers: {family_count} tiny random models\n{families}"
    )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--json"]:
        json.dump(asdict(find(arguments[1])), sys.stdout)
    elif arguments:
        for name in arguments:
            print(row(find(name)))
    else:
        write()


if __name__ == "__main__":
    main(sys.argv[1:])
