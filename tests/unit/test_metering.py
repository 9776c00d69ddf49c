"""Peak memory is that of the device that a run is on."""

from __future__ import annotations

import pytest
import torch

from corda.artifact import provenance
from corda.errors import ModelError
from corda.metering import Meter
from corda.models import pick_device
from corda.options import ModelOptions


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, the second one current, with 5 and 7 GB in use; which of them were reset."""
    reset, begun = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: begun.append(True) or 1)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: reset.append(gpu) if begun else 1 / 0)
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


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({"device": "cuda:1"}, "cuda:1"),
        ({"device_map": "auto"}, "all"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "all"),
        ({"device_map": {"model": "disk", "lm_head": "cpu"}}, "cpu"),
        ({"device": "cpu", "device_map": "auto"}, "cpu"),
    ],
)
def test_a_model_that_is_spread_computes_on_all_gpus(given, device):
    assert ModelOptions(model_name_or_path="m", **given).computes_on == device


def test_a_gpu_that_is_not_there_is_refused(gpus):
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match=r"no such GPU.*cuda:2"):
        pick_device("cuda:2")


def test_a_result_names_what_it_was_computed_on(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU of {device}")
    assert provenance(torch.device("cpu"))["device"] == "cpu"
    assert provenance(torch.device("cuda:1"))["device"] == "GPU of cuda:1"
    assert provenance()["device"] == "GPU of None"
