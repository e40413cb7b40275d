"""Prune one language model with every heuristic backend and score each result on held-out text.

For example, with a calibration text and a test text at hand:

    python benchmarks/language_model.py smollm2-135m --neurons 0.7 --heads 2/3 \
        --calibration wikitext2-valid.txt --text wikitext2-raw-test.txt --json out.json

Prints, for the dense model and each backend: summed relative loss and summed absolute loss over the
layers, perplexity, seconds in the solver and in all, and size on disk.  The JSON file also has the
loss of every layer.

In such runs every backend shapes the stream that its later layers see, so that two runs solve
different problems.  ``--same-problems`` prunes once, by `local_search`, and solves each layer's
problem with every backend on the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import osscar
import solvers
from osscar.evaluation.quality import score

HEURISTICS = ("random", "magnitude", "wanda", "greedy", "multistage", "local_search")


def main() -> None:
    arguments = parse_arguments()
    loaded = osscar.load_model(arguments.model, device=arguments.device)
    text = osscar.load_text(arguments.text, loaded.tokenizer, windows=arguments.windows)
    calibration = osscar.load_calibration(
        arguments.calibration,
        loaded.tokenizer,
        samples=arguments.samples,
        seqlen=arguments.seqlen,
        seed=arguments.seed,
    )

    if arguments.same_problems:
        compare_on_the_same_problems(loaded, calibration, arguments)
        return

    def perplexity(model: Any) -> float:
        return float(score([model], text)[0].perplexity)

    rows: list[dict[str, Any]] = [{"backend": "dense", "perplexity": perplexity(loaded.model)}]
    print_row(rows[0])
    for backend in arguments.backends:
        result = osscar.prune(
            loaded.model,
            calibration,
            heads=arguments.heads,
            neurons=arguments.neurons,
            backend=backend,
            target="weights",
            device=arguments.device,
            seed=arguments.seed,
        )
        rows.append(
            {
                "backend": backend,
                "perplexity": perplexity(result.model),
                "summed_relative_loss": result.loss,
                "summed_loss": sum(layer.loss for layer in result.layers),
                "solve_seconds": result.solve_seconds,
                "seconds": result.seconds,
                "parameters": result.parameters_after,
                "disk_bytes": disk_bytes(result, loaded),
                "layers": [dataclasses.asdict(layer) for layer in result.layers],
            }
        )
        print_row(rows[-1])
        if arguments.json:
            content = {"arguments": vars(arguments), "rows": rows}
            arguments.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--heads")
    parser.add_argument("--neurons")
    parser.add_argument("--calibration")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, help="score only the first N windows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backends", nargs="+", default=HEURISTICS)
    parser.add_argument("--same-problems", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@dataclass(frozen=True)
class SolveAll:
    """Solve with every backend, note what each achieves, and go on with `local_search`."""

    kind: ClassVar[solvers.BackendKind] = solvers.BackendKind.HEURISTIC
    summary: ClassVar[str] = "every heuristic on the same problem"
    capabilities: ClassVar[solvers.Capabilities] = solvers.Capabilities()
    names: tuple[str, ...]
    losses: list[dict[str, float]]

    @classmethod
    def available(cls) -> str | None:
        return None

    def select(self, problem: solvers.SubsetProblem) -> solvers.Selection:
        solutions = {name: solvers.solve(problem, name) for name in self.names}
        self.losses.append({name: s.relative_loss for name, s in solutions.items()})
        chosen = solutions["local_search"]
        return solvers.Selection(chosen.support, chosen.status, iterations=chosen.iterations)


def compare_on_the_same_problems(
    loaded: osscar.LoadedModel, calibration: osscar.CalibrationSet, arguments: argparse.Namespace
) -> None:
    recorder = SolveAll(tuple(arguments.backends), [])
    result = osscar.prune(
        loaded.model,
        calibration,
        heads=arguments.heads,
        neurons=arguments.neurons,
        backend=recorder,
        target="weights",
        device=arguments.device,
    )
    for name in recorder.names:
        losses = [layer[name] for layer in recorder.losses]
        best = sum(layer[name] <= min(layer.values()) for layer in recorder.losses)
        row = {"backend": name, "summed_relative_loss": sum(losses), "best_on": best}
        print_row({**row, "layers_in_all": len(losses)})
    if arguments.json:
        layers = [
            {"name": layer.name, **losses}
            for layer, losses in zip(result.layers, recorder.losses, strict=True)
        ]
        arguments.json.write_text(json.dumps({"layers": layers}, indent=1) + "\n")


def disk_bytes(result: osscar.PruningResult, loaded: osscar.LoadedModel) -> int:
    with tempfile.TemporaryDirectory() as directory:
        saved = result.save(Path(directory) / "model", dtype=loaded.stored_dtype)
        return saved.bytes


def print_row(row: dict[str, Any]) -> None:
    numbers = {
        key: f"{value:.4f}" if isinstance(value, float) else value
        for key, value in row.items()
        if key != "layers"
    }
    print(*(f"{key} {value}" for key, value in numbers.items()), sep="   ", flush=True)


if __name__ == "__main__":
    main()
