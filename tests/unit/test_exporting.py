"""Every export, reloaded here by other means than its own check, gives the trained model's logits."""

from __future__ import annotations

import copy
import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda import artifact, compress
from corda.adapter import attach, relative_difference
from corda.context.collect import collect
from corda.errors import AdapterError, ArtifactError, CheckError, RecipeError, ResourceError
from corda.exporting import export as exporting
from corda.exporting import forms, hub
from corda.exporting.check import ROUNDINGS, allowed, spread_probe
from corda.exporting.export import export, finished
from corda.exporting.kept import kept_warning
from corda.exporting.update import Factors
from corda.plan.make import make_plan
from corda.reading import parse_export

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])
DYNAMIC = {"allocation": "dynamic", "rank_cap": 10, "compactness_scale": "unit"}
RSLORA = {"use_rslora": True, "lora_alpha": 5.0}


@pytest.fixture(scope="module")
def context(pico):
    texts = [f"The {w} of item {i} is {i * 7 % 13}." for i, w in enumerate(["colour", "weight", "price", "age"] * 8)]
    return collect(fresh(pico), AutoTokenizer.from_pretrained(pico), texts)


@functools.cache
def loaded(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def fresh(folder, dtype=torch.float32):
    return copy.deepcopy(loaded(folder, dtype))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def trained(pico, context, *, base="intact", dtype=torch.float32, move=0.05, **settings):
    """A model with an adapter that was moved from its start as training would."""
    plan = make_plan(fresh(pico), context, **{"rank": 4} | settings)
    wrapped = attach(fresh(pico, dtype), plan, base=base)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += move * torch.randn_like(p)
    return wrapped


def reload(form, folder, pico):
    if form == "lora":
        return PeftModel.from_pretrained(fresh(pico), str(folder)).eval()
    if form == "merged":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(folder / "adapter")).eval()


@pytest.mark.parametrize("base", ["intact", "residual"])
@pytest.mark.parametrize("form", ["lora", "residual", "merged"])
@pytest.mark.parametrize(
    "settings", [pytest.param({"mode": "ipm", "lora_alpha": 3.0}, marks=pytest.mark.slow), DYNAMIC | RSLORA]
)
def test_every_form_reloads_to_the_trained_model(pico, context, tmp_path, base, form, settings):
    wrapped = trained(pico, context, base=base, **settings)
    done = export(wrapped, tmp_path / "out", format=form)
    assert done.max_relative_logit_difference <= done.tolerance == 1e-5
    assert relative_difference(logits(reload(form, tmp_path / "out", pico)), logits(wrapped)) < 1e-5
    assert relative_difference(logits(wrapped), logits(fresh(pico))) > 0.05
    if form != "merged":
        where = tmp_path / "out" / ("adapter" if form == "residual" else ".") / "adapter_config.json"
        config = json.loads(where.read_text())
        assert bool(config["rank_pattern"]) is ("allocation" in settings)
        assert done.rank == max([config["r"], *config["rank_pattern"].values()])


