"""The full-size studies, for one GPU: python benchmarks/gpu_study.py DATA_DIR [keep] [converge] [--minutes N] [--tiny].

Runs benchmarks/studies/NAME-smollm2-gpu.yaml in bf16, several runs side by side on the card, each study within its
minutes (24 in all), and keeps each comparison as results/NAME-smollm2-gpu.json. What is there already is not run again.
--tiny runs the same on a random model of two blocks on a CPU, as far as the minutes reach, to show that the studies
run; its numbers say nothing and are not kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from keep_study import keep

from corda.cli.output import quiet
from corda.comparing.compare import COMPARISON, compare
from corda.comparing.smoke import tiny_model
from corda.comparing.study import load_study

STUDIES = Path(__file__).parent / "studies"
_TINY_RECORDS = 24


def overrides(name: str, data_dir: str, output: Path, tiny: bool) -> list[str]:
    """What differs from the study's file."""
    given = [f"overrides.data.data_dir={data_dir}", f"output_dir={output / name}"]
    if not tiny:
        return given
    model = output / "model"
    tiny_model(model)
    return [
        *given,
        f"overrides.model.model_name_or_path={model}",
        "overrides.model.dtype=float32",
        "overrides.model.device=cpu",
        "overrides.adapter.budget=3712",
        "overrides.training.max_steps=2",
        "overrides.training.per_device_train_batch_size=2",
        "overrides.data.max_length=96",
        "overrides.context.samples=8",
        "devices=[cpu]",
        "seeds=[0]",
        "parameter_tolerance=0.15",
    ]


def main(names: list[str], data_dir: str, output: Path, minutes: float | None, tiny: bool) -> None:
    """Each study in turn."""
    quiet()
    for name in names:
        study = load_study(STUDIES / f"{name}-smollm2-gpu.yaml", overrides(name, data_dir, output, tiny))
        changes: dict[str, object] = {"minutes": minutes} if minutes is not None else {}
        if tiny:
            changes["base"] = _smaller(study.base)
        study = study.model_copy(update=changes)
        compare(study, announce=lambda text: print(text, flush=True))
        if not tiny:
            keep(study.output_dir / COMPARISON, f"{name}-smollm2-gpu")


def _smaller(base: dict) -> dict:  # type: ignore[type-arg]
    """The base with few records a task, the development split still apart from the test."""
    tasks = {}
    for task, options in base["evaluation"]["tasks"].items():
        start, stop = options["dataset"]["part"]
        part = [start, min(stop, start + (_TINY_RECORDS if task != "wikitext" else 1))]
        tasks[task] = options | {"dataset": options["dataset"] | {"part": part}}
    return base | {"evaluation": base["evaluation"] | {"tasks": tasks}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir")
    parser.add_argument("studies", nargs="*", default=["keep", "converge"])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, help="per study; default: its own")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    main(given.studies, given.data_dir, given.output, given.minutes, given.tiny)
