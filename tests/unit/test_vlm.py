"""Vision-language models of three layouts: every stage on random models, towers, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from corda.adapter import attach, lora_config, relative_difference
from corda.context.collect import collect, collect_encoded
from corda.data.batches import encode, padded
from corda.data.formats import to_records
from corda.errors import CalibrationError, TargetError
from corda.evaluation.generation import exact_match, generate, prompt
from corda.evaluation.likelihood import answer_loss
from corda.exporting.check import probe_logits
from corda.exporting.export import export
from corda.plan.make import make_plan
from corda.recipe import TrainingOptions
from corda.targets import find_targets
from corda.towers import tower_of, towers
from corda.training import train
from tests.conftest import llama, note_family
from tests.vlms import LAYOUTS, picture, records, save

NAMES = {"llava": "LLaVA-1.5 (images)", "qwen": "Qwen2-VL (images)", "idefics": "Idefics3, SmolVLM (images)"}
TOWERS = ["language", "vision", "projector"]


class Case:
    """A layout's model on disk, its processor, and records of it."""

    def __init__(self, layout: str, folder: Path) -> None:
        self.layout, self.folder = layout, folder / "model"
        self.facts: dict[str, str] = {}
        self.processor = save(layout, self.folder)
        raw = records(folder, 12)
        self.raw = [one | {"image": str(folder / one["image"])} for one in raw]
        self.records = to_records(self.raw)
        self.encoded = [encode(record, self.processor) for record in self.records]
        self._model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.context = collect(self.model(), self.processor, self.raw)

    def model(self) -> Any:
        return copy.deepcopy(self._model)

    def note(self, facts: dict[str, str]) -> None:
        self.facts |= facts
        note_family(NAMES[self.layout], self.facts)

    def probe(self) -> dict[str, torch.Tensor]:
        batch = padded(self.encoded[:3], 0)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.more}


@pytest.fixture(scope="module", params=list(LAYOUTS))
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return Case("llava", tmp_path_factory.mktemp("llava-alone"))


def one_by_one(case: Case, name: str, of_tokens: bool) -> torch.Tensor:
    """A layer's second moment from single records without padding, in fp64, by a hook of this test's own."""
    model, total, count = case.model(), 0.0, 0

    def see(_module, args, kwargs):
        nonlocal total, count
        x = (args[0] if args else next(iter(kwargs.values()))).double().flatten(0, -2)
        total, count = total + x.T @ x, count + len(x)

    model.get_submodule(name).register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for one in case.encoded:
            batch = padded([one], 0)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **batch.more)
    if of_tokens:
        assert count == sum(len(one) for one in case.encoded)
    return total / count


def near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one.double() - other.double()).norm() / other.double().norm()) < 1e-5


def test_image_tokens_count_as_tokens(case):
    assert set(case.context.tokens.values()) == {sum(len(one) for one in case.encoded)}
    image = sum(one.ids.count(case.model().config.image_token_id) for one in case.encoded)
    assert image >= 4 * len(case.encoded)
    for layer in (case.context.layers[0], case.context.layers[-1]):
        assert near(case.context.covariance(layer.name), one_by_one(case, layer.name, True))


def test_streamed_is_whole_whatever_the_batch(case):
    model = case.model()
    layers = find_targets(model)
    whole = collect_encoded(model, case.encoded, layers, pad_token_id=0, batch_size=5, stream=False)
    streamed = collect_encoded(model, case.encoded, layers, pad_token_id=0, batch_size=3)
    assert not any("not in blocks" in warning for warning in streamed.warnings)
    assert streamed.tokens == whole.tokens
    assert streamed.groups == whole.groups
    for name in whole.packed:
        assert near(streamed.packed[name], whole.packed[name])
    case.note({"collect": f"{len(layers)} layers", "stream": "= whole", "4-bit": "refused: images"})


def test_every_tower_can_be_collected(case):
    context = collect(case.model(), case.processor, case.raw, towers=TOWERS, batch_size=5)
    assert "collected whole, not in blocks" in context.warnings[0]
    found = towers(case.model())
    kinds = {tower_of(layer.name, found): layer.name for layer in context.layers}
    assert set(kinds) == set(TOWERS)
    for tower in ("vision", "projector"):
        assert near(context.covariance(kinds[tower]), one_by_one(case, kinds[tower], False))


PLANS = {
    "KPM": {"mode": "kpm"},
    "IPM": {"mode": "ipm"},
    "++": {"mode": "kpm", "allocation": "dynamic", "compactness_scale": "unit"},
}


@pytest.mark.parametrize("kind", PLANS)
def test_step_zero_training_and_reload(case, kind, tmp_path):
    model, probe = case.model(), case.probe()
    before = probe_logits(model, probe)
    adapted = attach(model, make_plan(model, case.context, rank=4, **PLANS[kind]))
    assert relative_difference(probe_logits(adapted, probe), before) <= 1e-5

    options = TrainingOptions(max_steps=2, learning_rate=2e-3, per_device_train_batch_size=12, warmup_steps=0)
    curve = train(adapted, case.processor, case.encoded, options, folder=tmp_path / "run", fingerprint="k")
    assert curve.loss[1] < curve.loss[0]  # one step on the same batch
    after = probe_logits(adapted, probe)
    assert relative_difference(after, before) > 1e-3

    done = export(adapted, tmp_path / "adapter", probe=probe, tokenizer=case.processor)
    assert done.max_relative_logit_difference <= 1e-5
    base = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found = relative_difference(probe_logits(reloaded, probe), after)
    assert found <= 1e-5
    case.note({kind: "step 0 exact", "train": "loss falls", "export": "rank 2r", "reload": f"{found:.0e}"})


