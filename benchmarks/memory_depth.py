"""Peak memory of a streamed initialisation against depth, weights aside; and of PEFT's at the same depths.

python benchmarks/memory_depth.py writes memory-depth.json: random Llama layouts of hidden size 1024, 4 to 32 blocks,
each in a process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from harness import child, record, summary
from transformers import LlamaConfig, LlamaForCausalLM

from corda.context.collect import collect_encoded
from corda.data.batches import Encoded
from corda.journal import Journal
from corda.metering import Meter
from corda.plan.make import make_plan
from corda.targets import find_targets

DEPTHS = (4, 8, 16, 32)
TOKENS, RANK = 1024, 16


def one(depth: int, side: str) -> None:
    """Collect and decompose; prints bytes above the loaded model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=depth,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    rows = [Encoded(tuple(torch.randint(0, 512, (256,)).tolist()), (True,) * 256) for _ in range(TOKENS // 256)]
    with torch.no_grad():
        model(input_ids=torch.tensor([rows[0].ids]))
    base = psutil.Process().memory_info().rss
    meter = Meter()
    with meter.stage("init"), tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            book = Journal(Path(folder) / "context", "benchmark")
            context = collect_encoded(model, rows, find_targets(model), pad_token_id=0, batch_size=1, journal=book)
            make_plan(model, context, mode="kpm", rank=RANK, journal=Journal(Path(folder) / "plan", "benchmark"))
        else:
            from init_smollm2 import _peer

            _peer(model, rows)
    adapter = sum((t.d_in + t.d_out) * RANK * 4 for t in find_targets(model)) if side == "ours" else 0
    print(json.dumps({"extra_bytes": meter.peak_bytes["init"] - base, "adapter_bytes": adapter}))


def main(repetitions: int) -> None:
    """Ours at every depth, in turn, since what the allocator keeps differs from run to run; PEFT's at 4 and 8 once."""
    runs = [{depth: child(__file__, str(depth), "ours") for depth in DEPTHS} for _ in range(repetitions)]
    peer = {depth: child(__file__, str(depth), "peer")["extra_bytes"] for depth in DEPTHS[:2]}
    ours = {d: summary([run[d]["extra_bytes"] - run[d]["adapter_bytes"] for run in runs], "bytes") for d in DEPTHS}
    record(
        "memory-depth",
        ours[32],
        summary([float(peer[8])], "bytes"),
        growth={"ours_32_over_4": ours[32]["median"] / ours[4]["median"], "peer_8_over_4": peer[8] / peer[4]},
        by_depth={"ours": ours, "peer": peer},
        note="ours at 32 blocks against PEFT's at 8; the adapter's own factors, which are the result, are taken off",
    )


if __name__ == "__main__":
    if len(sys.argv) > 2:
        one(int(sys.argv[1]), sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
