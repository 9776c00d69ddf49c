"""Covariances against sums over each token, and the model left as it was."""

from __future__ import annotations

import pytest
import torch

from corda.context import collect as collecting
from corda.context import store
from corda.context.accumulator import Accumulator, pack_upper, unpack_upper
from corda.context.collect import collect, collect_encoded
from corda.context.feeding import model_inputs
from corda.data.batches import Encoded, batches, encode, pack
from corda.data.formats import to_records
from corda.errors import CalibrationError, DataError, TargetError
from corda.metric import full_precision
from corda.targets import find_targets


def encoded_texts(texts, tokenizer):
    return [encode(record, tokenizer) for record in to_records([{"text": text} for text in texts])]


def naive(model, encoded, names):
    """One record at a time, no batching, fp64 sums over full products."""
    sums = {name: 0.0 for name in names}
    handles = []
    for name in names:

        def hook(module, args, name=name):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums[name] + x.T @ x

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    tokens = 0
    with torch.no_grad():
        for one in encoded:
            model(input_ids=torch.tensor([one.ids]))
            tokens += len(one)
    for handle in handles:
        handle.remove()
    return {name: value / tokens for name, value in sums.items()}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_padding_leave_c_unchanged(model, tokenizer, texts, batch_size, side):
    encoded = encoded_texts(texts, tokenizer)
    layers = find_targets(model)
    truth = naive(model, encoded, [layer.name for layer in layers])
    parts = batches(encoded, tokenizer.pad_token_id, batch_size, padding_side=side)
    context = collecting.collect_batches(model, parts, layers)
    for layer in layers:
        assert relative(context.covariance(layer.name), truth[layer.name]) < 1e-6
    assert set(context.tokens.values()) == {sum(map(len, encoded))}


def test_packing_keeps_records_apart(model, tokenizer, texts):
    encoded = encoded_texts(texts, tokenizer)
    layers = find_targets(model)
    truth = naive(model, encoded, [layer.name for layer in layers])
    windows = pack(encoded, 128)
    assert max(map(len, windows)) > 2 * min(map(len, encoded))
    context = collect_encoded(model, windows, layers, pad_token_id=0, batch_size=3)
    for layer in layers:
        assert relative(context.covariance(layer.name), truth[layer.name]) < 1e-6


def test_response_tokens_only(model, tokenizer, data):
    from corda.data.batches import load_records
    from corda.tasks import DataSource

    encoded = [encode(r, tokenizer) for r in load_records(DataSource(dataset="learn.jsonl"), data, 0)]
    layers = find_targets(model, ["down_proj"])
    context = collect_encoded(model, encoded, layers, pad_token_id=0, response_only=True)
    assert set(context.tokens.values()) == {sum(map(sum, (one.response for one in encoded)))}
    every = collect_encoded(model, encoded, layers, pad_token_id=0)
    name = layers[0].name
    assert relative(context.covariance(name), every.covariance(name)) > 1e-3


def test_layers_with_one_input_share_one_accumulator(model, tokenizer, texts):
    context = collect(model, tokenizer, texts)
    groups = context.members()
    assert len(groups) == 8  # two blocks: q/k/v, o, gate/up, down
    first = groups["model.layers.0.self_attn.q_proj"]
    assert [layer.name.rpartition(".")[2] for layer in first] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("mode", [True, False])
def test_hooks_and_modes_are_restored_after_an_exception(model, tokenizer, texts, mode):
    model.train(mode)
    model.model.layers[0].mlp.eval()
    modes = [m.training for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]

    def broken():
        yield from batches(encoded_texts(texts[:4], tokenizer), 0, 2)
        raise RuntimeError("the data source broke")

    with pytest.raises(RuntimeError, match="broke"):
        collecting.collect_batches(model, broken(), find_targets(model))
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.is_grad_enabled()


def test_no_logits_are_computed_unless_the_head_is_a_target(model, tokenizer, texts):
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    collect(model, tokenizer, texts[:4])
    assert not calls
    context = collect(model, tokenizer, texts[:4], target_modules=["lm_head", "o_proj"])
    assert calls
    assert context.covariance("lm_head").shape == (48, 48)


