"""The three forms of an export: each writes its files, reloads them as their users do, and compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import artifact
from corda.adapter import relative_difference
from corda.exporting.check import (
    added,
    allowed,
    confirm,
    largest_difference,
    probe_logits,
    reloader,
)
from corda.exporting.kept import confirm_kept, update_kept
from corda.exporting.update import Compression, Factors, Update, approximate
from corda.exporting.write import layer_of, shift_weights, write_lora, write_model
from corda.heads import set_heads, with_heads
from corda.options import ExportOptions

BESIDE = "adapter"  # folder of the adapter inside a residual base's folder


@dataclass(frozen=True)
class Work:
    """What an export is made of and compared with.

    Attributes:
        update: What training added.
        live: The trained model.
        fresh_base: Loads the original base once more.
        probe: What reloaded logits are compared on.
        records: What the effect of compression is measured on; default: the probe.
        tokenizer: Saved with full weights.
        card: Text of README.md; default: what can be told without a recipe.
        fingerprint: Of everything that the export depends on.
        requantised: The live model computes with other base weights than the original ones, quantised after the
            start was taken out of them: reloaded logits are compared with the original base and the update instead.
        four_bit: Its base is in 4 bits, requantised or not.
    """

    update: Update
    live: PeftModel
    fresh_base: Callable[[], PreTrainedModel]
    probe: Mapping[str, Tensor]
    records: Sequence[Mapping[str, Tensor]] = ()
    tokenizer: Any = None
    card: str | None = None
    fingerprint: str = ""
    requantised: bool = False
    four_bit: bool = False


@dataclass(frozen=True)
class Exported:
    """A checked export.

    Attributes:
        format: "lora", "residual" or "merged".
        path: Its folder.
        dtype: Of the full weights in it, or of the base that the adapter was checked on.
        max_relative_logit_difference: max |reloaded - expected| / max |expected| over the probe's logits. Expected are
            the trained model's logits, or with `export.rank` those of the compressed factors before they were saved.
        tolerance: What that was allowed to be.
        update_kept: Share of the trained update that the reloaded weights hold, see `update_kept`; None where it
            cannot be told. Below 1 where merged 16-bit weights round it away, and by the lost energy of `export.rank`.
        rank: The largest LoRA rank in it; None for full weights.
        layout: "patterns" or "uniform"; None for full weights.
        compression: What `export.rank` lost; None for an exact export. See `Compression`.
        low_rank_fit: For an adapter converted with its residual base, how well rank 2r holds their difference.
        pushed_to: The Hub repository that it was uploaded to.
        from_trained: For an export on other weights than the 4-bit ones that were trained on:
            max |reloaded - trained| / max |trained| over the probe's logits, mostly what 4 bits cost.
        notes: What a person should know of it.
    """

    format: str
    path: str
    dtype: str
    max_relative_logit_difference: float
    tolerance: float
    update_kept: float | None = None
    rank: int | None = None
    layout: str | None = None
    compression: Compression | None = None
    low_rank_fit: Compression | None = None
    pushed_to: str | None = None
    from_trained: float | None = None
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def lora(work: Work, folder: Path, temporary: Path, options: ExportOptions) -> Exported:
    """A plain LoRA on the original base: exact and of rank 2r, or the best approximation of rank `options.rank`.

    Args:
        work: What to write.
        folder: Where it will lie.
        temporary: Where it is written to until it is checked.
        options: How.
    """
    fresh, update = work.fresh_base(), work.update
    tolerance, dtype = agreed_tolerance(fresh, work, options), fresh.dtype
    factors, compression = update.added, None
    trained = probe_logits(work.live, work.probe)
    with with_heads(fresh, update.heads):
        expected = with_update(fresh, factors, work.probe) if work.requantised else trained
    if options.rank is not None:
        # That they are right is checked before anything is left out of them.
        with with_heads(fresh, update.heads), added(fresh, factors):
            confirm(probe_logits(fresh, work.probe), expected, tolerance, folder)
        factors, compression = approximate(factors, options.rank)
        with with_heads(fresh, update.heads):
            expected = with_update(fresh, factors, work.probe)
    rank = write_lora(
        temporary,
        factors,
        fresh,
        layout=options.layout,
        base=update.base,
        revision=update.revision,
        task_type=update.task_type,
        heads=update.heads,
    )
    reloaded = PeftModel.from_pretrained(fresh, str(temporary)).eval()
    left = 1 if compression is None else 1 - compression.lost_energy
    done = _compared(reloaded, expected, work, folder, options.format, dtype, tolerance, left)
    if compression is not None:
        records = work.records or [work.probe]
        with _exact(work) as exact:
            apart, tokens = largest_difference(reloaded, exact, records)
        compression = compression.measured(apart, len(records), tokens)
    from_trained = relative_difference(expected, trained) if work.requantised else None
    return replace(done, rank=rank, layout=options.layout, compression=compression, from_trained=from_trained)


def residual(work: Work, folder: Path, temporary: Path, options: ExportOptions) -> Exported:
    """The papers' form: the model W - s B0 A0 in the folder, and the rank-r adapter s B A in `adapter/` inside it.

    Args:
        work: What to write.
        folder: Where it will lie.
        temporary: Where it is written to until it is checked.
        options: How.
    """
    fresh, update = work.fresh_base(), work.update
    tolerance, dtype = agreed_tolerance(fresh, work, options), fresh.dtype
    shift_weights(fresh, update.start, -1)
    artifact.need_disk(folder, size_of(fresh))
    write_model(temporary, fresh, work.tokenizer, options.max_shard_size)
    load = reloader(fresh, update.task_type)
    del fresh
    base = load(temporary)
    rank = write_lora(
        temporary / BESIDE,
        update.trained,
        base,
        layout=options.layout,
        base=str(folder.resolve()),
        task_type=update.task_type,
        heads=update.heads,
    )
    reloaded = PeftModel.from_pretrained(base, str(temporary / BESIDE)).eval()
    done = _compared(reloaded, probe_logits(work.live, work.probe), work, folder, options.format, dtype, tolerance)
    return replace(done, rank=rank, layout=options.layout)


def merged(work: Work, folder: Path, temporary: Path, options: ExportOptions) -> Exported:
    """Full weights W + s (B A - B0 A0), summed in fp32 and rounded once to the base's dtype.

    Args:
        work: What to write.
        folder: Where it will lie.
        temporary: Where it is written to until it is checked.
        options: How.
    """
    fresh, update = work.fresh_base(), work.update
    tolerance, dtype = agreed_tolerance(fresh, work, options), fresh.dtype
    shift_weights(fresh, update.added)
    set_heads(fresh, update.heads)
    artifact.need_disk(folder, size_of(fresh))
    write_model(temporary, fresh, work.tokenizer, options.max_shard_size)
    load = reloader(fresh, update.task_type)
    del fresh
    return _compared(
        load(temporary), probe_logits(work.live, work.probe), work, folder, options.format, dtype, tolerance
    )


@contextmanager
def _exact(work: Work) -> Iterator[nn.Module]:
    """What an update without compression gives: the trained model, but for one whose base was quantised anew.

    That one has an error of 4 bits of its own, which is not the compression's: its update on the original base then.
    """
    if not work.requantised:
        yield work.live
        return
    fresh = work.fresh_base()
    with with_heads(fresh, work.update.heads), added(fresh, work.update.added):
        yield fresh


FORMS: dict[str, Callable[[Work, Path, Path, ExportOptions], Exported]] = {
    "lora": lora,
    "residual": residual,
    "merged": merged,
}


def with_update(base: PreTrainedModel, factors: Mapping[str, Factors], probe: Mapping[str, Tensor]) -> Tensor:
    """Logits of the base with an update that is computed without PEFT.

    Args:
        base: The original base.
        factors: Full dotted layer name -> A (k, d_in) and B (d_out, k).
        probe: Keyword arguments of a forward pass, (B, L) ids among them.
    """
    with added(base, factors):
        return probe_logits(base, probe)


def agreed_tolerance(fresh: PreTrainedModel, work: Work, options: ExportOptions) -> float:
    """What a reloaded logit may be off by: as asked, or by the base's dtype.

    Args:
        fresh: The original base.
        work: What is written.
        options: With a tolerance, if it is set by hand.
    """
    for name in work.update.added:
        layer_of(fresh, name)
    return options.tolerance or allowed(fresh, work.update.added, work.probe)


def _compared(
    reloaded: Any,
    expected: Tensor,
    work: Work,
    folder: Path,
    form: str,
    dtype: torch.dtype,
    tolerance: float,
    left: float = 1.0,
) -> Exported:
    found = confirm(probe_logits(reloaded, work.probe), expected, tolerance, folder)
    kept = update_kept(reloaded, None if form == "lora" else work.live, work.update.added)
    confirm_kept(kept, left, dtype, form, folder)
    return Exported(form, str(folder), str(dtype).removeprefix("torch."), found, tolerance, kept)


def size_of(model: PreTrainedModel) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
