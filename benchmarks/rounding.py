"""What `--round-to` gains: models of about one size, with widths of all sorts and with round ones.

    python -m benchmarks.rounding mobilenet
    python -m benchmarks.rounding smollm2-135m --steps 1 32

Each group of channels or neurons keeps a share of its units between 50 and 90 %, drawn once, and
brought to the next multiple.  Nothing is said about quality: units are the largest, from a few
random samples.  Images are classified by torch and by ONNX Runtime; a language model reads a text
and goes on with it in llama.cpp, in float16 and in Q8_0, for which it gets neurons of zeros as
`osscar export` adds them.  All models take turns.

Takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from timeit import Timer
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

import osscar
from benchmarks.llama_cpp import Engine, measure_speed
from graph import residual_groups, trace
from osscar.base.timing import interleaved


def pruned(model: nn.Module, samples: Tensor, kind: str, step: int) -> osscar.PruningResult:
    """Remove the same shares of all groups of a kind, at widths that are multiples of a step."""
    drawn = np.random.default_rng(0)
    found = trace(model, (samples,))
    residual = residual_groups(found)
    groups = [one for one in found.groups if one.kind == kind and one.name not in residual]
    kept = {one.name: int(drawn.uniform(0.5, 0.9) * one.units) for one in groups if one.prunable}
    asked = {"groups": kept, "round_to": step, "backend": "magnitude", "device": "cpu"}
    return osscar.prune(model, samples, **asked)


def printed(rows: Mapping[int, tuple[float, ...]], columns: str) -> None:
    """Print a table, with what a step is to widths of all sorts in brackets."""
    print(f"| round to | {columns} |\n|" + " --- |" * (columns.count("|") + 2))
    for step, row in rows.items():
        cells = (
            f"{mine:.4g} ({mine / other:.2f}x)" for mine, other in zip(row, rows[1], strict=True)
        )
        print(f"| {step} | {' | '.join(cells)} |", flush=True)


# ---- images ------------------------------------------------------------------------------


def images(steps: Sequence[int], repetitions: int) -> None:
    """Time MobileNetV2 on one image and on eight."""
    torch.manual_seed(0)
    model, samples = mobilenet_v2().eval(), torch.randn(8, 3, 224, 224)
    sizes = dict[int, float]()
    timers = list[Timer]()
    with tempfile.TemporaryDirectory() as place:
        for step in steps:
            smaller = pruned(model, samples, "channels", step).model
            sizes[step] = sum(one.numel() for one in smaller.parameters()) / 1e6
            file = osscar.export_onnx(smaller, Path(place) / f"{step}.onnx", example_inputs=samples)
            session = _session(file.path)
            for count in (1, 8):
                here = samples[:count]
                feed = {session.get_inputs()[0].name: here.numpy()}
                timers += [Timer(partial(smaller, here)), Timer(partial(session.run, None, feed))]
        with torch.inference_mode():
            seconds = interleaved(timers, repetitions, "Timing")
    medians = np.array([statistics.median(one) for one in seconds]).reshape(len(steps), -1) * 1e3
    printed(
        {step: (sizes[step], *row) for step, row in zip(steps, medians, strict=True)},
        "parameters, M | torch, 1 image, ms | ONNX Runtime | torch, 8 images | ONNX Runtime",
    )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options)


# ---- text --------------------------------------------------------------------------------


def text(name: str, steps: Sequence[int], repetitions: int) -> None:
    """Time a language model in llama.cpp."""
    loaded = osscar.load_model(name, device="cpu")
    ids = torch.randint(3, loaded.model.config.vocab_size, (2, 128))
    options = argparse.Namespace(
        seqlen=512, new_tokens=64, threads=torch.get_num_threads(), repetitions=repetitions
    )
    window = torch.randint(3, loaded.model.config.vocab_size, (512,)).tolist()
    with tempfile.TemporaryDirectory() as place:
        engines, sizes = {}, {}
        for step in steps:
            smaller = pruned(loaded.model, ids, "neurons", step).model
            count = sum(one.numel() for one in smaller.parameters()) / 1e6
            directory = Path(place) / str(step)
            osscar.save(smaller, directory, tokenizer=loaded.tokenizer)
            f16 = osscar.export_gguf(directory, dtype="f16").path
            q8 = quantized(f16, directory.with_suffix(".q8"))
            sizes[step] = (count, f16.stat().st_size / 1e6, q8.stat().st_size / 1e6)
            for kind, path in (("f16", f16), ("q8", q8)):
                engines[f"{step} {kind}"] = Engine(path, options, exact=False)
        speeds = measure_speed(engines, [window], options)
    parts = [
        (kind, f"{of}_tokens_per_second") for kind in ("f16", "q8") for of in ("prefill", "decode")
    ]
    printed(
        {
            step: (*sizes[step], *(speeds[f"{step} {kind}"][of] for kind, of in parts))
            for step in steps
        },
        "parameters, M | float16, MB | Q8_0, MB | float16: prefill, tokens/s | decode | "
        "Q8_0: prefill | decode",
    )


def quantized(source: Path, out: Path) -> Path:
    """Write a GGUF file anew, with matrices in Q8_0."""
    kind = gguf.GGMLQuantizationType.Q8_0
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        of_items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], of_items)
    for tensor in reader.tensors:
        if tensor.data.ndim == 2:
            blocks = gguf.quants.quantize(tensor.data.astype(np.float32), kind)
            writer.add_tensor(tensor.name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="mobilenet, or the name or directory of a language model")
    parser.add_argument("--steps", nargs="*", type=int, default=[1, 4, 8, 16], help="1 comes first")
    parser.add_argument("--repetitions", type=int, default=15)
    given = parser.parse_args()
    if given.model == "mobilenet":
        images(given.steps, given.repetitions)
    else:
        text(given.model, given.steps, given.repetitions)


if __name__ == "__main__":
    main()