class Server:
    """Applies an adapter by the rules of servers such as vLLM, from its two files alone, without PEFT.

    One rank and one alpha for all layers; patterns are not known. A tensor's name says which layer it is for, and a
    layer whose last name is not expected is refused. Factors are cast to the server's dtype.
    """

    RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

    def __init__(self, model, max_lora_rank, dtype=torch.float32):
        assert max_lora_rank in self.RANKS
        self.model, self.max_lora_rank, self.dtype = model, max_lora_rank, dtype
        self.expected = {
            n.rpartition(".")[2]
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) or "Conv1D" in str(m)
        }

    @torch.no_grad()
    def load(self, folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        for unsupported in ("modules_to_save", "use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens"):
            assert not config.get(unsupported), unsupported
        assert config["bias"] == "none"
        assert not isinstance(config["init_lora_weights"], str)
        r = config["r"]
        if r > self.max_lora_rank:
            raise ValueError(f"LoRA rank {r} is greater than max_lora_rank {self.max_lora_rank}")
        scaling = config["lora_alpha"] / (r**0.5 if config["use_rslora"] else r)
        pairs = {}
        for key, tensor in load_file(folder / "adapter_model.safetensors").items():
            *name, part, tail = key.removeprefix("base_model.model.").split(".")
            assert key.startswith("base_model.model.")
            assert tail == "weight"
            assert name[-1] in self.expected, key
            assert tensor.shape[0 if part == "lora_A" else 1] == r, key
            pairs.setdefault(".".join(name), {})[part] = tensor.to(self.dtype).float()
        assert isinstance(config["target_modules"], list)
        assert {name.rpartition(".")[2] for name in pairs} <= {t.rpartition(".")[2] for t in config["target_modules"]}
        for name, pair in pairs.items():
            layer = self.model.get_submodule(name)
            delta = scaling * pair["lora_B"] @ pair["lora_A"]
            layer.weight += delta if isinstance(layer, torch.nn.Linear) else delta.T
        return self.model


@pytest.mark.parametrize(
    ("base", "settings"),
    [("intact", DYNAMIC), ("residual", DYNAMIC | RSLORA), ("intact", {"mode": "ipm", "lora_alpha": 6.0})],
)
def test_a_server_of_one_rank_and_one_alpha_reads_the_uniform_layout(pico, context, tmp_path, base, settings):
    wrapped = trained(pico, context, base=base, **settings)
    done = export(wrapped, tmp_path / "out", layout="uniform", max_rank=32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == done.rank
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    served = Server(fresh(pico), 32).load(tmp_path / "out")
    assert relative_difference(logits(served), logits(wrapped)) < 1e-5


def test_a_server_cannot_read_patterns(pico, context, tmp_path):
    """The reader above is no forgiving one: per-layer ranks, which PEFT takes, fail in it."""
    export(trained(pico, context, **DYNAMIC), tmp_path / "out", layout="patterns")
    with pytest.raises(AssertionError, match="lora_"):
        Server(fresh(pico), 32).load(tmp_path / "out")


def test_a_server_in_16_bits_loses_no_more_than_a_rounding_of_the_update(pico, context, tmp_path):
    wrapped = trained(pico, context, mode="ipm", move=0.002)
    export(wrapped, tmp_path / "out", layout="uniform")
    wrapped.save_pretrained(str(tmp_path / "plain"))  # [A; A0], [B, -B0]
    moved = logits(wrapped) - logits(fresh(pico))
    lost = [
        float(
            (logits(Server(fresh(pico), 8, torch.bfloat16).load(tmp_path / name)) - logits(wrapped)).norm()
            / moved.norm()
        )
        for name in ("out", "plain")
    ]
    assert lost[0] < 0.02
    assert lost[1] > 10 * lost[0]


def test_the_cap_of_a_server(pico, context, tmp_path):
    wrapped = trained(pico, context, rank=6)
    with pytest.raises(RecipeError, match=r"rank 12, twice the trained rank.*at most 8.*set export\.rank to 8"):
        export(wrapped, tmp_path / "out", layout="uniform", max_rank=8)
    assert not (tmp_path / "out").exists()
    done = export(wrapped, tmp_path / "out", layout="uniform", max_rank=8, rank=8)
    assert done.rank == 8
    Server(fresh(pico), 8).load(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"rank 6.*lower adapter\.rank"):
        export(wrapped, tmp_path / "other", format="residual", max_rank=4)


@pytest.mark.parametrize("layout", ["patterns", "uniform"])
def test_compression_is_the_best_of_its_rank_and_says_what_it_costs(pico, context, tmp_path, layout):
    wrapped = trained(pico, context, **DYNAMIC)
    records = [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:, :5]}]
    done = export(wrapped, tmp_path / "out", rank=5, layout=layout, records=records)
    lost = energy = 0.0
    shares = {}
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, module in wrapped.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        D = (module.get_delta_weight("default").double() - module.get_delta_weight("initial").double()).detach()
        sigma = torch.linalg.svdvals(D).square()
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        k = min(5, 2 * module.r["default"])
        assert A.shape[0] == (5 if layout == "uniform" else k)
        assert float((D - B.double() @ A.double()).square().sum()) == pytest.approx(float(sigma[k:].sum()), abs=1e-7)
        lost, energy = lost + float(sigma[k:].sum()), energy + float(sigma.sum())
        shares[name] = float(sigma[k:].sum() / sigma.sum())
    found = done.compression
    assert found.lost_energy == pytest.approx(lost / energy, rel=1e-4)
    assert found.worst_lost_energy == pytest.approx(max(shares.values()), rel=1e-4)
    assert found.worst_layer == max(shares, key=shares.get)
    assert found.lost_energy_of_layers == pytest.approx(shares, rel=1e-4, abs=1e-9)
    reloaded = reload("lora", tmp_path / "out", pico)
    apart = [(logits_of(reloaded, r) - logits_of(wrapped, r)).abs().max() for r in records]
    scale = [logits_of(wrapped, r).abs().max() for r in records]
    assert found.max_relative_logit_difference == pytest.approx(float(max(apart) / max(scale)), rel=1e-4)
    assert found.max_relative_logit_difference > 1e-3
    assert (found.records, found.tokens) == (2, 12)
    assert done.max_relative_logit_difference <= 1e-5


