"""Everything that is claimed of a GPU, at the shapes of LLaMA-2-7B with random weights.

python benchmarks/gpu.py [--folder DIR] writes gpu-decompose-*.json, gpu-collect-overhead.json, gpu-init-llama2-7b.json
and gpu-init-llama2-7b-offload.json; DIR takes the 13.5 GB of weights that the last one reads. It needs CUDA and 32 GB
of its memory for PEFT's side. --smoke runs the same code on a CPU at tiny shapes and writes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decompose
import torch
from harness import record, summary
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from corda.context.accumulator import Accumulator
from corda.context.collect import collect_encoded
from corda.context.feeding import model_inputs
from corda.data.batches import Encoded, batches
from corda.journal import Journal
from corda.metric import full_precision
from corda.models import Source
from corda.offload import LazyWeights, empty_model
from corda.options import ModelOptions
from corda.plan.make import make_plan
from corda.targets import LayerSpec, find_targets


@dataclass(frozen=True)
class Size:
    """What is measured: LLaMA-2-7B, or something tiny.

    Attributes:
        config: Of the model.
        decompositions: Layer shapes, as `decompose` reads them.
        rank: Of the adapter.
        windows: Calibration windows.
        length: Tokens of each.
        dtype: Of the weights.
        device: To compute on.
        repetitions: Of the short measurements.
    """

    config: dict[str, int]
    decompositions: tuple[str, ...]
    rank: int
    windows: int
    length: int
    dtype: torch.dtype
    device: str
    repetitions: int


FULL = Size(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
    },
    ("4096", "11008x4096", "4096x11008"),
    128,
    256,
    2048,
    torch.bfloat16,
    "cuda",
    3,
)
SMOKE = Size(
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    ("32", "48x32", "32x48"),
    4,
    4,
    16,
    torch.float32,
    "cpu",
    1,
)


def build(size: Size) -> PreTrainedModel:
    """The model with random weights on the device."""
    torch.manual_seed(0)
    with torch.device(size.device):
        model: PreTrainedModel = LlamaForCausalLM._from_config(LlamaConfig(**size.config), dtype=size.dtype)
    return model.eval()


def rows_of(size: Size) -> list[Encoded]:
    """Random tokens."""
    ids = torch.randint(0, size.config["vocab_size"], (size.windows, size.length), generator=torch.Generator())
    return [Encoded(tuple(row), (True,) * size.length) for row in ids.tolist()]


def timed(size: Size, work: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, the highest bytes above what was allocated before, and what came out."""
    on_gpu = size.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    out = work()
    if on_gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return time.perf_counter() - start, peak, out


def initialised(size: Size, model: PreTrainedModel, weights: LazyWeights | None = None) -> dict[str, Any]:
    """Collect and decompose, one block after the other, hidden states on the host."""
    layers, device = find_targets(model), torch.device(size.device)
    with tempfile.TemporaryDirectory() as folder:

        def collect() -> Any:
            return collect_encoded(
                model,
                rows_of(size),
                layers,
                pad_token_id=0,
                batch_size=1,
                journal=Journal(Path(folder) / "context", "gpu"),
                weights=weights,
                device=device,
            )

        collecting, first, context = timed(size, collect)
        get = weights.get if weights else None
        options = {"mode": "kpm", "rank": size.rank}
        deciding, second, plan = timed(size, lambda: make_plan(model, context, weights=get, device=device, **options))
    resident = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")
    return {
        "seconds": collecting + deciding,
        "collect_seconds": collecting,
        "plan_seconds": deciding,
        "above_weights_bytes": max(first, second),
        "peak_bytes": resident + max(first, second),
        "solvers": sorted({layer.solver for layer in plan.layers}),
    }


def overhead(size: Size, model: PreTrainedModel, write: Callable[..., None]) -> float:
    """Collection against the forward pass and the products alone; returns seconds of the forward pass."""
    few = rows_of(size)[: max(2, size.windows // 16)]
    layers = find_targets(model)
    parts = list(batches(few, 0, 1))
    context = collect_encoded(model, few[:1], layers, pad_token_id=0, batch_size=1)
    widths = [members[0].d_in for members in context.members().values()]

    def forward() -> None:
        with torch.no_grad(), full_precision():
            for part in parts:
                model.base_model(**model_inputs(part.to(size.device)))

    def products() -> None:
        for d in widths:
            accumulator = Accumulator(d, size.device)
            x = torch.randn(size.length, d, dtype=size.dtype, device=size.device)
            for _ in parts:
                accumulator.add(x)

    def ours() -> None:
        collect_encoded(model, few, layers, pad_token_id=0, batch_size=1)

    times: dict[str, list[float]] = {"collect": [], "forward": [], "products": []}
    for _ in range(size.repetitions):
        for name, work in (("collect", ours), ("forward", forward), ("products", products)):
            times[name].append(timed(size, work)[0])
    bare = [f + p for f, p in zip(times["forward"], times["products"], strict=True)]
    write(
        "gpu-collect-overhead",
        summary(times["collect"], "s"),
        summary(bare, "s"),
        parts={name: summary(values, "s") for name, values in times.items()},
        tokens=len(few) * size.length,
    )
    return statistics.median(times["forward"]) * size.windows / len(few)


def shape_name(layer: LayerSpec) -> str:
    """As `decompose` writes it."""
    return str(layer.d_in) if layer.d_in == layer.d_out else f"{layer.d_out}x{layer.d_in}"


def main(size: Size, folder: Path, write: Callable[..., None]) -> None:
    """Decompositions, collection's overhead, the whole model streamed, and off-loaded."""
    peer_seconds: dict[str, float] = {}

    def note(name: str, ours: dict[str, Any], peer: dict[str, Any], **more: Any) -> None:
        peer_seconds.setdefault(name.rsplit("-small-", maxsplit=1)[-1].rpartition("-r")[0], peer["median"])
        write(name, ours, peer, **more)

    decompose.main(list(size.decompositions), [size.rank], size.repetitions, size.device, "gpu-", note)
    model = build(size)
    forward = overhead(size, model, write)
    layers = find_targets(model)
    at_least = forward + sum(peer_seconds[shape_name(layer)] for layer in layers)
    peer = summary([at_least], "s")
    said = "peer: one forward pass and PEFT's decomposition, measured for each shape, times the layers; a lower bound"
    found = initialised(size, model)
    write("gpu-init-llama2-7b", summary([found["seconds"]], "s"), peer, details=found, note=said)
    model.save_pretrained(folder)
    del model
    source = Source(str(folder), None)
    shell = empty_model(source, ModelOptions(model_name_or_path=str(folder)), size.dtype)
    found = initialised(size, shell, LazyWeights(source, shell, size.dtype))
    write("gpu-init-llama2-7b-offload", summary([found["seconds"]], "s"), peer, details=found, note=said)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    if not given.smoke and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures a GPU and there is no CUDA here; --smoke tries the code on a CPU")
    with tempfile.TemporaryDirectory() as temporary:
        place = given.folder or Path(temporary)
        if given.smoke:
            main(SMOKE, place, lambda name, ours, *_, **__: print(name, ours["median"]))
        else:
            main(FULL, place, record)
