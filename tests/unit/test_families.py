"""Every model family from collecting to a reloaded export; what was run goes into the table of docs/families.md."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from conftest import FAMILIES_RUN as RECORD
from conftest import encoded_texts, note_family
from peft import PeftModel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BitsAndBytesConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from corda.adapter import attach, relative_difference
from corda.architectures import heads
from corda.context.collect import collect_encoded
from corda.data.batches import Encoded
from corda.errors import AdapterError, ModelError, TargetError
from corda.exporting.check import probe_logits, spread_probe
from corda.exporting.export import export
from corda.heads import trained_heads
from corda.models import keep_exact
from corda.plan.make import make_plan
from corda.quantization import is_4bit, refuse_unpacked
from corda.targets import find_targets

SMALL = {"vocab_size": 259, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
WIDE = SMALL | {"intermediate_size": 80, "initializer_range": 0.2, "max_position_embeddings": 256}
KV = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **KV)),
    "Llama, tied weights": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **KV, tie_word_embeddings=True)),
    "Llama, sequence classification": lambda: LlamaForSequenceClassification(LlamaConfig(**WIDE, **KV, num_labels=3)),
    "GPT-2 (Conv1D, tied weights)": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=48, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
    ),
    "GPT-NeoX (fused qkv)": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE)),
    "Falcon (fused qkv)": lambda: FalconForCausalLM(
        FalconConfig(**SMALL, initializer_range=0.2, multi_query=True, bos_token_id=1, eos_token_id=2)
    ),
    "Phi": lambda: PhiForCausalLM(PhiConfig(**WIDE, bos_token_id=1, eos_token_id=2)),
    "Phi-3 (fused qkv and gate_up)": lambda: Phi3ForCausalLM(Phi3Config(**WIDE, **KV)),
    "BERT, sequence classification": lambda: BertForSequenceClassification(BertConfig(**WIDE, num_labels=3)),
    "BERT, token classification": lambda: BertForTokenClassification(BertConfig(**WIDE, num_labels=5)),
    "BERT, embeddings": lambda: BertModel(BertConfig(**WIDE)),
    "RoBERTa, sequence classification": lambda: RobertaForSequenceClassification(RobertaConfig(**WIDE, num_labels=3)),
    "ModernBERT, sequence classification": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(
            **WIDE,
            initializer_cutoff_factor=3.0,
            num_labels=3,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        )
    ),
    "T5 (encoder and decoder)": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=259, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}
WHOLE = {"T5 (encoder and decoder)", "BERT, sequence classification", "BERT, embeddings"}  # the latter for a pooler


def make(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and name.startswith(("classifier", "score", "head")):
                p.normal_(std=0.3)
    return model


def loss_of(model, probe):
    name = type(model.get_base_model()).__name__
    torch.manual_seed(1)
    if name.endswith("ForSequenceClassification"):
        return model(**probe, labels=torch.tensor([0, 2])).loss
    if name.endswith("ForTokenClassification"):
        return model(**probe, labels=torch.randint(0, 5, probe["input_ids"].shape)).loss
    if name == "BertModel":
        hidden = model(**probe).last_hidden_state
        return (hidden - torch.randn(hidden.shape)).square().mean()
    probe = {key: value for key, value in probe.items() if key != "decoder_input_ids"}
    return model(**probe, labels=probe["input_ids"]).loss


def descend(adapted, probe, rate=0.02):
    """Loss before and after one step of gradient descent on what is trained."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    losses = []
    for _ in range(2):
        loss = loss_of(adapted, probe)
        losses.append(float(loss.detach()))
        adapted.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
        with torch.no_grad():
            for p in trained:
                if p.grad is not None:
                    p -= rate / norm * p.grad
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tokenizer, texts, tmp_path):
    model = make(family)
    pristine = copy.deepcopy(model)
    fresh = functools.partial(copy.deepcopy, pristine)
    probe = spread_probe(model)
    before = probe_logits(model, probe)
    layers, rows = find_targets(model), encoded_texts(texts[:16], tokenizer)
    if family.startswith("T5"):
        rows = [Encoded(one.ids, tuple(i > 12 for i in range(len(one)))) for one in rows]
    whole = collect_encoded(model, rows, layers, pad_token_id=0, stream=False)
    facts = {"collect": f"{len(whole.layers)} layers"}
    context = collect_encoded(model, rows, layers, pad_token_id=0)
    if not any(warning.startswith("collected whole") for warning in context.warnings):
        for layer in layers:
            a, b = context.covariance(layer.name), whole.covariance(layer.name)
            assert float((a - b).norm()) <= 1e-5 * float(b.norm()), layer.name
        facts["stream"] = "= whole"
    else:
        facts["stream"] = "collected whole"
    assert (facts["stream"] == "= whole") == (family not in WHOLE)

    for name, options in {
        "IPM": {"mode": "ipm"},
        "++": {"mode": "kpm", "allocation": "dynamic", "compactness_scale": "unit"},
        "KPM": {"mode": "kpm"},
    }.items():
        adapted = attach(fresh(), make_plan(model, context, rank=3, **options))
        step0 = relative_difference(probe_logits(adapted, probe), before)
        assert step0 <= 1e-5, name
        facts[name] = f"step 0 {step0:.0e}" if step0 else "step 0 exact"

    losses = descend(adapted, probe)
    assert losses[1] < losses[0]
    facts["train"] = "loss falls"
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn_like(p)
    with adapted.disable_adapter():
        assert torch.equal(probe_logits(adapted, probe), before)
    trained = probe_logits(adapted, probe)
    assert relative_difference(trained, before) > 1e-3
    done = export(adapted, tmp_path / "out", fresh_base=fresh)
    facts["export"] = "rank 2r"
    again = PeftModel.from_pretrained(fresh(), str(tmp_path / "out")).eval()
    reload = relative_difference(probe_logits(again, probe), trained)
    assert max(reload, done.max_relative_logit_difference) <= 1e-5
    facts["reload"] = f"{max(reload, 1e-9):.0e}"
    note_family(family, facts)


