"""What is predicted before anything is loaded, against what stages then do."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from torch import nn

from corda import artifact, pipeline
from corda.errors import RecipeError
from corda.estimate.counting import makespan
from corda.estimate.estimate import estimate
from corda.estimate.facts import Facts
from corda.estimate.machine import H100, measure, rehearse_decomposition
from corda.estimate.rehearse import Live, faked, forward_bytes, shared_inputs, training_bytes
from corda.inputs import Inputs
from corda.reading import parse_recipe


def recipe(raw, **changes):
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()}
    for key, value in changes.items():
        block, _, name = key.partition("__")
        merged.setdefault(block, {})[name] = value
    return parse_recipe(merged)


@pytest.mark.parametrize("fake", [False, True])
def test_live_counts_what_is_alive_at_once(fake):
    def chain():
        layer, x = nn.Linear(300, 500, bias=False), torch.ones(70, 300)
        with torch.no_grad(), Live() as live:
            y = layer(x)  # 140 kB, its weight was there before
            y = torch.relu(y)  # 140 kB more, then the first is gone
            y = y.double()  # 280 kB beside 140
            del y
        return live

    if fake:
        with faked():
            live = chain()
    else:
        live = chain()
    assert live.peak == 70 * 500 * 4 * 3
    assert live.now == 0


def test_stages_do_what_was_predicted(raw_recipe):
    raw_recipe["context"] |= {"pack_to": 64, "samples": 3, "rounds": 2}
    parsed = recipe(raw_recipe)
    found = estimate(parsed)
    with pipeline.opened(parsed) as stages:
        plan, context = stages.plan(), stages.context()
    assert found["trainable_parameters"] == plan.trainable_parameters
    assert found["calibration"]["tokens_per_round"] == max(t for name, t in context.tokens.items() if "#" not in name)
    covariances = sum(
        facts["bytes"]
        for name, facts in artifact.read(parsed.output_dir / "context", "context").manifest["files"].items()
        if name.endswith(".safetensors")
    )
    assert math.isclose(found["disk"]["covariances"], covariances, rel_tol=0.1)  # headers, held-out records
    facts = Facts(Inputs(parsed), "cpu")
    assert {n: [x.name for x in m] for n, m in facts.groups.items()} == {
        n: [x.name for x in m] for n, m in context.members().items()
    }
    assert set(found["memory"]) == {"collect", "plan", "train", "export"}
    for stage in ("collect", "plan", "train"):
        assert found["seconds"][stage]["total"] > 0
        memory = found["memory"][stage]
        parts = {k: v for k, v in memory["device"].items() if k not in {"total", "above_weights"}}
        assert memory["device"]["total"] == sum(parts.values()) + sum(memory["host"].values())


def test_nothing_is_loaded(raw_recipe, pico, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pico / "config.json", bare)
    raw_recipe["model"]["model_name_or_path"] = str(bare)
    raw_recipe["context"] = {"samples": 12, "pack_to": 256}
    found = estimate(recipe(raw_recipe), "h100")
    assert found["calibration"]["tokens_per_round"] == 12 * 256
    assert any("no tokenizer" in line for line in found["assumptions"])
    assert any("assumed, not measured" in line for line in found["assumptions"])
    assert not (tmp_path / "run").exists()


def test_settings_show(raw_recipe):
    def total(stage="collect", where="device", **changes):
        settings = {k: changes.pop(k) for k in ("processes", "shard") if k in changes}
        return estimate(recipe(raw_recipe, **changes), "h100", **settings)["memory"][stage][where]

    plain = total()
    assert total(context__offload=True)["weights"] < plain["weights"]
    assert total(context__stream=False)["covariances"] == 2 * plain["covariances"]
    assert total(where="host", context__rounds=2, context__samples=4)["hidden_states"] > 0
    assert total(processes=4, shard=True)["weights"] < plain["weights"]
    kept, again = (
        estimate(recipe(raw_recipe, context__covariances=c, training__drift_meter=False), "h100")
        for c in ("disk", "recollect")
    )
    assert again["disk"]["covariances"] == 0 < kept["disk"]["covariances"]
    assert again["seconds"]["plan"]["collect_again"] > kept["seconds"]["plan"]["collect_again"] == 0
    assert again["memory"]["plan"]["host"]["covariances"] == kept["disk"]["covariances"] / 2  # one block of two
    assert total("train", model__load_in_4bit=True)["weights"] < total("train")["weights"]
    assert total("train", training__per_device_train_batch_size=8)["work"] > total("train")["work"]
    whole, packed = total("export")["weights"], total("train", model__load_in_4bit=True)["weights"]
    for form, on_gpu, on_host in (
        ("lora", packed, whole / 2),
        ("merged", packed, whole / 2),
        ("residual", 2 * packed, 0),
    ):
        changed = {"model__load_in_4bit": True, "export__format": form}
        assert total("export", **changed)["weights"] == on_gpu
        assert total("export", "host", **changed).get("weights", 0) == on_host
    one, four = (estimate(recipe(raw_recipe), "h100", processes=p) for p in (1, 4))
    assert four["seconds"]["collect"]["forward"] == pytest.approx(one["seconds"]["collect"]["forward"] / 4)
    assert 3.4 < one["seconds"]["plan"]["decompose"] / four["seconds"]["plan"]["decompose"] <= 4.0
    assert one["network"] == {}
    assert four["network"]["collect"] == pytest.approx(1.5 * four["disk"]["covariances"], rel=0.01)


def test_what_a_run_would_refuse_is_not_estimated(raw_recipe):
    recollecting = recipe(raw_recipe, context__covariances="recollect", training__drift_meter=False)
    assert estimate(recollecting, "h100")["seconds"]
    with pytest.raises(RecipeError, match="several processes plan from"):
        estimate(recollecting, "h100", processes=2)
    with pytest.raises(RecipeError, match=r"training\.drift_meter: false"):
        estimate(recipe(raw_recipe, context__covariances="recollect", training__drift_meter=True), "h100")


def test_modes(raw_recipe):
    lora = estimate(recipe(raw_recipe, adapter__mode="lora", training__drift_meter=False), "h100")
    assert lora["calibration"] is None
    assert "collect" not in lora["memory"]
    assert lora["disk"]["covariances"] == 0
    contrast = estimate(recipe(raw_recipe, adapter__mode="contrast"), "h100")
    kpm = estimate(recipe(raw_recipe), "h100")
    assert contrast["trainable_parameters"] < kpm["trainable_parameters"]
    assert contrast["disk"]["covariances"] > 1.5 * kpm["disk"]["covariances"] / 2


def test_an_unknown_profile_is_refused(raw_recipe):
    with pytest.raises(RecipeError, match=r"no such device profile.*a100.*h100"):
        estimate(recipe(raw_recipe), "a100")


def test_working_memory_of_a_pass_does_not_grow_with_depth(raw_recipe):
    facts = Facts(Inputs(recipe(raw_recipe)), "cpu")
    step = forward_bytes(facts.build, facts.layers, 4, 100)
    assert 0 <= step.per_block <= 4 * 100 * 48 * 4  # a residual stream at most
    train = training_bytes(facts.build, facts.layers, facts.ranks, 4, 100)
    assert train.per_block > 5 * 4 * 100 * 48 * 4
    assert train.flops > 0
    kept = training_bytes(facts.build, facts.layers, facts.ranks, 4, 100, checkpointing=True)
    assert kept.per_block < train.per_block / 3


def test_layers_that_share_an_input_are_found_without_values(raw_recipe):
    facts = Facts(Inputs(recipe(raw_recipe)), "cpu")
    groups = shared_inputs(facts.build, facts.layers)
    assert groups["model.layers.1.self_attn.v_proj"] == "model.layers.1.self_attn.q_proj"
    assert groups["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"
    assert len(set(groups.values())) == 8


def test_a_rehearsed_decomposition_scales():
    small, large = (
        rehearse_decomposition(2 * n, n, n // 8, "smallest", 1.0, torch.float32, side_by_side=False).bytes
        for n in (96, 192)
    )
    assert 3 < large / small < 5


def testmakespan():
    assert makespan([5, 3, 3, 3, 2, 2], 2) == 10
    assert makespan([5, 3, 3, 3, 2, 2], 6) == 5
    assert makespan([5, 3, 3, 3, 2, 2], 1) == 18


def test_this_machine_can_be_measured(tmp_path):
    device = measure([(48, 80), (80, 48)], 80, tmp_path / "not yet")
    assert device.measured
    assert min(device.forward, device.products, device.disk, device.memory) > 0
    assert not H100.measured


def test_llama_2_7b_streamed_needs_little_above_its_weights(tmp_path):
    folder = tmp_path / "llama-2-7b"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    raw = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": str(folder)},
        "data": {"keep": "keep.jsonl", "learn": "learn.jsonl", "max_length": 2048},
        "context": {"samples": 256, "pack_to": 2048, "batch_size": 1},
        "adapter": {"mode": "kpm", "rank": 128},
    }
    found = estimate(parse_recipe(raw), "h100")
    assert found["calibration"]["tokens_per_round"] == 256 * 2048
    assert found["model_parameters"] == 6_738_415_616
    assert 0.5e9 < found["memory_above_weights"]["initialisation"] <= 1.5e9
    assert found["memory"]["collect"]["host"]["hidden_states"] == 256 * 2048 * 4096 * 2


def test_the_verb(raw_recipe, write_recipe, capsys, monkeypatch):
    from corda import cli

    path = write_recipe(raw_recipe)
    for arguments in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["corda", "estimate", str(path), "--device-profile", "h100", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 0
        out = capsys.readouterr().out
        if arguments:
            assert json.loads(out)["layers"] == 14
        else:
            assert "Trainable parameters" in out
            assert "enough for the widest input" in " ".join(out.split())


def test_experts_count_with_those_that_a_token_is_sent_to(raw_recipe, tmp_path):
    folder = tmp_path / "experts"
    folder.mkdir()
    config = {
        "model_type": "mixtral",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    raw_recipe["model"]["model_name_or_path"] = str(folder)
    facts = Facts(Inputs(recipe(raw_recipe)), "cuda")
    experts = 2 * 8 * 3 * 32 * 48
    assert facts.active == facts.parameters - 2 * 64 * 32 - 0.75 * experts
    assert facts.groups["model.layers.1.self_attn.q_proj"][1].name == "model.layers.1.self_attn.k_proj"
    found = estimate(recipe(raw_recipe), "h100")
    assert found["seconds"]["train"]["total"] > 0
