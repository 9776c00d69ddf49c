"""`corda.compat.preprocess_corda` in the place of PEFT's: PEFT's own cases, exactness, and what breaks there."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn
from transformers import AutoModelForCausalLM

from corda.adapter import relative_difference
from corda.artifact import read
from corda.compat import preprocess_corda
from corda.context import store
from corda.errors import (
    AdapterError,
    ArtifactError,
    CalibrationError,
    ModelError,
    PlanError,
    RecipeError,
    ResourceError,
    TargetError,
)
from corda.metric import damping

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

METHODS = pytest.mark.parametrize("method", ["ipm", "kpm"])


class Small(nn.Module):
    """One wide layer, as PEFT's own tests have one square layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(60, 44)
        nn.init.normal_(self.linear.weight, std=3)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def x():
    torch.manual_seed(233)
    return 7 * torch.rand(400, 60) @ torch.diag(torch.logspace(0, -2, 60))


@pytest.fixture
def ids():
    torch.manual_seed(5)
    return torch.randint(3, 250, (6, 50))


def config(method="kpm", corda=(), **settings):
    settings = {"target_modules": ["linear"], "r": 8} | settings
    corda_config = CordaConfig(corda_method=method, **dict(corda))
    return LoraConfig(init_lora_weights="corda", corda_config=corda_config, **settings)


def llama_config(method="kpm", corda=(), **settings):
    return config(method, corda, **({"target_modules": "all-linear", "r": 4, "lora_alpha": 3} | settings))


def prepared(model, lora_config, *batches, **kwargs):
    """PEFT's two calls."""
    preprocess_corda(model, lora_config, run_model=lambda: [model(batch) for batch in batches], **kwargs)
    return get_peft_model(model, lora_config)


def doubled(wrapped):
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p *= 2
    return wrapped


def logits(model, ids):
    with torch.no_grad():
        out = model(input_ids=ids)
    return out.logits


def attributes(model):
    return [set(vars(module)) for module in model.modules()]


def product(layer):
    return layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight


# What PEFT's tests of CorDA ask of its own function.


def test_the_signature_is_pefts():
    assert list(inspect.signature(preprocess_corda).parameters) == ["model", "lora_config", "run_model", "hooked_model"]


@METHODS
def test_nothing_is_left_on_the_modules(x, method):
    model = Small()
    before = attributes(model)
    preprocess_corda(model, config(method), run_model=lambda: model(x), hooked_model=model)
    assert set(vars(model.linear)) - before[1] == {"eigens"}
    wrapped = get_peft_model(model, config(method))
    assert set(vars(wrapped.base_model.model.linear.base_layer)) == before[1]


@METHODS
def test_every_forward_pass_counts(x, tmp_path, method):
    model = Small()
    corda = {"covariance_file": tmp_path / "c"}
    preprocess_corda(model, config(method, corda), run_model=lambda: [model(x), model(x[:100])], hooked_model=model)
    context = store.load(read(tmp_path / "c", "context"))
    assert context.tokens == {"linear": 500}
    expected = (x.T @ x + x[:100].T @ x[:100]) / 500
    assert torch.allclose(context.covariance("linear"), expected, rtol=1e-5, atol=1e-6)


@METHODS
def test_the_users_hooks_stay_and_cordas_go(x, method):
    model = Small()
    calls = []
    model.linear.register_forward_hook(lambda *_: calls.append(1))
    preprocess_corda(model, config(method), run_model=lambda: model(x))
    assert len(calls) == 1
    model(x)
    assert len(calls) == 2
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


@METHODS
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"linear": 5, "embed": 16, "conv2d": 32}}])
@pytest.mark.parametrize("copied", [False, True])
def test_step_0_and_both_files_reused(x, tmp_path, method, settings, copied):
    original = Small()
    model = deepcopy(original)
    hooked = deepcopy(original) if copied else model
    base = original(x)
    # Names ending in .pt, as PEFT's users have them, in folders that are not there yet.
    kept = {"cache_file": tmp_path / "a" / "cache.pt", "covariance_file": str(tmp_path / "b" / "c" / "covariance.pt")}
    lora = config(method, kept, **settings)
    preprocess_corda(model, lora, run_model=lambda: hooked(x), hooked_model=hooked if copied else None)
    wrapped = get_peft_model(model, lora)
    assert wrapped.base_model.model.linear.r["default"] == settings.get("rank_pattern", {"linear": 8})["linear"]
    assert relative_difference(wrapped(x), base) <= 1e-5
    after = doubled(wrapped)(x)
    assert relative_difference(after, base) > 1e-4
    for option, place in kept.items():
        lora = config(method, {option: place}, **settings)
        again = deepcopy(original)
        preprocess_corda(again, lora)
        assert torch.equal(doubled(get_peft_model(again, lora))(x), after)


