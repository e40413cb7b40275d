"""How far below a run's prediction that of any other widths and units can be.

    python benchmarks/whole_bound.py MODEL --sparsity 0.3 --calibration TEXT --rounds 0 8

Widths are chosen as by ``osscar prune --certify``, and nothing is pruned.  For each number of
rounds it prints what is predicted of these widths, below what no widths by the same curves come,
and below what no widths and no units come, with the seconds of one process by stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import osscar
from osscar.allocation.allocate import allocate, shared_curves
from osscar.base.timing import profiled
from osscar.pruning.prune import prepare_for


def main() -> None:
    """Allocate and bound, once for each number of rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--skip", nargs="*", default=[], help="patterns of groups left alone")
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--rounds", nargs="+", type=int, default=[0, 8])
    options = parser.parse_args()
    loaded = osscar.load_model(options.model)
    data = osscar.load_calibration(
        options.calibration, loaded.tokenizer, samples=options.samples, seqlen=options.seqlen
    )
    request = osscar.PruningRequest(
        sparsity=options.sparsity, certify=True, device="cpu", form="eager", skip=options.skip
    )
    with prepare_for(loaded.model, data, request) as prepared:
        curves = shared_curves(prepared, request)
        for rounds in options.rounds:
            asked = dataclasses.replace(request, bound_rounds=rounds)
            began = time.process_time()
            with profiled(time.process_time) as spent:
                budget = allocate(prepared, asked, curves).budget
            if budget.bounded is None:
                raise SystemExit(f"nothing bounds all widths and units: {budget.unbounded}")
            seconds = {
                name: round(s, 1) for name, s in spent.of(time.process_time() - began).items()
            }
            print(
                f"{options.model}, sparsity {options.sparsity:g}, {rounds} rounds: "
                f"predicted {budget.predicted:.6g} nats, no widths below "
                f"{budget.lower_bound:.6g} ({budget.gap:.2%}), no widths and units below "
                f"{budget.bounded.nats:.6g} ({budget.whole_gap:.2%}); {seconds}",
                flush=True,
            )
            for name, width in budget.widths.items():
                curve, below = budget.curves.get(name), budget.bounded.curves.get(name)
                if curve and curve[width.kept] > 0:
                    gap = 1 - below[width.kept] / curve[width.kept]
                    print(f"  {name}: {width.kept} of {width.units}, {gap:.1%} at this width")


if __name__ == "__main__":
    main()
