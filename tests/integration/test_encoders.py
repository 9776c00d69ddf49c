"""Classifiers from a recipe to the reloaded export, on random encoders of two blocks with a byte tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import WORDS, byte_tokenizer, llama, write_jsonl
from peft import PeftModel
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from corda import artifact, pipeline
from corda.chatting import open_pair
from corda.context import store
from corda.data.labelled import words_tokenised
from corda.errors import DataError, ModelError, RecipeError
from corda.estimate.estimate import estimate
from corda.evaluation.classification import class_logits
from corda.inputs import Inputs
from corda.kinds.labels import mean_loss
from corda.models import Source, load, load_tokenizer
from corda.options import ModelOptions
from corda.reading import parse_recipe
from corda.training import train

SMALL = {
    "vocab_size": 259,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
BODIES = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, type_vocab_size=1)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, **ENDS, initializer_cutoff_factor=3.0)),
}
MOODS = ("bad", "dull", "good")


@pytest.fixture(scope="session")
def bodies(tmp_path_factory):
    """Folders of random bodies without a head."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, make in BODIES.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture
def moods(tmp_path):
    """Three classes that a word of the text tells, and pairs that are alike or not; lengths differ."""
    folder = tmp_path / "data"
    folder.mkdir()
    single = [
        {"sentence": f"The {w} of {i}{' and more' * (i % 3)} is {MOODS[i % 3]}.", "label": MOODS[i % 3]}
        for i, w in enumerate(WORDS * 6)
    ]
    pairs = [
        {"sentence1": f"The {w} is {i}{' or so' * (i % 4)}.", "sentence2": "It is." if i % 2 else "No!", "label": i % 2}
        for i, w in enumerate(WORDS * 6)
    ]
    for name, records in (("single", single), ("pairs", pairs)):
        write_jsonl(folder / f"{name}.jsonl", records[:48])
        write_jsonl(folder / f"{name}_test.jsonl", records[48:])
    write_jsonl(folder / "texts.jsonl", [{"text": f"Some {w} that is to be kept."} for w in WORDS])
    return folder


@pytest.fixture
def classify(bodies, moods, tmp_path):
    def raw(body="bert", data="single", mode="ipm", **model):
        return {
            "output_dir": str(tmp_path / "run"),
            "model": {
                "model_name_or_path": str(bodies / body),
                "device": "cpu",
                "task": "sequence-classification",
                **model,
            },
            "data": {"data_dir": str(moods), "learn": f"{data}.jsonl"},
            "context": {"samples": 16, "batch_size": 4},
            "adapter": {"mode": mode, "rank": 3},
            "training": {"max_steps": 8, "learning_rate": 0.01, "per_device_train_batch_size": 8},
            "evaluation": {
                "batch_size": 5,
                "tasks": {
                    "moods": {
                        "dataset": f"{data}_test.jsonl",
                        "measures": "learn",
                        "metrics": ["loss", "accuracy", "f1"],
                    }
                },
            },
        }

    return raw