@METHODS
@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, 1.0),
        ({"rank_pattern": {"linear": 12}, "lora_alpha": 6}, 0.5),
        ({"alpha_pattern": {"linear": 5}}, 5 / 8),
        ({"use_rslora": True}, 8 / 8**0.5),
    ],
)
def test_conversion_with_the_initial_adapter_loads_on_the_base(x, tmp_path, method, settings, scaling):
    original = Small()
    wrapped = prepared(deepcopy(original), config(method, **settings), x)
    rank = settings.get("rank_pattern", {"linear": 8})["linear"]
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "corda"
    trained = doubled(wrapped)(x)
    assert relative_difference(trained, original(x)) > 1e-4
    initial = tmp_path / "initial"
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    converted = PeftModel.from_pretrained(deepcopy(original), tmp_path / "converted")
    assert relative_difference(converted(x), trained) < 1e-5
    layer = converted.base_model.model.linear
    assert layer.lora_A["default"].weight.shape[0] == 2 * rank
    assert layer.scaling["default"] == pytest.approx(scaling)
    assert torch.equal(layer.base_layer.weight, original.linear.weight)


@METHODS
@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_rslora_with_patterns_is_exact_but_peft_cannot_convert_it(x, tmp_path, method, pattern):
    original = Small()
    wrapped = prepared(deepcopy(original), config(method, use_rslora=True, **{pattern: {"linear": 2}}), x)
    assert relative_difference(wrapped(x), original(x)) <= 1e-5
    wrapped.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="Passing `path_initial_model_for_weight_conversion` to `save_pretrained`"):
        wrapped.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "initial")


# Exactness.


@METHODS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 9, "use_rslora": True},
        {"rank_pattern": {r"layers\.1\..*up_proj": 7, "q_proj": 3}, "alpha_pattern": {"q_proj": 2}},
    ],
)
def test_adapter_and_base_are_the_papers_formula(model, ids, tmp_path, method, settings):
    lora = llama_config(method, {"covariance_file": tmp_path / "c"}, **settings)
    original = deepcopy(model)
    reference = logits(model, ids)
    wrapped = prepared(model, lora, ids)
    for training in (False, True):
        assert relative_difference(logits(wrapped.train(training), ids), reference) <= 1e-5
    context = store.load(read(tmp_path / "c", "context"))
    assert len(context.layers) == 14
    ranks = set()
    for spec in context.layers:
        layer = wrapped.base_model.model.get_submodule(spec.name)
        W = original.get_submodule(spec.name).weight.double()
        C = context.covariance(spec.name).double()
        C = C + damping(C, 0.01) * torch.eye(spec.d_in, dtype=torch.float64)
        U = torch.linalg.svd(W @ C, full_matrices=False)[0]
        r = layer.r["default"]
        ranks.add(r)
        U = U[:, :r] if method == "ipm" else U[:, -r:]
        BA = U @ U.T @ W
        assert (product(layer).double() - BA).norm() / BA.norm() < 1e-5
        assert (layer.base_layer.weight.double() - (W - BA)).norm() / W.norm() < 1e-6
        lengths = [layer.lora_A["default"].weight.norm(dim=1), layer.lora_B["default"].weight.norm(dim=0)]
        assert torch.allclose(*lengths, rtol=1e-4)
    assert ranks == ({3, 4, 7} if "rank_pattern" in settings else {4})


@METHODS
def test_eigens_are_what_peft_documents(x, method):
    model = Small()
    preprocess_corda(model, config(method), run_model=lambda: model(x))
    found = model.linear.eigens
    assert found.U_WC.shape == (44, 8)
    assert found.V_WC.shape == (60, 8)
    assert found.S_WC.shape == (8,)
    assert {t.dtype for t in vars(found).values()} == {torch.float32}
    assert torch.allclose(found.U_WC.T @ found.U_WC, torch.eye(8), atol=1e-5)
    C = x.T @ x / 400
    C = C + damping(C, 0.01) * torch.eye(60)
    sigma = (found.U_WC.T @ model.linear.weight @ C).norm(dim=1)
    assert torch.equal(sigma, sigma.sort(descending=True).values)  # PEFT's order


