"""How a plan's work shares out over processes: recorded layer by layer, simulated for P = 2 to 64, measured for 2.

python benchmarks/shared_out.py   writes benchmarks/results/shared-out.json; one thread a process

Recorded: the seconds of decomposing each input's layers at a few widths, on random weights and covariances. From them
the seconds per unit of the cost that layers are shared out by; the simulation shares a model's inputs out as
`corda.distributed.by_cost` does and adds up the recorded seconds of every process. Measured: a plan of 12 blocks in one
process and in two. All seconds are CPU seconds of a process with one thread, which other work on the machine disturbs
little; of two processes the busier one counts, its part in gathering the factors included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from corda import artifact, distributed
from corda.context.accumulator import pack_upper
from corda.context.store import Context
from corda.distributed import by_cost
from corda.plan.make import make_plan
from corda.plan.sharing import cost
from corda.targets import LayerSpec

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

# name: blocks, hidden width, width of the MLP, width of k and v
MODELS = {
    "SmolLM2-135M": (30, 576, 1536, 192),
    "LLaMA-3-8B": (32, 4096, 14336, 1024),
    "LLaMA-3-70B": (80, 8192, 28672, 1024),
    "LLaMA-3-405B": (126, 16384, 53248, 1024),
}
PROCESSES = [2, 4, 8, 16, 32, 64]


def block(index: int, d: int, m: int, kv: int) -> list[list[LayerSpec]]:
    """The inputs of one block, each with its layers."""
    shapes = [
        [("q_proj", d, d), ("k_proj", kv, d), ("v_proj", kv, d)],
        [("o_proj", d, d)],
        [("gate_proj", m, d), ("up_proj", m, d)],
        [("down_proj", d, m)],
    ]
    return [[LayerSpec(f"layers.{index}.{n}", "linear", o, i) for n, o, i in group] for group in shapes]


class Weights(torch.nn.Module):
    """Random weights of the shapes."""

    def __init__(self, groups: list[list[LayerSpec]], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.values = {
            f"{s.name}.weight": torch.randn(s.d_out, s.d_in, generator=generator) for group in groups for s in group
        }
        self.anchor = torch.nn.Parameter(torch.zeros(1))


def context_of(groups: list[list[LayerSpec]], seed: int = 1) -> Context:
    """Covariances of 4 d tokens with a spread spectrum."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, torch.Tensor] = {}
    packed = {}
    for group in groups:
        d = group[0].d_in
        if d not in made:
            X = torch.randn(d, 2 * d, generator=generator) * torch.logspace(1, -2, d)[:, None]
            made[d] = pack_upper(X @ X.T / X.shape[1])
        packed[group[0].name] = made[d]
    return Context(
        tuple(s for group in groups for s in group),
        {s.name: group[0].name for group in groups for s in group},
        {group[0].name: 2 * group[0].d_in for group in groups},
        packed,
    )


def seconds_of(groups: list[list[LayerSpec]], **more: Any) -> float:
    """CPU seconds of a plan of rank 16 in this process, which has one thread."""
    model, context = Weights(groups), context_of(groups)
    start = time.process_time()
    make_plan(model, context, mode="kpm", rank=16, weights=model.values.__getitem__, **more)
    return time.process_time() - start


def recorded(repetitions: int) -> list[dict[str, Any]]:
    """Seconds of each kind of input, in the shapes of SmolLM2 and twice as wide."""
    found = []
    for d, m, kv in ((576, 1536, 192), (1152, 3072, 384)):
        for group in block(0, d, m, kv):
            seconds = [seconds_of([group]) for _ in range(repetitions)]
            found.append(
                {
                    "layers": [s.name.rpartition(".")[2] for s in group],
                    "d_in": group[0].d_in,
                    "cost": cost(group),
                    "seconds": statistics.median(seconds),
                    "min": min(seconds),
                    "max": max(seconds),
                }
            )
    return found


def simulated(rate: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Model -> P -> how many times faster P processes are; each kind of input costs its own recorded seconds per d³."""
    found: dict[str, dict[str, Any]] = {}
    for name, (blocks, d, m, kv) in MODELS.items():
        groups = [group for i in range(blocks) for group in block(i, d, m, kv)]
        costs = [cost(group) for group in groups]
        seconds = [c * rate[g[0].name.rpartition(".")[2]] for c, g in zip(costs, groups, strict=True)]
        found[name] = {"inputs": len(groups), "bound": sum(seconds) / max(seconds)}
        for P in PROCESSES:
            loads = [0.0] * P
            for owner, s in zip(by_cost(costs, P), seconds, strict=True):
                loads[owner] += s
            found[name][str(P)] = sum(seconds) / max(loads)
    return found


def in_two(repetitions: int) -> list[float]:
    torch.set_num_threads(1)
    groups = [group for i in range(12) for group in block(i, 576, 1536, 192)]
    with distributed.joined(cpu=True) as processes:
        taken = []
        for _ in range(repetitions):
            processes.wait()
            taken.append(seconds_of(groups, processes=processes))
        return taken


def in_one(repetitions: int) -> list[float]:
    torch.set_num_threads(1)
    groups = [group for i in range(12) for group in block(i, 576, 1536, 192)]
    return [seconds_of(groups) for _ in range(repetitions)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    from spawned import in_processes

    costs = recorded(args.repetitions)
    rate = {one["layers"][0]: one["seconds"] / one["cost"] for one in costs}  # of the wider shapes, which come last
    (alone,) = in_processes(in_one, args.repetitions, size=1, seconds=600)
    first, second = in_processes(in_two, args.repetitions, size=2, seconds=600)
    together = [max(pair) for pair in zip(first, second, strict=True)]
    where = artifact.provenance()
    report = {
        "name": "shared-out",
        "recorded": costs,
        "times faster, simulated": simulated(rate),
        "measured": {
            "what": "plan of 12 blocks of SmolLM2's shapes, rank 16; CPU seconds of the busiest process",
            "one": alone,
            "two": together,
            "times faster": statistics.median(alone) / statistics.median(together),
        },
        "device": where["device"],
        "provenance": where,
    }
    artifact.write_json(Path(__file__).parent / "results" / "shared-out.json", report)
    print(report["times faster, simulated"], report["measured"])


if __name__ == "__main__":
    main()