def logits_of(model, record):
    with torch.no_grad():
        return model(**record).logits


def test_a_rank_that_holds_everything_loses_nothing(pico, context, tmp_path):
    found = export(trained(pico, context), tmp_path / "out", rank=64).compression
    assert found.lost_energy < 1e-12
    assert found.max_relative_logit_difference < 1e-5


def test_merged_weights_are_one_rounding_from_the_sum(pico, context, tmp_path):
    wrapped = trained(pico, context, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(pico)
    done = export(wrapped, tmp_path / "out", format="merged", max_shard_size="40KB", tokenizer=tokenizer)
    assert done.dtype == "bfloat16"
    assert done.rank is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            delta = module.get_delta_weight("default").double() - module.get_delta_weight("initial").double()
            exact = module.base_layer.weight.double() + delta
            error = (merged.get_submodule(name).weight.double() - exact).abs()
            assert bool((error <= 2**-8 * exact.abs() + 1e-6).all())
    encoded = AutoTokenizer.from_pretrained(tmp_path / "out")("a b")
    assert encoded["input_ids"] == tokenizer("a b")["input_ids"]


@pytest.mark.parametrize(
    ("form", "base"), [("lora", "intact"), ("lora", "residual"), ("merged", "intact"), ("residual", "residual")]
)
def test_16_bit_exports_pass_within_roundings_and_wrong_ones_do_not(pico, context, tmp_path, form, base):
    wrapped = trained(pico, context, base=base, dtype=torch.bfloat16)
    done = export(wrapped, tmp_path / "out", format=form)
    names = [layer.name for layer in context.layers]
    assert done.tolerance == allowed(fresh(pico, torch.bfloat16), names, spread_probe(wrapped.get_base_model()))
    assert done.max_relative_logit_difference < 2 / ROUNDINGS * done.tolerance

    def wrong_base():
        model = fresh(pico, torch.bfloat16)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight *= 1.2
        return model

    with pytest.raises(CheckError, match=r"after reload.*export\.tolerance"):
        export(wrapped, tmp_path / "bad", format=form, fresh_base=wrong_base)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["lora", "residual", "merged"])
@pytest.mark.parametrize("base", ["intact", pytest.param("residual", marks=pytest.mark.slow)])
def test_the_weights_hold_the_whole_update(pico, context, tmp_path, form, base):
    exact = export(trained(pico, context, base=base), tmp_path / "out", format=form)
    assert exact.update_kept == pytest.approx(1, abs=1e-5)
    half = export(trained(pico, context, base=base, dtype=torch.bfloat16), tmp_path / "out", format=form)
    assert half.update_kept == pytest.approx(1, abs=1e-5 if form == "lora" else 0.02)


def test_compression_keeps_what_it_does_not_lose(pico, context, tmp_path):
    done = export(trained(pico, context), tmp_path / "out", rank=3)
    assert done.update_kept == pytest.approx(1 - done.compression.lost_energy, abs=1e-5)
    assert done.compression.lost_energy > 0.05