@METHODS
@pytest.mark.parametrize("settings", [{}, {"lora_alpha": 20, "use_rslora": True}])
def test_the_effect_is_pefts_where_peft_is_right(x, method, settings):
    """One forward pass, many tokens, a well-conditioned covariance: B A and W - B A are PEFT's own."""
    pytest.importorskip("attr")  # PEFT's function needs it and does not declare it
    from peft.tuners.lora.corda import preprocess_corda as theirs

    found = []
    for prepare in (theirs, preprocess_corda):
        model = Small()
        prepare(model, config(method, **settings), run_model=lambda model=model: model(x))
        layer = get_peft_model(model, config(method, **settings)).base_model.model.linear
        found.append((product(layer), layer.base_layer.weight))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() / b.norm() < 2e-3


def test_conv1d(ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=128, n_inner=80, pad_token_id=0)
    ).eval()
    reference = logits(gpt, ids)
    lora = config("ipm", target_modules=["c_fc", "c_proj", "c_attn"], r=5, fan_in_fan_out=True)
    wrapped = prepared(gpt, lora, ids)
    assert relative_difference(logits(wrapped, ids), reference) <= 1e-5
    assert any("c_fc.lora_A" in name for name, _ in wrapped.named_parameters())


def test_a_dead_direction_starts_with_zero_b_and_can_learn(x):
    model = Small()
    with torch.no_grad():
        model.linear.weight[3] = 0
    original = deepcopy(model)
    wrapped = prepared(model, config("kpm"), x)
    layer = wrapped.base_model.model.linear
    dead = layer.lora_B["default"].weight.norm(dim=0) == 0
    assert int(dead.sum()) == 1
    assert torch.allclose(layer.lora_A["default"].weight[dead].norm(), torch.ones(()), atol=1e-5)
    assert relative_difference(wrapped(x), original(x)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_within_its_roundings_and_says_so(model, ids, dtype):
    half = model.to(dtype)
    W = half.model.layers[0].mlp.up_proj.weight.float().clone()
    lora = llama_config("kpm")
    with pytest.warns(UserWarning, match="rounded to 16 bits"):
        preprocess_corda(half, lora, run_model=lambda: half(ids))
    layer = get_peft_model(half, lora).base_model.model.model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == dtype
    off = layer.base_layer.weight.float() + product(layer).float() - W
    assert off.norm() / W.norm() < torch.finfo(dtype).eps


# What breaks in PEFT's function, by its number in docs/defects.md.


def test_defect_01_no_undeclared_import(x, monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", None)
    monkeypatch.delitem(sys.modules, "peft.tuners.lora.corda", raising=False)
    model = Small()
    assert relative_difference(prepared(model, config(), x)(x), Small()(x)) <= 1e-5
    assert "peft.tuners.lora.corda" not in sys.modules


def test_defect_02_and_19_batches_do_not_matter(model, ids):
    found = []
    for size in (1, 2, 6):
        preprocess_corda(model, llama_config(), run_model=lambda size=size: [model(part) for part in ids.split(size)])
        found.append({n: m.eigens for n, m in model.named_modules() if hasattr(m, "eigens")})
    for other in found[1:]:
        for name, one in found[0].items():
            P, Q = (e.U_WC @ e.U_WC.T for e in (one, other[name]))
            assert (P - Q).norm() / P.norm() < 1e-3


@pytest.mark.parametrize(("target_modules", "adapted"), [(None, 4), ("all-linear", 14), (r".*\.mlp\..*_proj", 6)])
def test_defect_03_and_04_targets_as_get_peft_model_finds_them(model, ids, target_modules, adapted):
    reference = logits(model, ids)
    lora = llama_config(target_modules=target_modules)
    before = deepcopy(lora)
    preprocess_corda(model, lora, run_model=lambda: model(ids))
    assert lora == before
    assert sum(hasattr(m, "eigens") for m in model.modules()) == adapted
    wrapped = get_peft_model(model, lora)
    assert sum(hasattr(m, "lora_A") for m in wrapped.modules()) == adapted
    assert not any(hasattr(m, "eigens") for m in wrapped.modules())
    assert relative_difference(logits(wrapped, ids), reference) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [({"exclude_modules": ["o_proj"]}, 12), ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1)],
)
def test_pefts_other_ways_to_choose_layers(model, ids, settings, adapted):
    wrapped = prepared(model, llama_config(**settings), ids)
    assert sum(hasattr(m, "lora_A") for m in wrapped.modules()) == adapted


