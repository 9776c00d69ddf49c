"""Peak memory is that of the device that a run is on."""

from __future__ import annotations

import pytest
import torch

from corda.metering import Meter


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, the second one current, with 5 and 7 GB in use; which of them were reset."""
    reset = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: (5, 7)[gpu] * 10**9)
    return reset


@pytest.mark.parametrize(
    ("device", "read", "gigabytes"),
    [("auto", [1], 7), ("cuda", [1], 7), ("cuda:0", [0], 5), ("cuda:1", [1], 7), ("all", [0, 1], 12)],
)
def test_of_a_gpu_its_own_is_read(gpus, device, read, gigabytes):
    meter = Meter(device)
    with meter.stage("train"):
        pass
    assert gpus == read
    assert meter.peak_bytes == {"train": gigabytes * 10**9}


def test_of_a_cpu_beside_gpus_the_process_is_read(gpus):
    meter = Meter("cpu")
    with meter.stage("train"):
        pass
    assert gpus == []
    assert 10**7 < meter.peak_bytes["train"] < 10**12
    assert meter.peak_bytes["train"] not in {5 * 10**9, 7 * 10**9}
