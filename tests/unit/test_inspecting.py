"""What `corda inspect` says of contexts and adapters, against values computed apart."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from corda.adapter import attach
from corda.context.collect import collect
from corda.context.store import save
from corda.errors import ArtifactError
from corda.inspecting import adapter_facts, context_facts
from corda.plan.make import make_plan
from corda.report.table import adapter_table, context_table


def text_of(table, width=120):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return "\n".join(lines)


def test_context_facts_are_those_of_its_covariances(model, tokenizer, texts, tmp_path):
    context = collect(model, tokenizer, texts, samples=6, rounds=3)
    save(context, tmp_path / "context", "k", {"again": {"tokens": 999, "seconds": 12.5}}, seconds=2.0)
    facts = context_facts(tmp_path / "context")
    assert (facts["rounds"], facts["layers"], len(facts["inputs"])) == (3, 14, 8)
    attention, down = facts["inputs"][0], facts["inputs"][3]
    assert attention["layers"] == [f"model.layers.0.self_attn.{m}_proj" for m in "qkv"]
    assert down["d_in"] == 80
    for one in (attention, down):
        for r in range(3):
            C = context.covariance(one["group"], r).double()
            assert one["tokens"][r] == context.token_count(one["group"], r)
            assert one["mean_diagonal"][r] == pytest.approx(float(C.trace()) / one["d_in"], rel=1e-5)
            values = torch.linalg.eigvalsh(C)
            expected = float(values.sum() ** 2 / values.square().sum())
            assert one["effective_rank"][r] == pytest.approx(expected, rel=1e-4)
            assert 1 <= one["effective_rank"][r] <= one["d_in"]
    stored = sum(p.stat().st_size for p in (tmp_path / "context").glob("*.safetensors"))
    assert facts["kept"]["bytes"] == stored
    assert facts["kept"]["write_seconds"] > 2.0
    table = text_of(context_table(facts))
    assert "3 rounds, 14 layers, 8 distinct inputs" in table
    assert "0.self_attn.q_proj" in table
    assert "999 tokens through the model, 12.5 s" in table
    assert "…" not in text_of(context_table(facts), 80)


def test_no_context_here(tmp_path):
    with pytest.raises(ArtifactError, match="there is no context here"):
        context_facts(tmp_path)


def check_layers(facts, live, names):
    assert [layer["name"] for layer in facts["layers"]] == names
    for layer in facts["layers"]:
        module = live.base_model.model.get_submodule(layer["name"])
        delta = module.get_delta_weight("default").double()
        assert layer["scaling"] == pytest.approx(module.scaling["default"])
        assert layer["rank"] == module.r["default"]
        assert (layer["d_out"], layer["d_in"]) == tuple(delta.shape)
        assert layer["norm"] == pytest.approx(float(delta.norm()), rel=1e-5, abs=1e-6)
        assert layer["norm_A"] == pytest.approx(float(module.lora_A["default"].weight.norm()), rel=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_wrote_with_patterns(model, tmp_path, rslora):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 7, "^model.layers.0.self_attn.q_proj": 3},
        alpha_pattern={"layers.1.mlp.down_proj": 5},
        init_lora_weights=False,
    )
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    facts = adapter_facts(tmp_path)
    names = [f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
    facts["layers"].sort(key=lambda layer: names.index(layer["name"]))
    check_layers(facts, model_with(tmp_path), names)
    assert [layer["rank"] for layer in facts["layers"]] == [3, 4, 4, 7]
    last = facts["layers"][-1]
    assert last["scaling"] == pytest.approx(5 / (math.sqrt(7) if rslora else 7))
    assert last["parameters"] == 7 * (80 + 48)
    assert facts["parameters"] == sum(layer["parameters"] for layer in facts["layers"])
    table = text_of(adapter_table(facts))
    assert f"{facts['parameters']:,} parameters" in " ".join(table.split())
    assert ("rsLoRA" in table) == rslora


def model_with(folder):
    from conftest import llama

    return PeftModel.from_pretrained(llama(), str(folder))


def test_an_adapter_of_ours_moves_nothing_at_the_start(model, tokenizer, texts, tmp_path):
    context = collect(model, tokenizer, texts)
    wrapped = attach(model, make_plan(model, context, rank=5, ranks={"model.layers.1.mlp.up_proj": 9}))
    wrapped.save_pretrained(str(tmp_path))
    layers = {layer["name"]: layer for layer in adapter_facts(tmp_path)["layers"]}
    assert len(layers) == 14
    assert layers["model.layers.1.mlp.up_proj"]["rank"] == 18
    assert max(layer["norm"] for layer in layers.values()) < 1e-5
    assert min(layer["norm_A"] for layer in layers.values()) > 0.1


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_and_other_tensors_are_counted(model, tmp_path):
    config = LoraConfig(r=3, target_modules=["embed_tokens"], modules_to_save=["lm_head"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    facts = adapter_facts(tmp_path)
    assert facts["layers"][0]["parameters"] == 3 * (259 + 48)
    assert facts["other_parameters"] == 2 * 259 * 48  # PEFT saves the embedding itself too
    assert "24,864 of the parameters are not LoRA factors" in text_of(adapter_table(facts))


def test_what_is_no_lora_folder_is_refused(model, tmp_path):
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, text = load_file(weights), config.read_text()
    key = next(name for name in whole if "lora_B" in name)
    for tensors, message in (
        (whole | {key: torch.ones(48, 5)}, r"do not fit together.*B \(48, 5\).*expected|Expected: A \(r, d_in\)"),
        ({k: v for k, v in whole.items() if k != key}, "do not fit together"),
        ({"something": torch.ones(2)}, "no LoRA factors"),
    ):
        save_file(tensors, weights)
        with pytest.raises(ArtifactError, match=message):
            adapter_facts(tmp_path)
    weights.write_bytes(b"x")
    with pytest.raises(ArtifactError, match="cannot be read"):
        adapter_facts(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"in a \.bin file, which may hold code.*save it again"):
        adapter_facts(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ArtifactError, match="the adapter has no weights"):
        adapter_facts(tmp_path)
    for content, message in (
        (json.dumps(json.loads(text) | {"peft_type": "LOHA"}), "is not a LoRA.*LOHA"),
        ("[]", "is not a LoRA.*list"),
        ("{", "not JSON"),
    ):
        config.write_text(content)
        with pytest.raises(ArtifactError, match=message):
            adapter_facts(tmp_path)
    config.unlink()
    with pytest.raises(ArtifactError, match="there is no adapter here"):
        adapter_facts(tmp_path)