def test_nan_names_the_layer(model, tokenizer, texts):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    with pytest.raises(CalibrationError, match=r"not finite.*layers\.1\.self_attn\.q_proj"):
        collect(model, tokenizer, texts[:4])


def test_too_few_tokens_is_a_warning_with_the_number_that_would_do(model, tokenizer, texts):
    few = collect(model, tokenizer, texts, tokens=40)
    assert any("40 for" in w and "640 would do" in w for w in few.warnings)
    assert not collect(model, tokenizer, texts).warnings


def test_token_budget_is_exact(model, tokenizer, texts):
    context = collect(model, tokenizer, texts, tokens=333)
    assert set(context.tokens.values()) == {333}


def test_context_survives_the_disk(model, tokenizer, texts, tmp_path):
    context = collect(model, tokenizer, texts)
    loaded = store.save(context, tmp_path / "context", "abc", {})
    assert loaded.tokens == dict(context.tokens)
    for layer in context.layers:
        assert torch.equal(loaded.covariance(layer.name), context.covariance(layer.name))


@pytest.mark.parametrize("width", [1, 5, 130, 1100])
def test_accumulator_against_the_full_product(width):
    torch.manual_seed(0)
    x = 40 * torch.randn(57, width)
    accumulator = Accumulator(width)
    accumulator.add(x[:20])
    accumulator.add(x[20:])
    full = unpack_upper(pack_upper(accumulator.total), width)
    truth = x.double().T @ x.double()
    assert accumulator.tokens == 57
    assert relative(full, truth) < 1e-6
    assert torch.equal(full, full.T)


def test_fp32_error_stays_within_its_bound():
    torch.manual_seed(1)
    batches_, per, width = 64, 128, 40
    x = 5 + torch.randn(batches_ * per, width)
    accumulator = Accumulator(width)
    for part in x.split(per):
        accumulator.add(part)
    truth = x.double().T @ x.double()
    full = unpack_upper(pack_upper(accumulator.total), width).double()
    scale = truth.diagonal().sqrt()[:, None] * truth.diagonal().sqrt()
    assert ((full - truth).abs() / scale).max() < (per + batches_) * 2**-24


def test_nothing_matched_lists_what_there_is(model):
    with pytest.raises(TargetError, match=r"q_prj.*down_proj, gate_proj.*did you mean q_proj"):
        find_targets(model, ["q_prj"])
    with pytest.raises(TargetError, match="matches no layer"):
        find_targets(model, r".*\.fc1")


def test_target_forms(model):
    assert len(find_targets(model)) == 14
    assert "lm_head" not in {layer.name for layer in find_targets(model)}
    assert len(find_targets(model, ["q_proj", "down_proj"])) == 4
    block = find_targets(model, r"model\.layers\.1\..*_proj")
    assert {layer.name.split(".")[2] for layer in block} == {"1"}
    assert len(block) == 7
    assert [layer.name for layer in find_targets(model, ["layers.0.mlp.up_proj"])] == ["model.layers.0.mlp.up_proj"]


def test_model_inputs_of_an_unpacked_batch_have_a_plain_mask():
    batch = next(iter(batches([Encoded((5, 6, 7), (True,) * 3), Encoded((8,), (True,))], 0, 2)))
    assert model_inputs(batch)["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_no_records_is_an_error(model, tokenizer):
    with pytest.raises(DataError, match="no records"):
        collect(model, tokenizer, [])


def test_tf32_is_off_inside_and_back_after(model, tokenizer, texts):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        seen = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
        collect(model, tokenizer, texts[:3])
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_tf32_under_the_newer_names_is_off_inside_and_back_after():
    """As `training.tf32` sets it on a GPU that has it; torch then refuses to answer under the older name."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    untouched = matmul.fp32_precision
    with full_precision():
        assert matmul.fp32_precision == untouched  # nothing to turn off
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with full_precision():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = untouched