@pytest.mark.parametrize(
    ("body", "data", "mode"),
    [
        ("bert", "single", "ipm"),
        ("bert", "pairs", "lora"),
        ("roberta", "pairs", "ipm"),
        ("modernbert", "single", "ipm"),
    ],
)
def test_a_classifier_from_recipe_to_reloaded_export(classify, bodies, body, data, mode):
    recipe = parse_recipe(classify(body, data, mode))
    results = pipeline.run(recipe)
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    assert len(results["train"]["loss"]) == 8
    scores = results["scores"]["after"]
    assert set(scores) == {"moods/loss", "moods/accuracy", "moods/f1"}
    assert all(score["n"] == 12 and score["stderr"] > 0 for name, score in scores.items() if "loss" in name)
    shown = results["answers"]["after"]["moods"]
    assert [one["right"] for one in shown] == [one["generated"] == one["expected"][0] for one in shown]
    classes = 3 if data == "single" else 2

    # As its users load it: another random head, which the export's own takes the place of.
    base = AutoModelForSequenceClassification.from_pretrained(bodies / body, num_labels=classes)
    adapter = recipe.output_dir / "adapter"
    loaded = PeftModel.from_pretrained(base, str(adapter)).eval()
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    assert loaded.peft_config["default"].modules_to_save
    inputs = Inputs(recipe)
    encoded = [inputs.kind.encode(record) for record in inputs.tasks[0].records]
    batch = inputs.kind.forward(encoded)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        logits = loaded(**batch).logits
    labels = torch.tensor([one.labels[0] for one in encoded])
    assert float((logits.argmax(-1) == labels).double().mean()) == scores["moods/accuracy"]["value"]
    assert float(mean_loss(logits, labels)) == pytest.approx(scores["moods/loss"]["value"], rel=1e-4)
    learnt = [inputs.kind.encode(record) for record in inputs.learn_records]
    with torch.no_grad():
        losses = [float(model(**inputs.kind.batch(learnt)).loss) for model in (pipeline.Bases(inputs).bare(), loaded)]
    assert losses[1] < losses[0]
    card = (adapter / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification" in card
    assert ("num_labels=2" in card) if data == "pairs" else ("id2label={0: 'bad', 1: 'dull', 2: 'good'}" in card)


def test_a_finished_run_is_not_run_again_and_another_seed_is_another_head(classify, monkeypatch):
    raw = classify()
    first = pipeline.run(parse_recipe(raw))
    monkeypatch.setattr(pipeline.training, "train", lambda *a, **k: pytest.fail("trained again"))
    assert pipeline.run(parse_recipe(raw)) == first
    kept = Inputs(parse_recipe(raw)).fingerprints
    raw["model"]["head_seed"] = 1
    moved = Inputs(parse_recipe(raw)).fingerprints
    assert {stage for stage in kept if kept[stage] != moved[stage]} == {"before", "train", "after", "export"}


def test_a_fresh_head_follows_from_its_seed(classify):
    heads = []
    for seed in (0, 0, 1):
        bases = pipeline.Bases(Inputs(parse_recipe(classify(head_seed=seed))))
        torch.randn(seed + 3)  # whatever was drawn before
        heads.append(bases.bare().classifier.weight.detach())
    assert heads[0].shape == (3, 48)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_classifiers_loss_on_validation_records_is_read(classify, moods):
    raw = classify()
    lines = (moods / "single_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (moods / "validation.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    (moods / "single_test.jsonl").write_text("".join(lines[4:]), encoding="utf-8")
    raw["data"]["validation"] = "validation.jsonl"
    raw["training"] |= {"eval_steps": 0.25, "per_device_eval_batch_size": 3}
    results = pipeline.run(parse_recipe(raw))
    curve = results["train"]
    assert curve["eval_step"] == [2, 4, 6, 8]
    assert len(curve["loss"]) == 8
    assert all(0 < loss < 10 for loss in curve["eval_loss"])


def test_labels_of_validation_records_are_checked_first(classify, moods):
    (moods / "validation.jsonl").write_text('{"text": "Fine.", "label": "unheard-of"}\n', encoding="utf-8")
    raw = classify()
    raw["data"]["validation"] = "validation.jsonl"
    with pytest.raises(DataError, match=r"none of the classes.*data\.validation.*unheard-of"):
        pipeline.Stages(parse_recipe(raw), pipeline.silent).check()


def test_one_batch_of_eight_trains_as_eight_of_one(classify, tmp_path):
    """Some of transformers' classifiers average over each batch whatever the trainer says."""
    changes = []
    for size, gathered in ((8, 1), (1, 8), (2, 4)):
        raw = classify()
        raw["output_dir"] = str(tmp_path / f"run{size}")
        raw["training"] |= {
            "max_steps": 1,
            "per_device_train_batch_size": size,
            "warmup_steps": 0,
            "max_grad_norm": 1e9,
        }
        raw["training"] |= {"gradient_accumulation_steps": gathered, "optim": "sgd"}
        stages = pipeline.Stages(parse_recipe(raw), pipeline.silent)
        kind = stages.inputs.kind
        model, _ = stages.bases.attached(stages.plan())
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        encoded = [kind.encode(record) for record in stages.inputs.learn_records]
        train(
            model,
            kind.tokenizer,
            encoded,
            stages.recipe.training,
            folder=stages.folder / "checkpoints",
            fingerprint="k",
            trainer_of=kind.trainer,
        )
        now = dict(model.named_parameters())
        changes.append(torch.cat([(now[n].detach() - p).flatten() for n, p in before.items()]))
    assert float(changes[0].norm()) > 0
    for other in changes[1:]:
        assert float((other - changes[0]).norm()) <= 1e-4 * float(changes[0].norm())


def test_pads_do_not_change_a_class_and_token_types_reach_the_model(classify):
    stages = pipeline.Stages(parse_recipe(classify(data="pairs")), pipeline.silent)
    kind, model = stages.inputs.kind, stages.bases.bare()
    encoded = [kind.encode(record) for record in stages.inputs.learn_records[:6]]
    assert all(set(one.kinds["token_type_ids"]) == {0, 1} for one in encoded)
    together = kind.forward(encoded)
    assert set(together) == {"input_ids", "attention_mask", "token_type_ids"}
    with torch.no_grad():
        batched = model(**together).logits
        single = torch.cat([model(**kind.forward([one])).logits for one in encoded])
        without = model(input_ids=together["input_ids"], attention_mask=together["attention_mask"]).logits
    torch.testing.assert_close(batched, single, rtol=1e-4, atol=1e-5)
    assert float((batched - without).abs().max()) > 1e-3


@pytest.mark.parametrize("stream", [True, False])
def test_the_context_is_that_of_the_texts_as_the_model_sees_them(classify, stream):
    raw = classify(data="pairs")
    raw["context"]["stream"] = stream
    raw["adapter"]["target_modules"] = ["query", "intermediate.dense"]
    stages = pipeline.Stages(parse_recipe(raw), pipeline.silent)
    context = stages.context()
    model, kind, seen = stages.bases.bare(), stages.inputs.kind, []
    layer = "bert.encoder.layer.1.attention.self.query"
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    [chosen], _ = stages.inputs.calibration()
    with torch.no_grad():
        for one in chosen:
            model(**kind.forward([one]))
    handle.remove()
    X = torch.cat(seen)
    assert context.token_count(layer) == len(X) == sum(map(len, chosen))
    C = context.covariance(layer)
    assert float((C - X.T @ X / len(X)).norm()) <= 1e-5 * float(C.norm())


def test_knowledge_to_keep_needs_no_labels(classify):
    raw = classify(mode="kpm")
    raw["data"]["keep"] = "texts.jsonl"
    results = pipeline.run(parse_recipe(raw))
    assert results["drift"]["total"] > 0
    assert store.load(artifact.read(parse_recipe(raw).output_dir / "context", "context")).layers


def test_labels_of_what_is_kept_may_be_those_of_another_set(classify, tag, moods):
    """Four kinds of news beside three moods: nothing but the texts is looked at."""
    news = [{"sentence": f"News of {w} today.", "label": i % 4} for i, w in enumerate(WORDS)]
    write_jsonl(moods / "news.jsonl", news)
    for raw, kept in ((classify(mode="kpm"), "news.jsonl"), (tag(mode="kpm"), "kept_tags.jsonl")):
        words = [{"tokens": ["News", "of", w], "tags": ["X", "X", "Y"]} for w in WORDS]
        write_jsonl(Path(raw["data"]["data_dir"]) / "kept_tags.jsonl", words)
        raw["data"]["keep"] = kept
        inputs = Inputs(parse_recipe(raw))
        [chosen, *_], _ = inputs.calibration()
        assert len(chosen) == len(WORDS)
        texts = {inputs.tokenizer.decode(one.ids, skip_special_tokens=True) for one in chosen}
        assert all("News" in text for text in texts)


def test_a_merged_export_is_a_classifier_with_named_classes(classify):
    raw = classify()
    raw["export"] = {"format": "merged"}
    recipe = parse_recipe(raw)
    results = pipeline.run(recipe)
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(recipe.output_dir / "merged")
    assert merged.config.id2label == dict(enumerate(MOODS))


def test_a_decoder_with_a_head_runs_too(classify, tmp_path):
    folder = tmp_path / "llama"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    raw = classify()
    raw["model"]["model_name_or_path"] = str(folder)
    results = pipeline.run(parse_recipe(raw))
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["export"]["max_relative_logit_difference"] <= 1e-5


def test_a_class_is_read_off_the_last_token_whatever_the_config_takes_for_a_pad(classify, tmp_path):
    folder, tokenizer = tmp_path / "llama", byte_tokenizer()
    body = llama()
    body.config.pad_token_id = 7
    body.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    raw = classify()
    raw["model"]["model_name_or_path"] = str(folder)
    inputs = Inputs(parse_recipe(raw))
    assert inputs.tokenizer.pad_token_id != 7
    model = load(inputs.model).model
    encoded = [inputs.kind.encode(record) for record in inputs.learn_records[:6]]
    assert len({len(one) for one in encoded}) > 1
    alone, together = (class_logits(model, encoded, inputs.tokenizer.pad_token_id, size) for size in (1, 6))
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), atol=1e-5)


