"""Residual and merged exports of runs on a 4-bit base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from corda import artifact
from corda.adapter import relative_difference
from corda.errors import AdapterError
from corda.exporting.check import confirm, probe_logits, reloader
from corda.exporting.forms import BESIDE, Exported, Work, agreed_tolerance, size_of, with_update
from corda.exporting.kept import confirm_kept
from corda.exporting.write import shift_weights, write_lora, write_model
from corda.heads import set_heads
from corda.models import keep_exact
from corda.options import ExportOptions
from corda.quantization import is_4bit

_IN_FULL = "the weights are those in full precision with the update; it was trained on 4-bit ones, see from_trained"
_DEQUANTISED = "the weights are de-quantised 4-bit ones with the update: the checkpoint holds no others"


def residual(work: Work, folder: Path, temporary: Path, options: ExportOptions) -> Exported:
    """What was trained, bit for bit: Q(W - s B0 A0) as a 4-bit checkpoint, and in `adapter/` s B A.

    A frozen correction is stacked onto the adapter, whose rank grows by it.

    Args:
        work: What to write.
        folder: Where it will lie.
        temporary: Where it is written to until it is checked.
        options: How.

    Raises:
        AdapterError: the model has a head that was trained.
    """
    live: Any = work.live.get_base_model()
    if work.update.heads:
        raise AdapterError(
            "the residual form of a 4-bit classifier is not written", got="format residual", fix="export format lora"
        )
    artifact.need_disk(folder, size_of(live))
    with bare(live):
        write_model(temporary, live, work.tokenizer, options.max_shard_size, original_names=False)
    base = _reloaded(temporary, live)
    tolerance = agreed_tolerance(base, work, options)
    rank = write_lora(
        temporary / BESIDE,
        work.update.on_residual,
        base,
        layout=options.layout,
        base=str(folder.resolve()),
        task_type=work.update.task_type,
    )
    reloaded = PeftModel.from_pretrained(base, str(temporary / BESIDE)).eval()
    found = confirm(probe_logits(reloaded, work.probe), probe_logits(work.live, work.probe), tolerance, folder)
    kind = live.config.quantization_config.bnb_4bit_quant_type
    return Exported("residual", str(folder), kind, found, tolerance, rank=rank, layout=options.layout)


def merged(work: Work, folder: Path, temporary: Path, options: ExportOptions) -> Exported:
    """W + s (B A - B0 A0), W in full precision where there is such a source, de-quantised where not.

    What corrects the error of 4 bits is left out: these weights do not have it. Peak memory is one model in full
    precision beside the 4-bit one.

    Args:
        work: What to write.
        folder: Where it will lie.
        temporary: Where it is written to until it is checked.
        options: How.
    """
    fresh, note = work.fresh_base(), _IN_FULL
    if any(is_4bit(module) for module in fresh.modules()):
        fresh, note = fresh.dequantize(), _DEQUANTISED
    set_heads(fresh, work.update.heads)
    tolerance, dtype, learned = agreed_tolerance(fresh, work, options), fresh.dtype, work.update.learned
    expected = with_update(fresh, learned, work.probe)
    kept = shift_weights(fresh, learned)
    artifact.need_disk(folder, size_of(fresh))
    write_model(temporary, fresh, work.tokenizer, options.max_shard_size, original_names=note == _IN_FULL)
    load = reloader(fresh, work.update.task_type)
    del fresh
    logits = probe_logits(load(temporary), work.probe)
    found = confirm(logits, expected, tolerance, folder)
    confirm_kept(kept, 1.0, dtype, options.format, folder)
    apart = relative_difference(logits, probe_logits(work.live, work.probe))
    name = str(dtype).removeprefix("torch.")
    return Exported("merged", str(folder), name, found, tolerance, kept, from_trained=apart, notes=(note,))


FORMS: dict[str, Callable[[Work, Path, Path, ExportOptions], Exported]] = {"residual": residual, "merged": merged}


@contextmanager
def bare(base: nn.Module) -> Iterator[None]:
    """Inside, the layers that PEFT wrapped stand in the model as they were before."""
    wrapped = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    try:
        for name, module in wrapped.items():
            _put(base, name, module.get_base_layer())
        yield
    finally:
        for name, module in wrapped.items():
            _put(base, name, module)


def _put(model: nn.Module, name: str, module: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _reloaded(folder: Path, live: PreTrainedModel) -> PreTrainedModel:
    model: PreTrainedModel = type(live).from_pretrained(str(folder), dtype=live.dtype, device_map={"": live.device})
    keep_exact(model)
    return model.eval()