@pytest.mark.parametrize("family", ["RoBERTa, sequence classification", "ModernBERT, sequence classification"])
@pytest.mark.parametrize("form", ["merged", "residual", "compressed", "saved"])
def test_heads_leave_with_the_adapter(family, form, tokenizer, texts, tmp_path):
    model = make(family)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base").eval()
    context = collect_encoded(model, encoded_texts(texts[:6], tokenizer), find_targets(model), pad_token_id=0)
    assert not any(layer.name.startswith(("classifier", "head")) for layer in context.layers)
    plan = make_plan(model, context, rank=2, mode="ipm")
    adapted, probe = attach(model, plan), spread_probe(model)
    heads = [name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name]
    assert heads
    assert all("classifier" in name or "head" in name for name in heads)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    trained = probe_logits(adapted, probe)
    if form == "saved":
        adapted.save_pretrained(str(tmp_path / "out"))
        plain = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), str(tmp_path / "out")).eval()
        assert relative_difference(probe_logits(plain, probe), trained) <= 1e-5
        resumed = attach(type(model).from_pretrained(tmp_path / "base").eval(), plan)
        resumed.load_adapter(str(tmp_path / "out"), "default")
        assert torch.equal(probe_logits(resumed, probe), trained)
        return
    options = {"format": "lora", "rank": 3} if form == "compressed" else {"format": form}
    assert export(adapted, tmp_path / "out", **options).max_relative_logit_difference <= 1e-5