def test_defect_03_no_default_for_the_model():
    with pytest.raises(TargetError, match=r"target_modules is not set.*model_type None.*'all-linear'"):
        preprocess_corda(Small(), config(target_modules=None), run_model=lambda: None)


def test_defect_05_typos_are_named_before_the_model_is_run(model):
    def never():
        raise AssertionError("the model was run")

    with pytest.raises(TargetError, match=r"'q_porj'.*did you mean q_proj"):
        preprocess_corda(model, llama_config(target_modules=["q_porj", "k_proj"]), run_model=never)
    with pytest.raises(TargetError, match=r"PEFT matches no layer.*'q_proj'.*in a list"):
        preprocess_corda(model, llama_config(target_modules="q_proj"), run_model=never)
    with pytest.raises(TargetError, match=r"PEFT matches no layer.*exclude_modules"):
        preprocess_corda(model, llama_config(target_modules=["q_proj"], exclude_modules=r".*_proj"), run_model=never)
    with pytest.raises(PlanError, match=r"larger than a layer allows.*k_proj \(24x48\).*Got: 25.*at most 24"):
        preprocess_corda(model, llama_config(rank_pattern={"k_proj": 25, "up_proj": 26}), run_model=never)
    assert not any(hasattr(m, "eigens") for m in model.modules())