def test_a_checkpoint_with_a_head_keeps_it(classify, tmp_path):
    torch.manual_seed(0)
    names = {0: "bad", 1: "dull", 2: "good"}
    config = RobertaConfig(**SMALL, id2label=names, label2id={name: i for i, name in names.items()})
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "tuned")
    byte_tokenizer().save_pretrained(tmp_path / "tuned")
    raw = classify(task="auto")
    raw["model"]["model_name_or_path"] = str(tmp_path / "tuned")
    inputs = Inputs(parse_recipe(raw))
    assert inputs.kind.task == "sequence-classification"
    assert inputs.kind.classes == MOODS
    stored = RobertaForSequenceClassification.from_pretrained(tmp_path / "tuned").classifier.out_proj.weight
    assert torch.equal(pipeline.Bases(inputs).bare().classifier.out_proj.weight, stored)
    raw["model"]["num_labels"] = 4
    with pytest.raises(ModelError, match=r"a head for another number of classes.*3 classes.*4, as model"):
        Inputs(parse_recipe(raw)).check()


def test_a_text_is_cut_to_what_the_model_takes(classify, moods):
    write_jsonl(moods / "single.jsonl", [{"text": "word " * 60, "label": i % 2} for i in range(20)])
    assert len(Inputs(parse_recipe(classify("bert"))).kind.encode(record_of(classify("bert")))) == 128
    assert len(Inputs(parse_recipe(classify("roberta"))).kind.encode(record_of(classify("roberta")))) == 127