def test_an_update_finer_than_16_bits_is_not_merged_into_them(pico, context, tmp_path):
    """Entries below half the spacing of the weight that they are added to vanish, and no logit would tell."""
    wrapped = trained(pico, context, dtype=torch.bfloat16, move=1e-4)
    with pytest.raises(CheckError, match=r"do not hold the trained update.*% of it.*bfloat16.*format lora"):
        export(wrapped, tmp_path / "out", format="merged")
    assert not any(tmp_path.iterdir())
    assert export(wrapped, tmp_path / "out").update_kept == pytest.approx(1, abs=1e-4)
    found = export(trained(pico, context, dtype=torch.bfloat16, move=1e-3), tmp_path / "out2", format="merged")
    assert 0.5 < found.update_kept < 0.95
    (note,) = kept_warning(found.as_json())
    assert re.search(r"merged export holds \d+(\.\d)? % of the update: bfloat16", note)
    assert not kept_warning(export(wrapped, tmp_path / "small", rank=2).as_json())


def test_an_adapter_left_out_is_noticed_even_below_the_roundings(pico, context, tmp_path, monkeypatch):
    wrapped = trained(pico, context, dtype=torch.bfloat16, move=1e-4)
    original = forms.write_lora

    def empty(folder, factors, *rest, **settings):
        return original(folder, {n: Factors(f.A, 0 * f.B) for n, f in factors.items()}, *rest, **settings)

    monkeypatch.setattr(forms, "write_lora", empty)
    with pytest.raises(CheckError, match=r"Got: 0 % of it.*Expected: 100 % within 1 %"):
        export(wrapped, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_update_of_nothing_exports_in_every_form(pico, context, tmp_path):
    for form in ("lora", "residual", "merged"):
        done = export(trained(pico, context, move=0), tmp_path / form, format=form)
        assert done.update_kept is None
    assert export(trained(pico, context, move=0), tmp_path / "small", rank=2).compression.lost_energy == 0


def test_the_residual_form_is_the_papers_and_finds_its_base(pico, context, tmp_path, monkeypatch):
    wrapped = trained(pico, context, mode="ipm", lora_alpha=2.0, rank=3)
    export(wrapped, tmp_path / "out", format="residual", tokenizer=AutoTokenizer.from_pretrained(pico))
    W, rest = fresh(pico), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            expected = W.get_submodule(name).weight - module.get_delta_weight("initial")
            assert torch.allclose(rest.get_submodule(name).weight, expected, atol=1e-6)
    state = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert state["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (3, 48)
    monkeypatch.chdir("/")
    found = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out" / "adapter")).eval()
    assert relative_difference(logits(found), logits(wrapped)) < 1e-5


def gpt2(folder):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=128, n_inner=80, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", ["intact", pytest.param("residual", marks=pytest.mark.slow)])
def test_conv1d_in_every_form(tokenizer, texts, tmp_path, base):
    folder = gpt2(tmp_path / "gpt2")
    wrapped = trained(folder, collect(fresh(folder), tokenizer, texts), base=base)
    expected = logits(wrapped)
    for form in ("lora", "residual", "merged"):
        export(wrapped, tmp_path / form, format=form, layout="patterns" if form == "merged" else "uniform")
        assert relative_difference(logits(reload(form, tmp_path / form, folder)), expected) < 1e-5
    assert relative_difference(logits(Server(fresh(folder), 8).load(tmp_path / "lora")), expected) < 1e-5
    merged = wrapped.merge_and_unload(safe_merge=base == "intact")
    assert relative_difference(logits(merged), expected) < 1e-5


@pytest.mark.parametrize(("base", "safe"), [("intact", False), ("intact", True), ("residual", True)])
def test_merging_in_place_rounds_once(pico, context, base, safe):
    wrapped = trained(pico, context, base=base, dtype=torch.bfloat16, **RSLORA)
    exact, terms = {}, {}
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            W, delta = module.base_layer.weight.double(), module.get_delta_weight("default").double()
            if base == "intact":
                delta = delta - module.get_delta_weight("initial").double()
            exact[name] = (W + delta).detach()
            # PEFT itself merges a residual base, and may round the update before it adds it.
            terms[name] = (exact[name].abs() + (delta.abs() if base == "residual" else 0)).detach()
    merged = wrapped.merge_and_unload(safe_merge=safe)
    for name, W in exact.items():
        error = (merged.get_submodule(name).weight.double() - W).abs()
        assert bool((error <= 2**-8 * terms[name] + 1e-6).all()), name


def test_plain_lora_compresses_and_merges_and_has_no_residual_base(pico, context, tmp_path):
    plan = make_plan(fresh(pico), context.layers, mode="lora", rank=4)
    wrapped = attach(fresh(pico), plan)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p += 0.1 * torch.randn_like(p)
    assert export(wrapped, tmp_path / "small", rank=2).rank == 2
    assert export(wrapped, tmp_path / "exact", layout="uniform").rank == 4
    export(wrapped, tmp_path / "merged", format="merged")
    assert relative_difference(logits(reload("merged", tmp_path / "merged", pico)), logits(wrapped)) < 1e-5
    with pytest.raises(AdapterError, match="no residual base without initial factors"):
        export(wrapped, tmp_path / "no", format="residual")


def test_a_head_tied_to_the_embeddings_is_not_merged(tmp_path, context, tokenizer, texts):
    from conftest import llama

    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    found = collect(fresh(tmp_path / "tied"), tokenizer, texts[:8], target_modules=["lm_head", "up_proj"])
    wrapped = trained(tmp_path / "tied", found)
    with pytest.raises(AdapterError, match=r"shares its weight with the input embeddings.*lm_head.*format lora"):
        export(wrapped, tmp_path / "out", format="merged")
    assert export(wrapped, tmp_path / "out").max_relative_logit_difference <= 1e-5


def test_a_finished_export_is_known_until_something_changes(pico, context, tmp_path):
    wrapped = trained(pico, context)
    folder = tmp_path / "out"
    done = export(wrapped, folder, rank=3, fingerprint="one")
    assert finished(folder, "one") == done
    assert finished(folder, "two") is None
    (folder / "README.md").write_text("my own card")
    assert finished(folder, "one") == done
    state = load_file(folder / "adapter_model.safetensors")
    save_file({k: 2 * v for k, v in state.items()}, folder / "adapter_model.safetensors")
    assert finished(folder, "one") is None
    assert export(wrapped, folder, rank=3, fingerprint="one") == done
    (folder / "adapter_config.json").unlink()
    assert finished(folder, "one") is None
    assert finished(tmp_path, "one") is None


@pytest.mark.parametrize("form", ["merged", "residual"])
def test_an_export_replaces_its_own_files_only(pico, context, tmp_path, form):
    wrapped = trained(pico, context)
    export(wrapped, tmp_path / "out", format=form, max_shard_size="40KB")
    export(wrapped, tmp_path / "out", format=form)
    assert not list((tmp_path / "out").glob("model-0*"))
    (tmp_path / "out" / "sub").mkdir()
    (tmp_path / "out" / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="something else"):
        export(wrapped, tmp_path / "out", format=form)
    assert (tmp_path / "out" / "sub" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="something else"):
        export(wrapped, tmp_path / "file", format=form)


def test_an_export_does_not_replace_what_peft_saved(pico, context, tmp_path):
    """The trained factors in their own form cannot be had again from an export."""
    wrapped = trained(pico, context)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    kept = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ArtifactError, match=r"something else.*another folder"):
        export(wrapped, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_an_off_loaded_model_is_exported(pico, context, tmp_path, form):
    where = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    where |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(pico, device_map=where, offload_folder=tmp_path / "offload")
    assert next(model.parameters()).device.type == "meta"
    wrapped = attach(model.eval(), make_plan(model, context, rank=4))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    done = export(wrapped, tmp_path / "out", format=form)
    assert done.max_relative_logit_difference <= done.tolerance


def test_settings_by_name_are_checked(pico, context, tmp_path):
    wrapped = trained(pico, context)
    with pytest.raises(RecipeError, match="did you mean 'format'"):
        export(wrapped, tmp_path / "out", fromat="merged")
    with pytest.raises(AdapterError, match="not both"):
        export(wrapped, tmp_path / "out", parse_export({}), format="merged")
    with pytest.raises(AdapterError, match="nothing to export"):
        export(wrapped, tmp_path / "out", format="none")
    for settings, message in (
        ({"format": "merged", "rank": 3}, "rank has no meaning for format 'merged'"),
        ({"format": "residual", "rank": 3}, "rank has no meaning for format 'residual'"),
        ({"format": "merged", "layout": "uniform"}, "layout has no meaning"),
        ({"format": "merged", "max_rank": 8}, "max_rank has no meaning"),
        ({"rank": 16, "max_rank": 8}, "rank is above max_rank"),
        ({"push_to_hub": "a b/c"}, "OWNER/NAME"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_export(settings)


class FakeHub:
    """Stands for the Hub: keeps what is uploaded."""

    def __init__(self):
        self.files, self.created = {}, []

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        self.created.append((repo, private))
        return SimpleNamespace(repo_id=repo)

    def upload_folder(self, *, repo_id, folder_path, commit_message, ignore_patterns):
        for path in folder_path.rglob("*"):
            name = str(path.relative_to(folder_path))
            if path.is_file() and name not in (ignore_patterns or []):
                self.files[f"{repo_id}/{name}"] = path.read_bytes()

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.files[f"{repo_id}/{path_in_repo}"] = path_or_fileobj


@pytest.fixture
def fake_hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


def test_an_upload_comes_after_the_check_and_only_once(pico, context, tmp_path, fake_hub):
    wrapped = trained(pico, context)
    with pytest.raises(CheckError):
        export(wrapped, tmp_path / "out", push_to_hub="me/adapter", tolerance=1e-30)
    assert not fake_hub.created
    done = export(wrapped, tmp_path / "out", push_to_hub="me/adapter", hub_private_repo=True, fingerprint="x")
    assert done.pushed_to == "me/adapter"
    assert fake_hub.created == [("me/adapter", True)]
    assert {"me/adapter/adapter_config.json", "me/adapter/adapter_model.safetensors"} <= set(fake_hub.files)
    options = parse_export({"push_to_hub": "me/adapter"})
    assert exporting.published(finished(tmp_path / "out", "x"), options).pushed_to == "me/adapter"
    assert len(fake_hub.created) == 1
    exporting.published(done, parse_export({"push_to_hub": "me/other"}))
    assert fake_hub.created[1:] == [("me/other", None)]
    assert finished(tmp_path / "out", "x").pushed_to == "me/other"


def test_an_uploaded_residual_adapter_names_the_repository_as_its_base(pico, context, tmp_path, fake_hub):
    export(trained(pico, context), tmp_path / "out", format="residual", push_to_hub="me/model")
    name = "adapter/adapter_config.json"
    assert json.loads(fake_hub.files[f"me/model/{name}"])["base_model_name_or_path"] == "me/model"
    local = json.loads((tmp_path / "out" / name).read_text())["base_model_name_or_path"]
    assert local == str((tmp_path / "out").resolve())
    assert not any(str(tmp_path).encode() in content for content in fake_hub.files.values())


def test_a_refused_upload_keeps_the_export(pico, context, tmp_path, monkeypatch, fake_hub):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(fake_hub, "create_repo", refuse)
    with pytest.raises(ResourceError, match=r"cannot be uploaded.*me/adapter.*no route.*hf auth login"):
        export(trained(pico, context), tmp_path / "out", push_to_hub="me/adapter", fingerprint="x")
    assert finished(tmp_path / "out", "x").pushed_to is None
    monkeypatch.setattr(hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))
    with pytest.raises(ResourceError, match=r"cannot be uploaded.*me/adapter.*hf auth login"):
        hub.push(tmp_path / "out", "me/adapter", "adapter/adapter_config.json", private=None)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match="no access token"):
        hub.refuse_without_token("me/adapter")


def test_an_export_can_be_read_by_others(pico, context, tmp_path):
    tmp_path.chmod(0o755)
    export(trained(pico, context), tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_full_weights_need_disk(pico, context, tmp_path, monkeypatch):
    sizes = []
    original = artifact.need_disk
    monkeypatch.setattr(artifact, "need_disk", lambda folder, size: (sizes.append(size), original(folder, size)))
    export(trained(pico, context), tmp_path / "out", format="merged")
    parameters = sum(p.numel() for p in fresh(pico).parameters())
    assert max(sizes) == 4 * parameters


def test_the_model_is_left_as_it_was(pico, context, tmp_path):
    wrapped = trained(pico, context).train()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    for form in ("lora", "residual", "merged"):
        export(wrapped, tmp_path / form, format=form)
    assert wrapped.training
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    assert not any(module._forward_hooks for module in wrapped.modules())


def test_compressed_relative_error_is_a_root_of_energies():
    assert compress.relative_error(compress.Truncated(torch.zeros(1, 1), torch.zeros(1, 1), 4.0, 1.0)) == 0.5
