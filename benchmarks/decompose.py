"""One layer's decomposition against PEFT's, and both against the fp64 optimum.

python benchmarks/decompose.py [N ...] [--rank R ...] writes decompose-{small,large}-N-rR.json; N is a square layer's
width, or D_OUTxD_IN.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from harness import paired, record, summary
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer
from torch import Tensor, nn

from corda import linalg
from corda.metric import Metric, damping


def case(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """A Gaussian weight, and the covariance of inputs whose spectrum falls over two decades, in a random basis."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(d_out, d_in, generator=g) / d_in**0.5
    basis = torch.linalg.qr(torch.randn(d_in, d_in, generator=g))[0]
    X = torch.randn(2 * d_in, d_in, generator=g) * torch.logspace(0.5, -1.5, d_in)
    return W, basis @ (X.T @ X / (2 * d_in)) @ basis.T


def main(
    sizes: list[str], ranks: list[int], repetitions: int, device: str = "cpu", prefix: str = "", write: Any = record
) -> None:
    """Measure every size at every rank and both ends."""

    def finished() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    for size in sizes:
        d_out, _, d_in = size.partition("x")
        W, C = (x.to(device) for x in case(int(d_out), int(d_in or d_out)))
        layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device=device)
        layer.weight.data.copy_(W)
        layer.covariance_matrix = C
        config = LoraConfig(corda_config=CordaConfig(corda_method="kpm"))
        lam = damping(C, 0.01)
        truth = torch.linalg.svdvals(Metric(C, 1.0, lam).root(W.double()))
        for rank in ranks:
            for end, word in (("smallest", "small"), ("largest", "large")):

                def ours() -> linalg.Subspace:
                    found = linalg.subspace(W, Metric(C, 1.0, lam), rank, end)  # noqa: B023
                    linalg.factors(W, found, scaling=1.0, balance="equal")  # noqa: B023
                    finished()
                    return found

                def peer() -> Tensor:
                    eigens = collect_eigens_for_layer(layer, config)  # noqa: B023
                    U = eigens.U_WC
                    finished()
                    return U[:, -rank:] if end == "smallest" else U[:, :rank]  # noqa: B023

                metric = Metric(C, 1.0, lam)
                best = float(truth[-rank:].norm() if end == "smallest" else truth[:rank].norm())
                found = ours()
                off = linalg.captured_energy(W, metric, found.U) / best - 1
                theirs = linalg.captured_energy(W, metric, torch.linalg.qr(peer().double())[0]) / best - 1
                mine, other = paired(ours, peer, repetitions)
                write(
                    f"{prefix}decompose-{word}-{size}-r{rank}",
                    summary(mine, "s"),
                    summary(other, "s"),
                    quality={
                        "what": "captured energy against the fp64 optimum, relative difference",
                        "ours": off,
                        "peer": theirs,
                        "path": found.path,
                    },
                    shape=[W.shape[0], W.shape[1]],
                    rank=rank,
                    end=end,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["576", "1536", "2048", "4096"])
    parser.add_argument("--rank", type=int, nargs="*", default=[32, 128])
    parser.add_argument("--repetitions", type=int, default=3)
    given = parser.parse_args()
    main(given.sizes, given.rank, given.repetitions)