def record_of(raw):
    return Inputs(parse_recipe(raw)).learn_records[0]


def set_in(raw, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.setdefault(parent, {})
    raw[last] = value


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("context.pack_to", 64, RecipeError, r"not done for sequence-classification.*context\.pack_to"),
        ("context.positions", "response", RecipeError, r"context\.positions.*set it to all"),
        ("context.offload", True, RecipeError, r"context\.offload.*a fresh head is in no checkpoint"),
        ("data.template", "chat", RecipeError, r"data\.template"),
        ("model.load_in_4bit", True, RecipeError, r"model\.load_in_4bit.*full precision"),
        ("model.task", "auto", ModelError, r"the checkpoint is an encoder.*set model\.task"),
        ("model.task", "causal-lm", ModelError, r"type bert cannot be loaded.*sequence-classification"),
        ("model.task", "token-classification", DataError, r"fit no format.*tagged \(ner_tags, tokens\)"),
        ("model.num_labels", 2, DataError, r"more classes than the head.*3: bad, dull, good"),
        ("model.id2label", {0: "bad", 1: "good"}, DataError, r"none of the classes.*dull"),
        ("training.completion_only_loss", True, RecipeError, r"trainer refuses these options.*completion_only_loss"),
        ("evaluation.tasks.moods.metrics", ["answer_loss"], DataError, r"none of a classifier's.*metrics: \[loss"),
        ("evaluation.tasks.moods.shots", 2, DataError, r"leave shots out"),
        ("data.learn", {"dataset": "texts.jsonl"}, DataError, r"fit no format.*classification \(text, label\)"),
        ("data.learn", {"dataset": "single.jsonl", "format": "qa"}, DataError, r"of no use here.*classification"),
    ],
)
def test_what_is_not_done_is_refused_by_name(classify, key, value, error, message):
    raw = classify()
    set_in(raw, key, value)
    with pytest.raises(error, match=re.compile(message, re.S)), pipeline.opened(parse_recipe(raw)):
        pass
    assert not parse_recipe(raw).output_dir.exists()


def test_what_needs_text_is_refused(classify):
    recipe = parse_recipe(classify())
    pipeline.run(recipe)
    for what in (lambda: estimate(recipe), lambda: open_pair(recipe)):
        with pytest.raises(RecipeError, match="models that continue text"):
            what()


@pytest.fixture
def tag(classify, moods):
    """Words of which numbers and the words behind "of" are spans; lengths differ."""
    records = []
    for i, w in enumerate(WORDS * 6):
        words = ["The", w, "of", *["item"] * (1 + i % 2), str(i), "fits"]
        records.append(
            {"tokens": words, "ner_tags": ["O", "O", "O", "B-THING", *["I-THING"] * (i % 2), "B-NUMBER", "O"]}
        )
    write_jsonl(moods / "tags.jsonl", records[:48])
    write_jsonl(moods / "tags_test.jsonl", records[48:])

    def raw(body="bert", mode="ipm"):
        raw = classify(body, "tags", mode, task="token-classification")
        raw["training"] |= {"max_steps": 12}
        return raw

    return raw