def test_the_loss_trained_on_is_the_loss_measured(case, tmp_path):
    model = case.model()
    adapted = attach(model, make_plan(model, case.context, rank=4))
    expected = answer_loss(adapted, case.encoded, 0, 5).value
    options = TrainingOptions(max_steps=1, learning_rate=1e-6, per_device_train_batch_size=12, warmup_steps=0)
    curve = train(adapted, case.processor, case.encoded, options, folder=tmp_path / "run", fingerprint="k")
    assert curve.loss[0] == pytest.approx(expected, rel=1e-4)


def test_measuring_does_not_depend_on_the_batch_and_sees_the_images(case):
    model, processor = case.model(), case.processor
    assert answer_loss(model, case.encoded, 0, 1).value == pytest.approx(answer_loss(model, case.encoded, 0, 7).value)
    prompts = [prompt(record, processor, "plain") for record in case.records[:4]]
    alone = [generate(model, processor, [one], [], 6, 1)[0] for one in prompts]
    assert generate(model, processor, prompts, [], 6, 4) == alone
    score, answers = exact_match(model, processor, case.records[:2], template="plain", max_new_tokens=2)
    assert score.n == 2
    assert answers[0].expected == ("blue",)
    other = [encode(r, processor) for r in to_records([one | {"image": picture("red", 40)} for one in case.raw])]
    assert answer_loss(model, other, 0, 4).value != pytest.approx(answer_loss(model, case.encoded, 0, 4).value)


@pytest.mark.parametrize("form", ["merged", "residual"])
def test_full_weights_load_with_the_class_of_images_and_text(llava, form, tmp_path):
    model, probe = llava.model(), llava.probe()
    adapted = attach(model, make_plan(model, llava.context, rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    after = probe_logits(adapted, probe)
    export(adapted, tmp_path / "out", format=form, probe=probe, tokenizer=llava.processor)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if form == "residual":
        reloaded = PeftModel.from_pretrained(reloaded, tmp_path / "out" / "adapter")
    assert relative_difference(probe_logits(reloaded.eval(), probe), after) <= 1e-5


def test_towers_are_a_choice_and_names_are_full(llava):
    model = llava.model()
    assert {layer.name.split(".")[1] for layer in find_targets(model)} == {"language_model"}
    assert {layer.name.split(".")[1] for layer in find_targets(model, where=TOWERS)} == {
        "language_model",
        "vision_tower",
        "multi_modal_projector",
    }
    both = {layer.name for layer in find_targets(model, ["q_proj"], TOWERS)}
    only = {layer.name for layer in find_targets(model, ["q_proj"])}
    assert len(both) == 2 * len(only) == 4
    config = lora_config(model, make_plan(model, find_targets(model, ["q_proj"]), mode="lora", rank=2))
    assert sorted(config.target_modules) == sorted(only)  # "q_proj" would match the vision tower's too
    with pytest.raises(TargetError, match=r"matches no layer: 'linear_1'"):
        find_targets(model, ["linear_1"])
    with pytest.raises(TargetError, match=r"only a vision-language model has towers.*leave towers out"):
        find_targets(llama(), where=["vision"])


def test_an_adapter_on_every_tower_starts_at_the_base_and_reloads(llava, tmp_path):
    model, probe = llava.model(), llava.probe()
    before = probe_logits(model, probe)
    context = collect(model, llava.processor, llava.raw, towers=TOWERS)
    adapted = attach(model, make_plan(model, context, rank=4))
    assert relative_difference(probe_logits(adapted, probe), before) <= 1e-5
    assert export(adapted, tmp_path / "adapter", probe=probe).max_relative_logit_difference <= 1e-5


def test_patches_are_no_response(llava):
    with pytest.raises(CalibrationError, match=r"has no response tokens.*vision_tower"):
        collect(llava.model(), llava.processor, llava.raw, towers=["vision"], positions="response")


def test_padded_frames_do_not_count(tmp_path):
    """Idefics3 fills up the frames of a batch with empty ones, which its encoder must not be measured on."""
    case = Case("idefics", tmp_path)
    sizes = [(16, 16), (40, 20), (16, 30)]
    raw = [{"image": picture("red", *size), "question": "?", "answer": "red"} for size in sizes]
    case.encoded = [encode(one, case.processor) for one in to_records(raw)]
    assert len({len(one.visual.pixels()["pixel_values"][0]) for one in case.encoded}) > 1
    context = collect(case.model(), case.processor, raw, towers=TOWERS, batch_size=3)
    for name in ("model.vision_model.encoder.layers.1.mlp.fc2", "model.text_model.layers.1.mlp.down_proj"):
        assert near(context.covariance(name), one_by_one(case, name, False))
