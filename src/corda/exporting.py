"""Write an adapter for other tools, then reload it into a fresh base and compare before calling it done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import artifact
from corda.adapter import relative_difference
from corda.errors import ArtifactError, CheckError, ModelError

_FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@dataclass(frozen=True)
class Exported:
    """A checked export.

    Attributes:
        format: "lora".
        path: Its folder.
        rank: The largest LoRA rank in it.
        max_relative_logit_difference: max |reloaded - live| / max |live| over the probe's logits.
    """

    format: str
    path: str
    rank: int
    max_relative_logit_difference: float

    def as_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def export(
    model: PeftModel,
    folder: str | Path,
    *,
    fresh_base: Callable[[], PreTrainedModel] | None = None,
    probe: Mapping[str, Tensor] | None = None,
    tolerance: float | None = None,
    card: str | None = None,
) -> Exported:
    """Write `model` as a plain LoRA for its original base, reload it with PEFT and compare the logits.

    Args:
        model: From `attach`, trained.
        folder: Where to; must not hold anything but an earlier export.
        fresh_base: Loads the original base once more; default: from the path that the model came from.
        probe: Keyword arguments of a forward pass; default: 2 x 32 token ids spread over the vocabulary.
        tolerance: Largest relative logit difference; default 1e-4 for a float32 base, else 5e-2, a few roundings.
        card: Text of README.md; default: PEFT's.

    Raises:
        CheckError: the reloaded adapter gives other logits; nothing is left in `folder` then.
        ArtifactError: the folder holds something else.
        ResourceError: not enough space.
    """
    folder = Path(folder)
    if folder.exists() and not {path.name for path in folder.iterdir()} <= _FILES:
        raise ArtifactError("the export folder holds something else", where=str(folder), fix="name another folder")
    base = model.get_base_model()
    tolerance = tolerance or (1e-4 if base.dtype == torch.float32 else 5e-2)
    probe = probe or spread_probe(base)
    training = model.training
    model.eval()
    live = probe_logits(model, probe)
    model.train(training)
    parameters = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    artifact.need_disk(folder, 8 * parameters)
    temporary = folder.with_name(f"{artifact.TEMPORARY}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(str(temporary))
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        reloaded = PeftModel.from_pretrained((fresh_base or _loader(base))(), str(temporary)).eval()
        difference = relative_difference(probe_logits(reloaded, probe), live)
        config = reloaded.peft_config["default"]
        del reloaded
        if not difference <= tolerance:
            raise CheckError(
                "the exported adapter does not give the trained model's logits after reload",
                where=str(folder),
                got=f"relative difference {difference:.2g}",
                expected=f"at most {tolerance:.2g}",
            )
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rank = max([config.r, *config.rank_pattern.values()])
    return Exported("lora", str(folder), rank, difference)


@torch.no_grad()
def probe_logits(model: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    """Logits on the probe, (B, L, V) fp32, on the CPU."""
    device = next(model.parameters()).device
    logits = model(**{name: value.to(device) for name, value in probe.items()}).logits
    assert isinstance(logits, Tensor)
    return logits.float().cpu()


def spread_probe(model: nn.Module) -> dict[str, Tensor]:
    """2 x 32 token ids spread evenly over the vocabulary."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.linspace(0, embeddings.weight.shape[0] - 1, 64).long().reshape(2, 32)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _loader(base: PreTrainedModel) -> Callable[[], PreTrainedModel]:
    parameter = next(base.parameters())
    if not base.name_or_path:
        raise ModelError("the base model has no path to load it from again", fix="give export a `fresh_base`")
    revision = getattr(base.config, "_commit_hash", None)

    def load() -> PreTrainedModel:
        model: PreTrainedModel = type(base).from_pretrained(
            base.name_or_path, dtype=parameter.dtype, revision=revision or "main"
        )
        return model.to(parameter.device)

    return load