@pytest.mark.parametrize(("body", "mode"), [("bert", "ipm"), ("modernbert", "lora")])
def test_tags_from_recipe_to_reloaded_export(tag, bodies, body, mode):
    recipe = parse_recipe(tag(body, mode))
    results = pipeline.run(recipe)
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    before, after = results["scores"]["before"], results["scores"]["after"]
    assert after["moods/loss"]["value"] < before["moods/loss"]["value"]
    assert after["moods/f1"]["n"] == 12
    base = AutoModelForTokenClassification.from_pretrained(bodies / body, num_labels=4)
    loaded = PeftModel.from_pretrained(base, str(recipe.output_dir / "adapter")).eval()
    inputs = Inputs(recipe)
    batch = inputs.kind.batch([inputs.kind.encode(record) for record in inputs.tasks[0].records])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = loaded(**batch).logits
    assert float(mean_loss(logits, labels)) == pytest.approx(after["moods/loss"]["value"], rel=1e-4)
    counted = labels != -100
    right = (logits.argmax(-1) == labels)[counted].double().mean()
    assert float(right) == pytest.approx(after["moods/accuracy"]["value"])


def test_a_tag_stands_at_the_first_token_of_its_word(tag):
    inputs = Inputs(parse_recipe(tag()))
    assert inputs.kind.classes == ("B-NUMBER", "B-THING", "I-THING", "O")
    record = inputs.learn_records[11]
    one = inputs.kind.encode(record)
    marked = [(inputs.tokenizer.decode([t]), label) for t, label in zip(one.ids, one.labels, strict=True) if label >= 0]
    pairs = zip(record.words, record.answers, strict=True)
    assert marked == [(word[0], inputs.kind.classes.index(name)) for word, name in pairs]


def test_words_of_a_model_with_spaces_in_its_tokens_have_them(tmp_path):
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    RobertaTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=[]).save_pretrained(tmp_path)
    RobertaConfig(vocab_size=len(names)).save_pretrained(tmp_path)
    options = ModelOptions(model_name_or_path=str(tmp_path), task="token-classification")
    tokenizer = load_tokenizer(Source(str(tmp_path), None), options)
    ids, words = words_tokenised(["ab", "c"], tokenizer, None)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " ab c"
    assert words == (None, 0, 0, 0, 1, 1, None)


def test_tags_that_name_no_spans_have_no_f1(tag, moods):
    write_jsonl(moods / "tags.jsonl", [{"tokens": ["a", w], "tags": [0, 1]} for w in WORDS])
    write_jsonl(moods / "tags_test.jsonl", [{"tokens": ["b", w], "tags": [0, 1]} for w in WORDS])
    with pytest.raises(DataError, match=r"f1 of tags counts spans.*LABEL_0, LABEL_1.*leave f1 out"):
        Inputs(parse_recipe(tag())).check()