def test_defect_06_places_are_checked_before_the_work(x, tmp_path, monkeypatch):
    model = Small()
    ran = []
    (tmp_path / "file").write_text("mine")
    for option in ("cache_file", "covariance_file"):
        with pytest.raises(ResourceError, match="cannot be written"):
            preprocess_corda(model, config(corda={option: tmp_path / "file" / "k"}), run_model=lambda: ran.append(1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ResourceError, match=r"cache_file cannot be written.*name another place"):
        preprocess_corda(model, config(corda={"cache_file": "k"}), run_model=lambda: ran.append(1))
    assert not ran
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    preprocess_corda(model, config(corda={"cache_file": "bare"}), run_model=lambda: model(x))
    assert (tmp_path / "bare" / "factors.safetensors").is_file()


def test_defect_07_what_was_made_for_something_else_is_refused(x, tmp_path):
    model = Small()
    kept = {"cache_file": tmp_path / "cache", "covariance_file": tmp_path / "covariance"}
    preprocess_corda(model, config("kpm", kept), run_model=lambda: model(x))
    cache = {"cache_file": kept["cache_file"]}
    with pytest.raises(ArtifactError, match=r"cache_file was made for.*corda_method 'kpm'.*corda_method 'ipm'"):
        preprocess_corda(model, config("ipm", cache), run_model=lambda: model(x))
    with pytest.raises(ArtifactError, match=r"rank 8 in linear.*rank 4.*remove this one"):
        preprocess_corda(model, config("kpm", cache, r=4))
    two = nn.ModuleDict({"linear": Small().linear, "other": nn.Linear(9, 5)})
    with pytest.raises(ArtifactError, match=r"no layer other.*layer other"):
        preprocess_corda(two, config("kpm", cache, r=4, target_modules=["other"]))
    changed = deepcopy(model)
    with torch.no_grad():
        changed.linear.weight += 1e-3
    for option, place in kept.items():
        with pytest.raises(ArtifactError, match=rf"{option} was made for something else.*weights \w+ in linear"):
            preprocess_corda(changed, config("kpm", {option: place}))
    # Covariances serve every rank and method, as in PEFT, and a pattern that gives the same rank is the same.
    preprocess_corda(model, config("ipm", {"covariance_file": kept["covariance_file"]}, r=3))
    preprocess_corda(model, config("kpm", cache, r=4, rank_pattern={"linear": 8}))


def test_a_part_of_what_was_kept_can_be_used(model, ids, tmp_path):
    kept = {"cache_file": tmp_path / "cache", "covariance_file": tmp_path / "covariance"}
    preprocess_corda(model, llama_config("kpm", kept), run_model=lambda: model(ids))
    whole = model.model.layers[1].self_attn.v_proj.eigens
    for option, place in kept.items():
        again = deepcopy(model)
        for module in again.modules():
            vars(module).pop("eigens", None)
        preprocess_corda(again, llama_config("kpm", {option: place}, target_modules=["v_proj"]))
        assert sum(hasattr(m, "eigens") for m in again.modules()) == 2
        assert torch.equal(again.model.layers[1].self_attn.v_proj.eigens.V_WC, whole.V_WC)


def test_files_of_others_are_neither_opened_nor_removed(x, tmp_path):
    model = Small()
    for option in ("cache_file", "covariance_file"):
        place = tmp_path / f"{option}.pt"
        torch.save({"linear": torch.eye(60)}, place)
        before = place.read_bytes()
        with pytest.raises(ArtifactError, match=rf"{option} is something that corda did not write.*torch\.save"):
            preprocess_corda(model, config(corda={option: place}), run_model=lambda: model(x))
        assert place.read_bytes() == before
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="a folder of other files"):
        preprocess_corda(model, config(corda={"cache_file": tmp_path / "folder"}), run_model=lambda: model(x))
    (tmp_path / "empty").write_bytes(b"")  # as tempfile makes one
    preprocess_corda(model, config(corda={"cache_file": tmp_path / "empty"}), run_model=lambda: model(x))
    manifest = json.loads((tmp_path / "empty" / "manifest.json").read_text())
    assert manifest["made_for"]["common"]["corda_method"] == "kpm"
    with (tmp_path / "empty" / "factors.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        preprocess_corda(model, config(corda={"cache_file": tmp_path / "empty"}))


def alone_and_padded(ids, side):
    """Two records of different length, and a batch of both with 75 % pads in one row."""
    long, short = ids[:1], ids[1:2, :12]
    pads = torch.zeros(1, 38, dtype=torch.long)
    row = torch.cat([pads, short] if side == "left" else [short, pads], dim=1)
    return [long, short], torch.cat([long, row])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("call", ["keyword", "position", "body", "wrapped"])
def test_defect_08_pads_do_not_count(model, ids, tmp_path, side, call):
    parts, batch = alone_and_padded(ids, side)
    mask = (batch != 0).long()

    def run():
        if call == "keyword":
            model(input_ids=batch, attention_mask=mask)
        elif call == "position":
            model(batch, mask)
        elif call == "body":  # its own mask, not that of a pass around it
            model.model(input_ids=batch, attention_mask=mask)
        else:
            outer(input_ids=batch, attention_mask=mask)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(inputs_embeds=model.get_input_embeddings()(input_ids), attention_mask=attention_mask)

    outer = Outer()
    lora = llama_config(corda={"covariance_file": tmp_path / "padded"})
    preprocess_corda(model, lora, run_model=run)
    lora = llama_config(corda={"covariance_file": tmp_path / "alone"})
    preprocess_corda(model, lora, run_model=lambda: [model(part) for part in parts])
    padded, alone = (store.load(read(tmp_path / name, "context")) for name in ("padded", "alone"))
    assert set(padded.tokens.values()) == {62}
    for spec in padded.layers:
        a, b = padded.covariance(spec.name), alone.covariance(spec.name)
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_generating_with_a_cache_counts_what_is_new(model, ids, tmp_path):
    _, batch = alone_and_padded(ids, "left")
    mask = (batch != 0).long()
    lora = llama_config(corda={"covariance_file": tmp_path / "c"})
    run = lambda: model.generate(  # noqa: E731
        input_ids=batch, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )
    preprocess_corda(model, lora, run_model=run)
    # The last token that is generated is never an input.
    assert set(store.load(read(tmp_path / "c", "context")).tokens.values()) == {62 + 2 * 3}


@pytest.mark.parametrize("where", ["inside", "before"])
def test_a_failed_pass_that_the_callback_survives_leaves_no_mask_behind(model, ids, tmp_path, where):
    _, batch = alone_and_padded(ids, "left")
    mask = (batch != 0).long()
    positions = torch.zeros(3, 7, dtype=torch.long) if where == "inside" else None

    def refuse(module, args, kwargs):
        if where == "before" and kwargs:
            raise RuntimeError("a user's hook")

    model.register_forward_pre_hook(refuse, with_kwargs=True)

    def run():
        with pytest.raises(RuntimeError, match=r"a user's hook|must match"):
            model(input_ids=batch, attention_mask=mask, position_ids=positions)
        model(ids)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="module forward hook")  # what torch says of an exception in a hook
        preprocess_corda(model, llama_config(corda={"covariance_file": tmp_path / "c"}), run_model=run)
    context = store.load(read(tmp_path / "c", "context"))
    assert context.tokens["model.layers.1.mlp.down_proj"] == ids.numel()