def in_4_bits(kind, folder, skip):
    """A model as bitsandbytes holds it, but for its heads, which are trained in full."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip or None,
    )
    model = kind.from_pretrained(folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})
    keep_exact(model)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_family_in_4_bits(family, tokenizer, texts, tmp_path):
    """Covariances and factors of the model in full precision, on an intact base of 4 bits."""
    pytest.importorskip("bitsandbytes")
    model = make(family)
    model.save_pretrained(tmp_path / "base")
    layers, rows = find_targets(model), encoded_texts(texts[:16], tokenizer)
    if family.startswith("Falcon"):
        with pytest.raises(ModelError, match=r"packs no layers of this class.*query_key_value.*FalconLinear"):
            refuse_unpacked(model, [layer.name for layer in layers])
        note_family(family, {"4-bit": "refused: its layers are no nn.Linear"})
        return
    refuse_unpacked(model, [layer.name for layer in layers])
    if family.startswith("T5"):
        rows = [Encoded(one.ids, tuple(i > 12 for i in range(len(one)))) for one in rows]
    plan = make_plan(model, collect_encoded(model, rows, layers, pad_token_id=0), rank=3, mode="ipm")
    fresh = functools.partial(in_4_bits, type(model), tmp_path / "base", heads(model))
    packed, probe = fresh(), spread_probe(model)
    held = sum(is_4bit(packed.get_submodule(layer.name)) for layer in layers)
    assert held >= len(layers) - 4  # T5 keeps its `wo` in full precision
    before = probe_logits(packed, probe)
    assert relative_difference(before, probe_logits(model, probe)) > 1e-3  # 4 bits cost something
    adapted = attach(packed, plan, base="intact")
    step0 = relative_difference(probe_logits(adapted, probe), before)
    losses = descend(adapted, probe)
    assert losses[1] < losses[0]
    trained = probe_logits(adapted, probe)
    assert relative_difference(trained, before) > 1e-4
    done = export(adapted, tmp_path / "out", fresh_base=fresh)
    again = PeftModel.from_pretrained(fresh(), str(tmp_path / "out")).eval()
    reload = relative_difference(probe_logits(again, probe), trained)
    assert max(step0, reload, done.max_relative_logit_difference) <= 1e-5
    note_family(family, {"4-bit": f"step 0 {step0:.0e}, reload {max(reload, 1e-9):.0e}".replace("0e+00", "exact")})


def test_heads_of_4bit_classifiers(tokenizer, texts, tmp_path):
    """Refused where they are packed too; merged with what was trained of them; no residual form."""
    pytest.importorskip("bitsandbytes")
    model = make("RoBERTa, sequence classification")
    model.save_pretrained(tmp_path / "base")
    context = collect_encoded(model, encoded_texts(texts[:8], tokenizer), find_targets(model), pad_token_id=0)
    plan = make_plan(model, context, rank=2, mode="ipm")
    with pytest.raises(AdapterError, match=r"head is in 4 bits.*llm_int8_skip_modules=\['classifier'\]"):
        attach(in_4_bits(type(model), tmp_path / "base", []), plan)
    adapted = attach(in_4_bits(type(model), tmp_path / "base", ["classifier"]), plan)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    fresh = functools.partial(type(model).from_pretrained, tmp_path / "base", dtype=torch.float32)
    export(adapted, tmp_path / "merged", fresh_base=fresh, format="merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    trained = trained_heads(adapted)
    assert trained
    for name, value in trained.items():
        assert torch.equal(merged.get_parameter(name), value)
        assert not torch.equal(model.get_parameter(name), value)
    with pytest.raises(AdapterError, match="residual form of a 4-bit classifier"):
        export(adapted, tmp_path / "residual", fresh_base=fresh, format="residual")


class Reused(nn.Module):
    """A block with a layer that is used twice in a forward pass."""

    def __init__(self, block):
        super().__init__()
        self.block, self.inner = block, nn.Linear(48, 48, bias=False)

    def forward(self, hidden_states, *args, **kwargs):
        out = self.block(hidden_states, *args, **kwargs)
        return out + self.inner(torch.tanh(self.inner(out)))


def reused():
    model = make("Llama").model
    model.layers[0] = Reused(model.layers[0])
    return model


def test_a_layer_that_is_used_twice_counts_both_inputs(tokenizer, texts):
    model = reused()
    rows = encoded_texts(texts[:6], tokenizer)
    seen = []
    model.layers[0].inner.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 48)))
    layers = find_targets(model, ["inner"])
    context = collect_encoded(model, rows, layers, pad_token_id=0, batch_size=1, stream=False)
    X = torch.cat(seen)
    assert context.token_count("layers.0.inner") == len(X) == 2 * sum(len(one) for one in rows)
    C = context.covariance("layers.0.inner")
    assert float((C - X.T @ X / len(X)).norm()) <= 1e-5 * float(C.norm())


def test_blocks_that_return_tuples_stream_as_others_do(tokenizer, texts):
    """Falcon's and GPT-2's older blocks returned tuples; a wrapper makes Llama's do so."""
    model = make("Llama").model

    class Tupled(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden_states, *args, **kwargs):
            return (self.block(hidden_states, *args, **kwargs), None)

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Tupled(block) for block in model.layers)
            self.embed_tokens, self.rotary = model.embed_tokens, model.rotary_emb
            self.config = model.config

        @property
        def base_model(self):
            return self

        def get_input_embeddings(self):
            return self.embed_tokens

        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
            x = self.embed_tokens(input_ids)
            places = torch.arange(x.shape[1])[None]
            for layer in self.layers:
                x = layer(x, position_embeddings=self.rotary(x, places), position_ids=places)[0]
            return x

    body = Body()
    rows, layers = encoded_texts(texts[:6], tokenizer), find_targets(body)
    one = collect_encoded(body, rows, layers, pad_token_id=0, batch_size=1)
    two = collect_encoded(body, rows, layers, pad_token_id=0, batch_size=1, stream=False)
    assert not one.warnings or not one.warnings[0].startswith("collected whole")
    for layer in layers:
        a, b = one.covariance(layer.name), two.covariance(layer.name)
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("family", ["Llama", "GPT-2 (Conv1D, tied weights)"])
def test_gradient_checkpointing_gives_the_same_gradients(family, tokenizer, texts):
    model = make(family)
    context = collect_encoded(model, encoded_texts(texts[:6], tokenizer), find_targets(model), pad_token_id=0)
    adapted, probe = attach(model, make_plan(model, context, rank=2)).train(), spread_probe(model)
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable()
        adapted.zero_grad()
        loss_of(adapted, probe).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad]))
    assert float(gradients[0].norm()) > 0
    assert float((gradients[0] - gradients[1]).norm()) <= 1e-5 * float(gradients[0].norm())