@pytest.fixture
def ask(data, tmp_path):
    """A recipe of a random T5."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=259,
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        eos_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")

    def raw(mode="ipm"):
        return {
            "output_dir": str(tmp_path / "run"),
            "model": {"model_name_or_path": str(tmp_path / "t5"), "device": "cpu"},
            "data": {"data_dir": str(data), "learn": "learn.jsonl"},
            "context": {"samples": 12, "held_out": 0},
            "adapter": {"mode": mode, "rank": 3},
            "training": {"max_steps": 10, "learning_rate": 0.02, "per_device_train_batch_size": 8},
            "evaluation": {
                "batch_size": 4,
                "tasks": {
                    "sums": {
                        "dataset": "learn_test.jsonl",
                        "measures": "learn",
                        "metrics": ["answer_loss", "exact_match"],
                        "max_new_tokens": 8,
                    }
                },
            },
        }

    return raw


@pytest.mark.parametrize("mode", ["ipm", "lora"])
def test_an_encoder_with_a_decoder_from_recipe_to_reloaded_export(ask, tmp_path, mode):
    recipe = parse_recipe(ask(mode))
    results = pipeline.run(recipe)
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    before, after = (results["scores"][side]["sums/answer_loss"] for side in ("before", "after"))
    assert after["value"] < before["value"]
    assert after["n"] == results["scores"]["after"]["sums/exact_match"]["n"] == 10
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    loaded = PeftModel.from_pretrained(base, str(recipe.output_dir / "adapter")).eval()
    assert loaded.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    kind, losses, tokens = Inputs(recipe).kind, 0.0, 0
    for record in kind.tasks[0].records:
        labels = torch.tensor([kind.tokenizer(record.response.strip())["input_ids"]])
        asked = torch.tensor([kind.tokenizer(record.prompt)["input_ids"]])
        with torch.no_grad():
            losses += float(loaded(input_ids=asked, labels=labels).loss) * labels.numel()
        tokens += labels.numel()
    assert losses / tokens == pytest.approx(after["value"], rel=1e-4)
    assert "AutoModelForSeq2SeqLM" in (recipe.output_dir / "adapter" / "README.md").read_text()


def test_an_encoder_with_a_decoder_keeps_knowledge_of_texts(ask):
    raw = ask("kpm")
    raw["data"]["keep"] = "keep.jsonl"
    results = pipeline.run(parse_recipe(raw))
    assert results["step0"]["max_relative_logit_difference"] <= 1e-5
    assert results["drift"]["total"] > 0


class Parrot(torch.nn.Module):
    """Says the number of every question's first digit, and an end mark."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, attention_mask, generation_config):
        digits = [next(int(t) for t in row if chr(t - 3 + 33).isdigit()) for row in input_ids]
        start, end = generation_config.decoder_start_token_id, generation_config.eos_token_id[0]
        return torch.tensor([[start, digit, end, 0] for digit in digits])


def test_a_right_answer_of_a_decoder_beside_an_encoder_is_found(ask):
    kind = Inputs(parse_recipe(ask())).kind
    [task] = kind.tasks
    task = replace(task, options=task.options.model_copy(update={"metrics": ["exact_match"]}))
    records = [replace(one, answers=(str(3 * (i % 2)),)) for i, one in enumerate(task.records)]  # "Add 30 and 33."
    found = kind.evaluate(Parrot(), [replace(task, records=tuple(records))])
    assert found.values["sums/exact_match"].value == 0.5
    assert {one["generated"] for one in found.answers["sums"]} == {"3"}


def test_a_checkpoints_own_habits_of_generating_do_not_count(ask):
    kind = Inputs(parse_recipe(ask())).kind
    [task] = kind.tasks
    task = replace(task, options=task.options.model_copy(update={"metrics": ["exact_match"]}), records=task.records[:4])
    model = load(Inputs(parse_recipe(ask())).model).model
    plain = kind.evaluate(model, [task]).answers["sums"]
    habits = {"min_length": 7, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1}
    for name, value in habits.items():
        setattr(model.generation_config, name, value)
    assert kind.evaluate(model, [task]).answers["sums"] == plain


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("adapter.mode", "kpm", RecipeError, r"not done for seq2seq-lm.*context\.held_out.*set it to 0"),
        ("adapter.mode", "contrast", RecipeError, r"adapter\.mode.*one context is collected"),
        ("context.pack_to", 64, RecipeError, r"context\.pack_to"),
        ("context.positions", "response", RecipeError, r"context\.positions"),
        ("model.load_in_4bit", True, RecipeError, r"model\.load_in_4bit"),
        ("evaluation.tasks.sums.shots", 1, DataError, r"leave shots out"),
        ("evaluation.tasks.sums.metrics", ["perplexity"], DataError, r"metrics: \[answer_loss, exact_match"),
        ("model.task", "sequence-classification", DataError, r"fit no format"),
    ],
)
def test_what_an_encoder_with_a_decoder_does_not_do_is_refused_by_name(ask, key, value, error, message):
    raw = ask()
    set_in(raw, key, value)
    if key == "adapter.mode":
        raw["data"]["keep"], raw["context"]["held_out"] = "keep.jsonl", 4
    with pytest.raises(error, match=re.compile(message, re.S)):
        Inputs(parse_recipe(raw)).check()


def test_the_command_line_runs_a_classifier(classify, write_recipe, corda):
    path = write_recipe(classify())
    code, out, err = corda("run", path)
    assert code == 0, err
    assert "accuracy %" in out
    assert "F1 %" in out
    code, out, _ = corda("run", path, "--dry-run", "--json")
    assert json.loads(out)["layers"] == 13