def test_pads_that_cannot_be_told_from_tokens_are_an_error(model, ids):
    _, batch = alone_and_padded(ids, "left")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x + mlp.up_proj(x[:, :20]).mean()  # sees a part of the sequence only
    lora = llama_config(target_modules=["up_proj"])
    with pytest.raises(CalibrationError, match=r"cannot tell which.*layers\.0\.mlp\.up_proj"):
        preprocess_corda(model, lora, run_model=lambda: model(batch, (batch != 0).long()))
    preprocess_corda(model, lora, run_model=lambda: model(ids, torch.ones_like(ids)))


def test_encoder_decoders_are_taken_without_padding():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
    t5 = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0, pad_token_id=0)).eval()
    source, target = torch.randint(3, 90, (30, 9)), torch.randint(3, 90, (30, 7))
    whole = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}
    reference = t5(**whole).logits
    lora = config("kpm", target_modules=None, r=3)
    preprocess_corda(t5, lora, run_model=lambda: t5(**whole))
    assert relative_difference(get_peft_model(deepcopy(t5), lora)(**whole).logits, reference) <= 1e-5
    whole["attention_mask"][0, -2:] = 0
    with pytest.raises(CalibrationError, match=r"padding in an encoder-decoder.*without padding"):
        preprocess_corda(t5, lora, run_model=lambda: t5(**whole))


def test_defect_09_layers_without_tokens_are_named(model, ids, monkeypatch):
    mlp = model.model.layers[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x))))
    with pytest.raises(CalibrationError, match=r"1 target layer saw no token.*layers\.1\.mlp\.up_proj"):
        preprocess_corda(model, llama_config(), run_model=lambda: model(ids))
    assert not any(hasattr(m, "eigens") for m in model.modules())


def test_defect_11_and_12_are_pefts_and_said(model, pico, ids, tmp_path):
    lora = llama_config()
    with pytest.warns(UserWarning, match=r"disable_adapter\(\) will not be the base.*save the initial adapter"):
        preprocess_corda(model, lora, run_model=lambda: model(ids))
    wrapped = get_peft_model(model, lora)
    wrapped.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="eigens"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), tmp_path / "a")


def test_defect_13_too_few_tokens_is_said_and_factors_stay_alike(model, ids):
    lora = llama_config("kpm")
    with pytest.warns(UserWarning, match=r"few calibration tokens: 20 for .*down_proj with 80 inputs.*640 would do"):
        preprocess_corda(model, lora, run_model=lambda: model(ids[:1, :20]))
    for name, module in get_peft_model(model, lora).named_modules():
        if hasattr(module, "lora_A"):
            ratio = module.lora_A["default"].weight.norm() / module.lora_B["default"].weight.norm()
            assert 0.99 < ratio < 1.01, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_defect_15_mode_and_hooks_are_put_back(model, ids, training, fails):
    model.train(training)
    model.model.layers[0].mlp.eval()
    modes = [m.training for m in model.modules()]
    before = attributes(model)

    def run():
        model.eval()
        model(ids)
        if fails:
            raise KeyError("the data source broke")

    if fails:
        with pytest.raises(KeyError, match="broke"):
            preprocess_corda(model, llama_config(), run_model=run)
        assert attributes(model) == before
    else:
        preprocess_corda(model, llama_config(), run_model=run)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_defect_17_the_smallest_components_are_the_smallest():
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, 96, generator=g))[0] for d in (96, 160))
    W = 30 * (U * torch.logspace(0, -4, 96)) @ V.T
    X = torch.randn(4000, 160, generator=g) * torch.logspace(1.5, -1.5, 160)
    model = nn.ModuleDict({"linear": nn.Linear(160, 96, bias=False)})
    with torch.no_grad():
        model["linear"].weight.copy_(W)
    preprocess_corda(model, config("kpm"), run_model=lambda: model["linear"](X))
    C = X.double().T @ X.double() / 4000
    M = W.double() @ (C + damping(C, 0.01) * torch.eye(160))
    best = torch.linalg.svdvals(M)[-8:].norm()
    assert (model["linear"].eigens.U_WC.double().T @ M).norm() / best - 1 < 1e-4
    usual = torch.linalg.svd(M.float(), full_matrices=False)[0][:, -8:]
    assert (usual.double().T @ M).norm() / best - 1 > 1e-3


