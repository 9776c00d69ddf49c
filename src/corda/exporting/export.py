"""Write a trained adapter in one of the export formats, and only call it done when its reloaded logits are right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from corda import artifact
from corda.architectures import classes_of, task_of_model
from corda.errors import AdapterError, ArtifactError
from corda.exporting import four_bit, hub
from corda.exporting.card import CardFacts, hub_card, license_of
from corda.exporting.check import again, same_vocabulary, spread_probe
from corda.exporting.forms import BESIDE, FORMS, Exported, Work
from corda.exporting.update import Compression, has_4bit_base, is_requantised, read_update, refuse_rank
from corda.metric import full_precision
from corda.options import ExportOptions
from corda.reading import parse_export

_KIND = "export"
_CARD = "README.md"


def export(
    model: PeftModel,
    folder: str | Path,
    options: ExportOptions | None = None,
    *,
    fresh_base: Callable[[], PreTrainedModel] | None = None,
    probe: Mapping[str, Tensor] | None = None,
    records: Sequence[Mapping[str, Tensor]] = (),
    tokenizer: Any = None,
    card: str | None = None,
    fingerprint: str = "",
    **settings: Any,
) -> Exported:
    """Write a trained model as its options say, reload it, compare the logits; then upload it if asked to.

    Args:
        model: From `attach`, trained; unchanged.
        folder: Where to; must not hold anything but an earlier export.
        options: Export options.
        fresh_base: Loads the original base once more, in full precision for format merged and for a 4-bit residual
            base; default: from the path that the model came from.
        probe: Keyword arguments of a forward pass; default: 2 x 32 token ids spread over the vocabulary.
        records: Forward passes without padding that the effect of `rank` is measured on; default: the probe.
        tokenizer: Saved beside full weights.
        card: Text of README.md; default: what can be told without a recipe.
        fingerprint: Of everything that the export depends on; see `finished`.
        settings: Export options by name instead, e.g. format="merged".

    Raises:
        CheckError: the reloaded export gives other logits; nothing is left in `folder` then.
        ArtifactError: the folder holds something else.
        AdapterError: the format is not possible for this model.
        RecipeError: options that do not fit each other or the adapter's rank.
        ResourceError: not enough space, or the upload failed.
    """
    if options is not None and settings:
        raise AdapterError("give export options or settings by name, not both", got=", ".join(settings))
    options = options or parse_export(settings)
    base, training = model.get_base_model(), model.training
    as_it_is = options.format == "lora" and not is_requantised(model)
    model.eval()
    try:
        work = Work(
            read_update(model),
            model,
            same_vocabulary(base, fresh_base or again(base, as_it_is=as_it_is)),
            probe or spread_probe(base),
            records,
            tokenizer,
            card,
            fingerprint,
            requantised=is_requantised(model),
            four_bit=has_4bit_base(model),
        )
        return published(write_checked(work, Path(folder), options), options)
    finally:
        model.train(training)


def write_checked(
    work: Work, folder: Path, options: ExportOptions, *, low_rank_fit: Compression | None = None
) -> Exported:
    """Write, reload, compare; the folder appears only when all is well.

    Args:
        work: What to write.
        folder: Where to.
        options: How.
        low_rank_fit: What the update itself lost already, for the record.

    Raises:
        CheckError, ArtifactError, AdapterError, RecipeError, ResourceError: see `export`.
    """
    update = work.update
    if options.format not in FORMS:
        raise AdapterError("there is nothing to export", got=f"format {options.format!r}", expected=", ".join(FORMS))
    if options.format == "residual" and not update.start:
        raise AdapterError("there is no residual base without initial factors", fix="export format lora or merged")
    if options.format == "residual" and work.four_bit and not work.requantised:
        raise AdapterError("an intact 4-bit base has no residual form", fix="export format lora or merged")
    terms = update.on_residual if options.format == "residual" else update.added
    doubled = options.format == "lora" and bool(update.start)
    refuse_rank({name: pair.A.shape[0] for name, pair in terms.items()}, options, doubled=doubled)
    _refuse_foreign(folder)
    size = sum(4 * factor.numel() for pair in terms.values() for factor in pair)
    with full_precision(), artifact.writing(folder, _KIND, work.fingerprint, size=size) as (temporary, manifest):
        temporary.chmod(folder.parent.stat().st_mode & 0o777)  # temporary folders are private, an export is not
        write = (FORMS | four_bit.FORMS if work.four_bit else FORMS)[options.format]
        done = replace(write(work, folder, temporary, options), low_rank_fit=low_rank_fit)
        card = hub_card(_told(work), options) if work.card is None else work.card
        (temporary / _CARD).write_text(card, encoding="utf-8")
        manifest[_KIND] = {key: value for key, value in done.as_json().items() if key != "path"}
    return done


def finished(folder: Path, fingerprint: str) -> Exported | None:
    """The export in a folder, where it depends on the same and no file but its card was changed since.

    Args:
        folder: Where it may lie.
        fingerprint: Of all that it has to depend on.
    """
    if not (folder / artifact.MANIFEST).is_file():
        return None
    found = artifact.read(folder, _KIND, verify=False)
    if found.fingerprint != fingerprint:
        return None
    for name, facts in found.manifest["files"].items():
        path = folder / name
        if name != _CARD and not (path.is_file() and artifact.file_hash(path) == facts["sha256"]):
            return None
    facts = dict(found.manifest[_KIND])
    for key in ("compression", "low_rank_fit"):
        facts[key] = Compression(**facts[key]) if facts[key] else None
    facts["notes"] = tuple(facts.get("notes", ()))
    return Exported(path=str(folder), **facts)


def published(done: Exported, options: ExportOptions) -> Exported:
    """The export, uploaded to the Hub where its options ask for that and it has not been yet.

    Args:
        done: A checked export.
        options: Name the repository.

    Raises:
        ResourceError: the upload failed.
    """
    if options.push_to_hub is None or done.pushed_to == options.push_to_hub:
        return done
    folder = Path(done.path)
    hub.push(folder, options.push_to_hub, f"{BESIDE}/adapter_config.json", private=options.hub_private_repo)
    manifest = artifact.read_json(folder / artifact.MANIFEST)
    manifest[_KIND]["pushed_to"] = options.push_to_hub
    artifact.write_manifest(folder, manifest)
    return replace(done, pushed_to=options.push_to_hub)


def _told(work: Work) -> CardFacts:
    """What is known of an adapter that no recipe made."""
    update, base_model = work.update, work.live.get_base_model()
    ranks = [factors.A.shape[0] for factors in update.trained.values()]
    counted = sum(factors.A.numel() + factors.B.numel() for factors in update.trained.values())
    facts = [("Trained parameters", f"{counted:,} in {len(ranks)} layers")] if ranks else []
    facts += [("Rank while training", ", ".join(map(str, sorted(set(ranks)))))] if ranks else []
    base = update.base or str(getattr(base_model.config, "_name_or_path", "")) or "the base model"
    return CardFacts(
        "CorDA" if update.start else "LoRA",
        base,
        task=task_of_model(base_model),
        classes=classes_of(base_model),
        license=license_of(base),
        facts=tuple(facts),
    )


def _refuse_foreign(folder: Path) -> None:
    """Raise for a folder with a file in it that no export wrote: a trained adapter, say, that cannot be had again."""
    if not folder.exists():
        return
    known = set()
    if (folder / artifact.MANIFEST).is_file():
        known = {artifact.MANIFEST, *artifact.read(folder, _KIND, verify=False).manifest["files"]}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {""}
    if not found <= known:
        raise ArtifactError("the export folder holds something else", where=str(folder), fix="name another folder")
