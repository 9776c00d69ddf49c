"""Freed memory goes back to the system although small blocks that are kept lie between."""

import psutil
import pytest
import torch

from corda.heap import give_back


@pytest.mark.skipif(not give_back(), reason="another C library's allocator")
def test_holes_between_kept_blocks_are_given_back() -> None:
    process = psutil.Process()
    blocks = [torch.ones(25, 1000) for _ in range(800)]  # 100 kB each, below the size that glibc maps on its own
    kept = blocks[7::8]
    del blocks
    before = process.memory_info().rss
    assert give_back()
    assert before - process.memory_info().rss > 30e6
    assert all(float(one.sum()) == 25_000 for one in kept)
