"""Compare this toolkit with its peers: the same models, data and size, in one run.

    python -m benchmarks.peers DIRECTORY --data DATA
    python -m benchmarks.peers DIRECTORY --data DATA --tasks smollm2 --settings "30% of heads"
    python -m benchmarks.peers DIRECTORY --data DATA --settings "x as fast"
    python -m benchmarks.peers DIRECTORY --data DATA --official CHECKOUT --steps 64

Rows are those of `benchmarks/quality.py`, with the methods of others; whoever made a model smaller,
`osscar.recover` trains it.  At the same speed, the share that a peer keeps is searched until its
model is as fast as asked, within 2 %; this toolkit is asked for the speed.  What fails is a row,
too, with the exception.  Ends with tables of all rows there,
`peers.md`, and a figure.

Takes a minute a row, and several for SmolLM2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

from benchmarks import tasks
from benchmarks.page import write_page
from benchmarks.peers import backends, depgraph
from benchmarks.peers.decoders import flap, short_gpt, slice_gpt
from benchmarks.quality import Bench, Method, prune

SPEEDS = tasks.speeds(1.25, 1.5, 1.6, 1.9, 2)
SETTINGS = {
    "resnet20": (*tasks.flops(0.7, 0.5, 0.3), *SPEEDS),
    "mobilenet": (*tasks.flops(0.66), *SPEEDS),
    "demo": (*tasks.both(0.3, 0.5), *SPEEDS),
    "smollm2": tasks.both(0.3, 0.5),
}
TEXTS = ("demo", "smollm2")


def methods(task: str) -> Mapping[str, Method]:
    """Return all that make a model of text, or of images, smaller."""
    text = task in TEXTS
    theirs = depgraph.TEXT if text else depgraph.IMAGES
    torch_pruning = depgraph.prune_text if text else depgraph.prune_images
    return {
        **{name: partial(prune, method=method) for name, method in backends.METHODS.items()},
        "the paper's public code": backends.public_code,
        **{f"Torch-Pruning, {name}": partial(torch_pruning, name=name) for name in theirs},
        **({"FLAP": flap, "SliceGPT": slice_gpt, "ShortGPT": short_gpt} if text else {}),
    }


BENCH = Bench(
    {
        name: dataclasses.replace(tasks.TASKS[name], settings=settings)
        for name, settings in SETTINGS.items()
    },
    methods,
)


def main() -> None:
    parser = BENCH.parser(__doc__)
    parser.set_defaults(seeds=[0, 1, 2])
    arguments = parser.parse_args()
    BENCH.measure(arguments)
    print(write_page(arguments.directory))


if __name__ == "__main__":
    main()
