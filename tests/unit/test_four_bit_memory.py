"""Bytes of live tensors, and what building a 4-bit run may hold of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MB = 1_000_000


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_live_tensors_are_counted_once_and_until_they_are_freed(benchmarks):
    from live_tensors import LiveTensors

    held = torch.ones(250, 1000)
    with LiveTensors() as alive:
        held.view(-1).add_(1)
        assert alive.peak == MB
        for _ in range(5):
            more = held * 2
            part = more[:10]
            del more, part
        assert alive.peak == 2 * MB
        kept = [held + i for i in range(3)]
        assert alive.peak == 4 * MB
    kept.append(held + 1)
    assert alive.peak == 4 * MB


@pytest.mark.slow
def test_building_a_4bit_run_holds_the_4bit_model_and_two_blocks_in_full_precision(tmp_path, monkeypatch, benchmarks):
    """Blocks as wide as those of a model of a billion parameters, so that nothing else is of their size.

    Six of them: planning does not hold the 4-bit model, and its own peak is that of one wide layer whatever the depth.
    """
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    import four_bit_memory

    first = r"model\.layers\.0\..*"
    found = four_bit_memory.measure(tmp_path, four_bit_memory.SHAPE, 6, correction="fit", target_modules=first)
    assert max(found["peaks"].values()) <= found["allowed"]
    assert found["peaks"]["attach"] > found["four_bit_model"]  # it is there, and was counted
