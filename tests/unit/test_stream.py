"""Block by block equals the whole model, for the layouts that users bring."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoConfig,
    AutoModelForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from corda.context.blocks import find_blocks
from corda.context.collect import collect_encoded
from corda.data.batches import encode, pack
from corda.data.formats import to_records
from corda.errors import CalibrationError
from corda.journal import Journal, LazyTensors
from corda.targets import find_targets

COMMON = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "mistral": SIZES | {"sliding_window": 16},
    "gemma": SIZES,
    "gemma2": SIZES | {"sliding_window": 8},
    "gemma3_text": SIZES | {"sliding_window": 8},
    "phi": SIZES,
    "phi3": SIZES,
    "gpt_neox": {k: v for k, v in SIZES.items() if k not in {"num_key_value_heads", "head_dim"}},
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 256, "n_inner": 80},
}


def build(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(COMMON | FAMILIES[family]))
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture
def encoded(tokenizer, texts):
    return [encode(record, tokenizer) for record in to_records([{"text": text} for text in texts])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True])
def test_streamed_is_whole(family, packed, encoded):
    model = build(family)
    layers = find_targets(model)
    rows = pack(encoded, 100) if packed else encoded
    streamed, whole = (
        collect_encoded(model, rows, layers, pad_token_id=0, batch_size=7, stream=stream) for stream in (True, False)
    )
    assert not any("collected whole" in w for w in streamed.warnings)
    assert streamed.groups == whole.groups
    assert streamed.tokens == whole.tokens
    for layer in layers:
        assert torch.equal(streamed.covariance(layer.name), whole.covariance(layer.name)), layer.name
    if packed:
        alone = collect_encoded(model, encoded, layers, pad_token_id=0, batch_size=1, stream=False)
        for layer in layers:
            a, b = streamed.covariance(layer.name), alone.covariance(layer.name)
            assert float((a - b).norm() / b.norm()) < 1e-5, layer.name


def _filled(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _keys_and_values_shared():
    some = {"sliding_window": 8, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    size = SIZES | {"num_hidden_layers": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259}
    more = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
    config = AutoConfig.for_model("gemma3n_text", **(COMMON | size | some | more))
    return AutoModelForCausalLM.from_config(config), ["q_proj", "o_proj", "down_proj"]


def _convolved_between_blocks():
    config = DebertaV2Config(
        vocab_size=259,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        conv_kernel_size=3,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=256,
    )
    return DebertaV2ForSequenceClassification(config), ["value_proj", "intermediate.dense"]


def _one_block_again_and_again():
    config = AlbertConfig(
        vocab_size=259,
        embedding_size=16,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=256,
    )
    return AlbertForSequenceClassification(config), ["query", "ffn"]


@pytest.mark.parametrize("make", [_keys_and_values_shared, _convolved_between_blocks, _one_block_again_and_again])
def test_what_happens_between_blocks_is_seen_and_the_model_runs_whole(make, encoded):
    model, names = make()
    model = _filled(model)
    layers = find_targets(model, names)
    one, two = (collect_encoded(model, encoded, layers, pad_token_id=0, batch_size=7, stream=s) for s in (True, False))
    assert "what a block returns is not what the next one takes" in one.warnings[0]
    for layer in layers:
        assert torch.allclose(one.covariance(layer.name), two.covariance(layer.name), rtol=1e-5)


def test_a_model_in_training_mode_is_tried_without_its_dropout(encoded):
    config = AutoConfig.for_model("gpt2", **(COMMON | FAMILIES["gpt2"] | {"resid_pdrop": 0.5}))
    model = _filled(AutoModelForCausalLM.from_config(config)).train()
    state = torch.get_rng_state()
    context = collect_encoded(model, encoded, find_targets(model), pad_token_id=0)
    assert not any("whole" in warning for warning in context.warnings)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_that_carries_a_state_does_not_keep_packed_records_apart(encoded):
    config = AutoConfig.for_model("lfm2", **(COMMON | SIZES | {"layer_types": ["conv", "full_attention", "conv"]}))
    model = _filled(AutoModelForCausalLM.from_config(config))
    layers = find_targets(model)
    with pytest.raises(CalibrationError, match=r"carries a state along it.*pack_to.*conv"):
        collect_encoded(model, pack(encoded, 100), layers, pad_token_id=0)
    one, two = (collect_encoded(model, encoded, layers, pad_token_id=0, batch_size=n) for n in (1, 7))
    assert not one.warnings or "whole" not in one.warnings[0]
    for layer in layers:
        assert torch.allclose(one.covariance(layer.name), two.covariance(layer.name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_packing_with_eager_attention(family, encoded):
    model = build(family)
    model.set_attn_implementation("eager")
    layers = find_targets(model)
    packed, alone = (
        collect_encoded(model, rows, layers, pad_token_id=0, batch_size=size)
        for rows, size in ((pack(encoded, 100), 3), (encoded, 1))
    )
    for layer in layers:
        a, b = packed.covariance(layer.name), alone.covariance(layer.name)
        assert float((a - b).norm() / b.norm()) < 1e-5, layer.name


def test_a_forward_that_others_put_on_a_block_is_put_back(model, encoded):
    block = model.model.layers[0]
    mine = type(block).forward.__get__(block)
    vars(block)["forward"] = mine
    collect_encoded(model, encoded[:3], find_targets(model), pad_token_id=0)
    assert vars(block)["forward"] is mine


def test_the_model_is_left_as_it_was(model, encoded):
    model.train()
    before = [(type(m), set(vars(m)), m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    collect_encoded(model, encoded, find_targets(model), pad_token_id=0)
    assert [(type(m), set(vars(m)), m.training, len(m._forward_pre_hooks)) for m in model.modules()] == before


def test_targets_outside_the_blocks_are_collected_whole_with_a_message(model, encoded):
    layers = find_targets(model, ["lm_head", "o_proj"])
    assert find_blocks(model.base_model, model, layers) is None
    context = collect_encoded(model, encoded, layers, pad_token_id=0)
    assert any("collected whole" in warning for warning in context.warnings)


def test_finished_blocks_are_not_collected_again(model, encoded, tmp_path):
    layers = find_targets(model)
    straight = collect_encoded(model, encoded, layers, pad_token_id=0)
    book = Journal(tmp_path / "j", "k")
    collect_encoded(model, encoded, layers, pad_token_id=0, journal=book)
    book.path("block-0001").unlink()
    calls = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: calls.append(len(out)))
    again = collect_encoded(model, encoded, layers, pad_token_id=0, journal=book)
    handle.remove()
    assert max(calls) > 1  # block 0 ran for its hidden states
    assert isinstance(again.packed, LazyTensors)
    for layer in layers:
        assert torch.equal(again.covariance(layer.name), straight.covariance(layer.name))
    calls.clear()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: calls.append(len(out)))
    collect_encoded(model, encoded, layers, pad_token_id=0, journal=book)
    handle.remove()
    assert calls == [1, 1]  # everything was in the journal; a few tokens of one record tell how the blocks are joined


def test_offloaded_is_whole_with_one_block_in_memory_at_a_time(pico, model, encoded):
    from corda.models import Source
    from corda.offload import LazyWeights, empty_model
    from corda.options import ModelOptions
    from corda.plan.make import make_plan

    source = Source(str(pico), None)
    shell = empty_model(source, ModelOptions(model_name_or_path=str(pico)), torch.float32)
    weights = LazyWeights(source, shell, torch.float32)
    present: list[set[str]] = []
    original = type(shell.model.layers[0].mlp).forward

    def spy(self, x):
        present.append(
            {n.split(".")[2] for n, p in shell.named_parameters() if p.device.type != "meta" and "layers" in n}
        )
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(shell.model.layers[0].mlp), "forward", spy)
        lazy = collect_encoded(
            shell, encoded, find_targets(shell), pad_token_id=0, weights=weights, device=torch.device("cpu")
        )
    assert {frozenset(p) for p in present} == {frozenset("0"), frozenset("1")}
    assert all(p.device.type == "meta" for p in shell.parameters())
    whole = collect_encoded(model, encoded, find_targets(model), pad_token_id=0, stream=False)
    for layer in whole.layers:
        assert torch.equal(lazy.covariance(layer.name), whole.covariance(layer.name))
    one = make_plan(model, whole, rank=4)
    two = make_plan(shell, lazy, rank=4, weights=weights.get, device=torch.device("cpu"))
    for layer in whole.layers:
        assert torch.equal(one.factors[layer.name][0], two.factors[layer.name][0])


def test_buffers_of_an_offloaded_block_are_those_of_the_checkpoint(pico, model, tmp_path):
    """A new model has what its constructor puts there."""
    from corda.models import Source
    from corda.offload import LazyWeights, empty_model
    from corda.options import ModelOptions

    bias = 3 * torch.randn(8)
    model.model.layers[1].register_buffer("routing", bias.clone())
    model.model.layers[1].register_buffer("made_anew", torch.ones(3))  # as older checkpoints hold such
    model.save_pretrained(tmp_path)
    source = Source(str(tmp_path), None)
    shell = empty_model(source, ModelOptions(model_name_or_path=str(tmp_path)), torch.float32)
    shell.model.layers[1].register_buffer("routing", torch.zeros(8))
    shell.model.layers[1].register_buffer("made_anew", torch.zeros(5), persistent=False)
    weights = LazyWeights(source, shell, torch.float32)
    ids = torch.randint(3, 259, (2, 9))
    with torch.no_grad(), weights.on(shell, "", torch.device("cpu")):
        assert torch.equal(shell.model.layers[1].routing, bias)
        assert torch.equal(shell(ids).logits, model(ids).logits)
    assert torch.equal(shell.model.layers[1].routing, bias)
    assert torch.equal(shell.model.layers[1].made_anew, torch.zeros(5))


def test_a_run_with_offloading_has_the_same_plan(raw_recipe, tmp_path):
    from corda import artifact, pipeline
    from corda.reading import parse_recipe

    for name, offload in (("plain", False), ("lazy", True)):
        raw = raw_recipe | {"output_dir": str(tmp_path / name)}
        raw["context"] = raw["context"] | {"offload": offload}
        with pipeline.opened(parse_recipe(raw)) as stages:
            stages.plan()
    files = [artifact.read(tmp_path / n / "plan", "plan").manifest["files"] for n in ("plain", "lazy")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("context", "adapter", "message"),
    [
        ({}, {"target_modules": ["q_proj", "lm_head"]}, r"one list of blocks.*leave the layers outside"),
        ({"stream": False}, {}, r"context\.stream is false.*set context\.stream: true"),
    ],
)
def test_what_cannot_be_collected_in_blocks_cannot_be_offloaded(raw_recipe, context, adapter, message):
    from corda import pipeline
    from corda.errors import ModelError
    from corda.reading import parse_recipe

    raw_recipe["context"] |= {"offload": True, **context}
    raw_recipe["adapter"] |= adapter
    with pipeline.opened(parse_recipe(raw_recipe)) as stages, pytest.raises(ModelError, match=message):
        stages.context()


@pytest.mark.parametrize("stream", [True, False])
def test_a_disk_too_small_for_all_rounds_is_refused_early(tmp_path, encoded, monkeypatch, stream):
    from collections import namedtuple

    from corda import artifact
    from corda.errors import ResourceError

    model = build("llama")
    layers = find_targets(model)
    parts = [encoded[r::3] for r in range(3)]
    whole = collect_encoded(model, parts, layers, pad_token_id=0)
    size = sum(4 * packed.numel() for packed in whole.packed.values())
    monkeypatch.setattr(artifact, "_SPARE", 0)

    def attempt(free, name):
        monkeypatch.setattr(artifact.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(free))
        journal = Journal(tmp_path / name, "k")
        return collect_encoded(model, parts, layers, pad_token_id=0, stream=stream, journal=journal)

    with pytest.raises(ResourceError, match=r"not enough disk space.*lower context\.rounds"):
        attempt(size, "tight")
    assert not list((tmp_path / "tight").glob("*.safetensors"))
    assert attempt(1.06 * size, "enough").rounds == 3


@pytest.mark.parametrize("stream", [True, False])
def test_lanes_change_sums_by_rounding_alone(model, encoded, monkeypatch, stream):
    from corda.context import lanes

    layers = find_targets(model)
    before = torch.get_num_threads()
    found = {}
    for count in (1, 2, 3):
        monkeypatch.setattr(lanes, "_MOST", count)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        assert lanes.lanes_for(layers, torch.device("cpu")) == count
        found[count], again = (
            collect_encoded(model, encoded, layers, pad_token_id=0, batch_size=4, stream=stream) for _ in range(2)
        )
        assert all(torch.equal(again.packed[k], packed) for k, packed in found[count].packed.items())
    monkeypatch.undo()
    torch.set_num_threads(before)
    assert found[1].tokens == found[2].tokens == found[3].tokens
    assert found[1].groups == found[2].groups == found[3].groups
    for layer in layers:
        one = found[1].covariance(layer.name)
        for count in (2, 3):
            other = found[count].covariance(layer.name)
            assert float((one - other).norm() / one.norm()) < 1e-6
    assert not all(torch.equal(found[1].packed[k], found[2].packed[k]) for k in found[1].packed)


def test_lanes_are_for_narrow_layers_on_a_cpu(model):
    from dataclasses import replace

    from corda.context.lanes import WIDTH_LIMIT, lanes_for

    layers = find_targets(model)
    assert lanes_for(layers, torch.device("cpu")) == min(4, torch.get_num_threads())
    assert lanes_for(layers, torch.device("meta")) == 1
    assert lanes_for([replace(layers[0], d_in=WIDTH_LIMIT + 1)], torch.device("cpu")) == 1


def test_lanes_report_what_goes_wrong_in_any_of_them(model, encoded, monkeypatch):
    from corda.errors import CalibrationError

    monkeypatch.setattr("corda.context.collect.lanes_for", lambda *_: 2)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    for stream in (True, False):
        with pytest.raises(CalibrationError, match=r"not finite"):
            collect_encoded(model, encoded, find_targets(model), pad_token_id=0, batch_size=4, stream=stream)
