"""Models whose weights are spread over processes or devices: what is there, and one whole weight at a time.

FSDP2 (torch's `fully_shard`) keeps every parameter as a DTensor and gathers a block when it runs; accelerate's
`device_map` keeps weights on several devices, in memory or on disk and brings them in when a layer runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from corda.distributed import world
from corda.errors import ModelError

_PARTITIONED = 3  # the stage of ZeRO that partitions weights


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is spread over processes, so that all of them have to run the model together."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_spread(model: nn.Module) -> bool:
    """Whether a layer's weights are brought in when it runs, so that one pass at a time can go through the model."""
    return is_sharded(model) or getattr(model, "hf_device_map", None) is not None


def in_parts(model: nn.Module) -> bool:
    """Whether layers of the model compute on different devices."""
    places = getattr(model, "hf_device_map", None) or {}
    return len({str(place) for place in places.values()} - {"cpu", "disk"}) > 1


def device_of(model: nn.Module) -> torch.device:
    """Where inputs go: the device of the first weight that is in memory, the CPU if none is."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def whole(weight: Tensor) -> Tensor:
    """A weight in its full shape; for a sharded one every process has to call this at the same point."""
    if not isinstance(weight, DTensor):
        return weight
    gathered = weight.full_tensor()
    assert isinstance(gathered, Tensor)
    return gathered


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight parameter of a layer, of its full shape, detached; read from memory or disk where it is off-loaded."""
    weight = layer.weight
    if weight.device.type != "meta":
        assert isinstance(weight, Tensor)
        return whole(weight.detach())
    with align_module_device(layer, torch.device("cpu")):
        brought = layer.weight
        assert isinstance(brought, Tensor)
        return brought.detach().clone()


def subtract(weight: Tensor, change: Tensor) -> None:
    """weight -= change of its shape, in place, rounded once; of a sharded weight every process has all of `change`."""
    change = change.float()
    if isinstance(weight, DTensor):
        mesh, places = weight.device_mesh, weight.placements
        change = distribute_tensor(change.to(weight.device), mesh, places, src_data_rank=None)
    weight.copy_(weight.float() - change)


def computing_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: where its weight is, or for an off-loaded one where accelerate brings it."""
    held: Any = layer
    device: torch.device = held.weight.device
    if device.type != "meta":
        return device
    brought = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    return torch.device("cpu") if brought is None else torch.device(brought)


def average_gradients(model: nn.Module) -> None:
    """Average gradients over all processes, of trained parameters that nothing shards or synchronises.

    For a training loop of one's own on a model that was sharded before the adapter was attached: the adapter then is
    whole in every process. Called by all of them between `backward` and the optimiser's step.
    """
    processes = world()
    own = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in own]
    processes.add_up(gradients)
    for parameter, gradient in zip(own, gradients, strict=True):
        parameter.grad = gradient / processes.size


@contextmanager
def gathered_around(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the weights of a sharded model that belong to no block (embeddings, norms, head) are whole.

    The blocks themselves stay sharded; each gathers its own weights while it runs and no other's.

    Args:
        model: May be sharded or not; if it is, it has been run through its root once (FSDP2 sets itself up then).
        blocks: Its repeated blocks.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    around: list[Any] = [m for m in model.modules() if isinstance(m, FSDPModule) and id(m) not in inside]
    try:
        for module in around:
            module.unshard()
        yield
    finally:
        for module in around:
            module.reshard()


def whole_adapters(model: nn.Module) -> dict[str, Tensor] | None:
    """A sharded model's LoRA weights, and heads trained whole, by name, of full shape, on the CPU; else None.

    All processes have to call this together; the base's weights are not gathered.
    """
    if not is_sharded(model):
        return None
    own = [(name, p) for name, p in model.named_parameters() if ".lora_" in name or ".modules_to_save." in name]
    return {name: whole(p.detach()).cpu() for name, p in own}


def refuse_zero3(training: Mapping[str, Any]) -> None:
    """Refuse a run that would be trained with DeepSpeed ZeRO-3.

    Args:
        training: Options of the trainer.

    Raises:
        ModelError: accelerate's environment or the option `deepspeed` asks for it.
    """
    config = training.get("deepspeed")
    if isinstance(config, str | Path):
        with suppress(OSError, ValueError):
            config = json.loads(Path(config).read_text(encoding="utf-8"))
    if isinstance(config, Mapping) and config.get("zero_optimization", {}).get("stage") == _PARTITIONED:
        raise zero3("training.deepspeed")
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if launched and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "") == str(_PARTITIONED):
        raise zero3("accelerate launch --zero_stage 3")


def refuse_partitioned(model: nn.Module) -> None:
    """Refuse a model that DeepSpeed has partitioned.

    Raises:
        ModelError: ZeRO-3 holds its weights.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise zero3()


def zero3(where: str = "the model's parameters") -> ModelError:
    """The error for DeepSpeed ZeRO-3."""
    return ModelError(
        "weights that DeepSpeed ZeRO-3 has partitioned cannot be read",
        where=where,
        got="ZeRO-3",
        expected="a whole model, or one sharded by FSDP2",
        fix="use FSDP2, which shards the same things: accelerate launch --use_fsdp --fsdp_version 2; or ZeRO-2",
    )