def test_defect_18_what_is_not_finite_ends_with_an_error(model, ids):
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("nan")
    runs = []

    def run():
        for part in ids:
            runs.append(1)
            model(part[None])

    with pytest.raises(CalibrationError, match=r"not finite.*layers\.1\.self_attn\.q_proj"):
        preprocess_corda(model, llama_config(), run_model=run)
    assert len(runs) == 1


# What is refused, and what is said.


def test_nothing_to_run(x):
    model, other = Small(), Small()
    with pytest.raises(CalibrationError, match=r"nothing to collect them from.*give a run_model"):
        preprocess_corda(model, config())
    with pytest.raises(CalibrationError, match=r"no target layer was run.*the very model"):
        preprocess_corda(model, config(), run_model=lambda: other(x))
    with pytest.raises(TargetError, match=r"hooked_model lacks 1 of.*not a wrapper"):
        preprocess_corda(model, config(), run_model=lambda: other(x), hooked_model=nn.ModuleDict({"inner": other}))


def test_configurations_that_are_not_for_corda(x):
    model = Small()
    plain = LoraConfig(target_modules=["linear"])
    with pytest.raises(RecipeError, match=r"not one for CorDA.*init_lora_weights=True"):
        preprocess_corda(model, plain, run_model=lambda: model(x))
    for method in ("kmp", None, "lora"):
        with pytest.raises(RecipeError, match=r"corda_method is unknown.*'kpm' or 'ipm'"):
            preprocess_corda(model, config(method), run_model=lambda: model(x))
    with pytest.raises(TargetError, match="target_parameters cannot be combined"):
        preprocess_corda(model, config(target_parameters=["linear.weight"]), run_model=lambda: model(x))
    with pytest.raises(TargetError, match="layer_replication cannot be combined"):
        preprocess_corda(model, config(layer_replication=[(0, 1)]), run_model=lambda: model(x))


def test_layers_that_the_residual_form_cannot_adapt(model, ids, x):
    wrapped = get_peft_model(deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="carries an adapter already"):
        preprocess_corda(wrapped, llama_config(), run_model=lambda: wrapped(ids))
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(TargetError, match=r"shares its weight.*lm_head.*embed_tokens"):
        preprocess_corda(model, llama_config(target_modules=["lm_head"]), run_model=lambda: model(ids))
    packed = Small()
    packed.linear.weight = nn.Parameter(torch.zeros(1320, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised.*torch\.uint8 \(1320, 1\).*unquantised"):
        preprocess_corda(packed, config(), run_model=lambda: packed(x))
    with pytest.raises(ModelError, match="meta"):
        preprocess_corda(Small().to("meta"), config(), run_model=lambda: None)


def test_options_without_effect_are_said(x):
    model = Small()
    corda = {"use_float16_for_covariance": True, "prune_temporary_fields": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        preprocess_corda(model, config("kpm", corda, lora_dropout=0.1), run_model=lambda: model(x))
    texts = [str(w.message) for w in said]
    for start in ("use_float16_for_covariance has no", "prune_temporary_fields has no", "lora_dropout drops"):
        assert any(text.startswith(start) for text in texts)
    assert {w.filename for w in said} == {__file__}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        preprocess_corda(model, config(), run_model=lambda: model(x))
    assert len(said) == 1


def test_verbose_shows_progress(x, monkeypatch):
    model = Small()
    seen = []

    def bar(items, what, total):
        seen.append((what, total))
        return items

    monkeypatch.setattr("corda.compat.preprocess.shown", bar)
    preprocess_corda(model, config(), run_model=lambda: model(x))
    assert not seen
    preprocess_corda(model, config(corda={"verbose": True}), run_model=lambda: model(x))
    assert seen == [("decompose", 1)]