def test_tied_weights_are_adapted_by_the_head_alone(tokenizer, texts, tmp_path):
    """The head may be named; the embeddings that share its weight stay as they are, and merging is refused."""
    model = make("Llama, tied weights")
    embedded = model.get_input_embeddings().weight.detach().clone()
    context = collect_encoded(
        model, encoded_texts(texts[:6], tokenizer), find_targets(model, ["lm_head", "q_proj"]), pad_token_id=0
    )
    pristine = copy.deepcopy(model)
    adapted = attach(model, make_plan(model, context, rank=2))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    assert torch.equal(adapted.get_input_embeddings().weight, embedded)
    fresh = functools.partial(copy.deepcopy, pristine)
    assert export(adapted, tmp_path / "lora", fresh_base=fresh).max_relative_logit_difference <= 1e-5
    with pytest.raises(AdapterError, match="shares its weight with the input embeddings"):
        export(adapted, tmp_path / "merged", format="merged", fresh_base=fresh)


def test_compiled_models_are_refused_by_name():
    model = make("Llama")
    with pytest.raises(TargetError, match=r"compiled model.*compile what attach returns"):
        find_targets(torch.compile(model, backend="eager"))
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(TargetError, match=r"model\.layers\.1"):
        find_targets(model)


@pytest.mark.slow
def test_what_attach_returns_can_be_compiled(tokenizer, texts):
    model = make("Llama")
    context = collect_encoded(model, encoded_texts(texts[:6], tokenizer), find_targets(model), pad_token_id=0)
    adapted, probe = attach(model, make_plan(model, context, rank=2)), spread_probe(model)
    plain = probe_logits(adapted, probe)
    compiled = torch.compile(adapted, backend="eager")
    assert relative_difference(probe_logits(compiled, probe), plain) <= 1e-5


def test_the_table_in_the_docs_is_what_was_run():
    import runpy

    docs = RECORD.parent
    facts = json.loads(RECORD.read_text(encoding="utf-8"))
    page = (docs / "families.md").read_text(encoding="utf-8")
    rendered = runpy.run_path(str(docs / "families.py"))["rendered"]
    assert rendered(page, facts) == page
    assert set(FAMILIES) <= set(facts)
    assert {name for name in facts if name.endswith("(experts)")}
