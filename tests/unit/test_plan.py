"""CorDA++ on a live model: selection, allocation, budgets, and that per-layer ranks survive export and reload."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from corda import artifact, linalg
from corda.adapter import attach, relative_difference
from corda.context.collect import collect, collect_encoded
from corda.context.store import save
from corda.data.batches import encode
from corda.data.formats import to_records
from corda.errors import PlanError, RecipeError
from corda.exporting.export import export
from corda.metric import Metric, damping
from corda.plan import plan as plans
from corda.plan.compactness import compactness
from corda.plan.make import make_plan
from corda.plan.selection import candidate_score
from corda.targets import find_targets, weight_of

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])
UNIT = {"compactness_scale": "unit"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def rounds(model, tokenizer, texts):
    return collect(model, tokenizer, texts, samples=6, rounds=5)


def test_rounds_are_collected_apart_and_pooled_by_tokens(model, tokenizer, texts, rounds):
    encoded = [encode(record, tokenizer) for record in to_records([{"text": t} for t in texts])]
    assert rounds.rounds == 5
    layers = find_targets(model)
    every = collect_encoded(model, encoded, layers, pad_token_id=0)
    for layer in layers[::3]:
        parts = [rounds.covariance(layer.name, r) for r in range(5)]
        weights = [rounds.token_count(layer.name, r) for r in range(5)]
        mixed = sum(w * c for w, c in zip(weights, parts, strict=True)) / sum(weights)
        pooled = rounds.covariance(layer.name, None)
        assert torch.allclose(mixed, pooled, rtol=1e-5, atol=1e-6 * float(pooled.abs().max()))
        assert float((pooled - every.covariance(layer.name)).norm() / pooled.norm()) < 1e-5
        assert rounds.token_count(layer.name, None) == sum(map(len, encoded))


def test_dynamic_selection_takes_the_lowest_score_per_layer(model, rounds):
    plan = make_plan(model, rounds, mode="kpm", rank=4, selection="dynamic", **UNIT)
    for layer, spec in zip(plan.layers, rounds.layers, strict=True):
        scores = []
        for r in range(5):
            C = rounds.covariance(layer.name, r)
            spectrum = linalg.spectrum(weight_of(model, spec), Metric(C, 1.0, damping(C, 0.01)))
            scores.append(candidate_score(compactness(C, layer.d_out, scale="unit").log_pi, spectrum))
        assert layer.scores == pytest.approx(scores)
        assert layer.chosen == scores.index(min(scores))
    assert len({layer.chosen for layer in plan.layers}) > 1


def test_the_order_of_rounds_does_not_matter(model, rounds):
    from corda.context.capture import candidate

    order = [3, 0, 4, 1, 2]
    groups = set(rounds.groups.values())
    swap = {candidate(g, new): candidate(g, old) for g in groups for new, old in enumerate(order)}
    shuffled = replace(
        rounds,
        packed={new: rounds.packed[old] for new, old in swap.items()},
        tokens={new: rounds.tokens[old] for new, old in swap.items()},
    )
    one = make_plan(model, rounds, rank=4, selection="dynamic", **UNIT)
    two = make_plan(model, shuffled, rank=4, selection="dynamic", **UNIT)
    assert [layer.chosen for layer in one.layers] == [order[layer.chosen] for layer in two.layers]
    for name, (A, B) in one.factors.items():
        assert torch.equal(A, two.factors[name][0])
        assert torch.equal(B, two.factors[name][1])


def test_a_planted_candidate_is_picked(model, rounds):
    """Inputs with one strong direction over a low and even floor: a steep spectrum without tiny eigenvalues."""
    from corda.context.accumulator import pack_upper

    packed = dict(rounds.packed)
    for group, members in rounds.members().items():
        C = rounds.covariance(members[0].name, 0)
        values, vectors = torch.linalg.eigh(C)
        peaked = values.clone()
        peaked[:-1] = values[-1] * 0.01
        packed[f"{group}#2"] = pack_upper((vectors * peaked) @ vectors.T)
    plan = make_plan(model, replace(rounds, packed=packed), rank=4, selection="dynamic", **UNIT)
    assert {layer.chosen for layer in plan.layers} == {2}


def test_selection_with_unit_scale_is_free_of_a_common_factor(model, rounds):
    one = make_plan(model, rounds, rank=4, selection="dynamic", **UNIT)
    two = make_plan(model, scaled(rounds, 1e4), rank=4, selection="dynamic", **UNIT)
    assert [layer.chosen for layer in one.layers] == [layer.chosen for layer in two.layers]
    assert len({layer.chosen for layer in one.layers}) > 1
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.scores == pytest.approx(b.scores, rel=1e-4)


def test_selection_with_token_scale_depends_on_a_common_factor(model, rounds):
    """A steep candidate (large π, few directions) against a flat one: which scores lower is a matter of scale."""
    from corda.context.accumulator import pack_upper

    name = rounds.layers[0].name
    C = rounds.covariance(name, 0)
    values, vectors = torch.linalg.eigh(C)
    steep, flat = values.clone(), torch.full_like(values, float(values.mean()))
    steep[:-1] = values[-1] * 0.01
    packed = [pack_upper((vectors * v) @ vectors.T) for v in (steep, flat)]
    two = replace(rounds, layers=rounds.layers[:1], packed={name: packed[0], f"{name}#1": packed[1]}, rounds=2)

    def chosen(context, scale):
        settings = {"selection": "dynamic", "compactness_scale": scale, "target_modules": [name]}
        return make_plan(model, context, rank=4, **settings).layers[0]

    as_it_is = chosen(two, "token")
    log_pi = compactness(two.covariance(name, 1), two.layers[0].d_out).log_pi
    larger = scaled(two, float(torch.exp(torch.tensor(2 * (log_pi - 0.01)))))  # leaves log π = 0.01 to the flat one
    assert (as_it_is.chosen, chosen(larger, "token").chosen) == (0, 1)
    assert chosen(two, "unit").chosen == chosen(larger, "unit").chosen


def scaled(context, factor):
    return replace(context, packed={key: factor * packed for key, packed in context.packed.items()})


@pytest.mark.parametrize("selection", ["first", "pooled"])
def test_static_selection(model, rounds, selection):
    plan = make_plan(model, rounds, rank=4, selection=selection)
    taken = 0 if selection == "first" else None
    for layer in plan.layers[:5]:
        assert layer.chosen == taken
        C = rounds.covariance(layer.name, taken)
        spec = next(s for s in rounds.layers if s.name == layer.name)
        found = linalg.subspace(weight_of(model, spec), Metric(C, 1.0, damping(C, 0.01)), 4, "smallest")
        A, _, _ = linalg.factors(weight_of(model, spec), found, scaling=1.0, balance="equal")
        assert torch.equal(A, plan.factors[layer.name][0])


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_dynamic_ranks_stay_within_the_budget_and_use_it(model, rounds, mode):
    plan = make_plan(model, rounds, mode=mode, rank=4, allocation="dynamic", rank_cap=12, **UNIT)
    budget = sum(4 * (s.d_in + s.d_out) for s in rounds.layers)
    dearest = max(s.d_in + s.d_out for s in rounds.layers)
    assert budget - dearest < plan.trainable_parameters <= budget
    ranks = {layer.rank for layer in plan.layers}
    assert len(ranks) > 1
    assert min(ranks) >= 1
    assert max(ranks) <= 12
    given = make_plan(model, rounds, mode=mode, budget=5000, allocation="dynamic", rank_floor=2, **UNIT)
    assert 5000 - dearest < given.trainable_parameters <= 5000
    assert min(layer.rank for layer in given.layers) >= 2


def test_a_budget_in_parameters_without_allocation(model, rounds):
    per_rank = sum(s.d_in + s.d_out for s in rounds.layers)
    assert {layer.rank for layer in make_plan(model, rounds, budget=3 * per_rank + 5).layers} == {3}
    with pytest.raises(PlanError, match="below rank 1"):
        make_plan(model, rounds, budget=per_rank - 1)
    with pytest.raises(PlanError, match="ranks cannot be allocated"):
        make_plan(model, rounds, budget=per_rank, allocation="dynamic", rank_floor=2, **UNIT)


def test_a_log_that_is_not_positive_names_the_setting(model, rounds):
    large = scaled(rounds, 1e12)
    with pytest.raises(PlanError, match="compactness_scale: unit"):
        make_plan(model, large, rank=4, allocation="dynamic")
    same = [make_plan(model, c, rank=4, allocation="dynamic", **UNIT) for c in (rounds, large)]
    assert [p.rank for p in same[0].layers] == [p.rank for p in same[1].layers]


def test_each_switch_works_alone(model, rounds):
    plain = make_plan(model, rounds, rank=4)
    selected = make_plan(model, rounds, rank=4, selection="dynamic", **UNIT)
    allocated = make_plan(model, rounds, rank=4, allocation="dynamic", **UNIT)
    both = make_plan(model, rounds, rank=4, selection="dynamic", allocation="dynamic", **UNIT)
    assert {layer.rank for layer in plain.layers} == {layer.rank for layer in selected.layers} == {4}
    assert {layer.chosen for layer in allocated.layers} == {0}
    assert {layer.chosen for layer in both.layers} != {0}
    assert len({layer.rank for layer in both.layers}) > 1
    with pytest.raises(RecipeError, match="needs covariances"):
        make_plan(model, rounds.layers, mode="lora", allocation="dynamic")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 6.0}, {"lora_alpha": 3.0}])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_per_layer_ranks_survive_export_and_reload(model, pico, rounds, tmp_path, mode, settings):
    reference = logits(model)
    plan = make_plan(model, rounds, mode=mode, rank=4, allocation="dynamic", rank_cap=10, **UNIT, **settings)
    wrapped = attach(model, plan)
    assert torch.equal(logits(wrapped), reference)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == plan.trainable_parameters
    wrapped.save_pretrained(str(tmp_path / "a"))
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "a")).eval()
    assert relative_difference(logits(reloaded), logits(wrapped)) < 1e-5
    assert len({layer.rank for layer in plan.layers}) > 2
    exported = export(wrapped, tmp_path / "out")
    assert exported.rank == 2 * max(layer.rank for layer in plan.layers)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), str(tmp_path / "out"))
    check_ranks(reloaded, plan)
    check_ranks(again, plan, scaling=1.0)  # an export has it folded into B


def check_ranks(reloaded, plan, scaling=None):
    """Every layer of the plan has exactly twice its rank (its start is subtracted), and no other layer has any."""
    for layer in plan.layers:
        module = reloaded.base_model.model.get_submodule(layer.name)
        assert module.r["default"] == 2 * layer.rank, layer.name
        assert tuple(module.lora_A["default"].weight.shape) == (2 * layer.rank, layer.d_in)
        assert module.scaling["default"] == pytest.approx(scaling or plan.scaling(layer.rank))
    adapted = [name for name, m in reloaded.base_model.model.named_modules() if hasattr(m, "lora_A")]
    assert sorted(adapted) == sorted(layer.name for layer in plan.layers)


class Towers(PreTrainedModel):
    """As in vision-language models: `layers.0.q` is a layer, and the end of `vision.layers.0.q`."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        torch.manual_seed(0)
        self.vision = nn.ModuleDict({"layers": self._tower(9, 7)})
        self.layers = self._tower(7, 5)
        self.post_init()

    def _tower(self, wide, narrow):
        def block():
            return nn.ModuleDict({"q": nn.Linear(wide, narrow, bias=False), "o": nn.Linear(narrow, wide, bias=False)})

        return nn.ModuleList([block() for _ in range(2)])

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=3.0)

    def forward(self, pixels, **_):
        x = pixels
        for block in self.vision["layers"]:
            x = x + block["o"](block["q"](x).tanh())
        x = x[..., :7]
        for block in self.layers:
            x = x + block["o"](block["q"](x).tanh())
        return ModelOutput(logits=x)


@pytest.mark.parametrize("left_out", [(), ("vision.layers.0.q", "layers.1.o")])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@torch.no_grad()
def test_colliding_names_survive_export_and_reload(tmp_path, mode, left_out):
    tower = Towers(PretrainedConfig()).eval()
    specs = [spec for spec in find_targets(tower, ".*") if spec.name not in left_out]
    context = made_up(specs)
    ranks = {spec.name: 1 + i % spec.max_rank for i, spec in enumerate(specs)}
    plan = make_plan(tower, context, mode=mode, rank=2, ranks=ranks)
    assert {layer.name: layer.rank for layer in plan.layers} == ranks
    pixels = {"pixels": 2.5 * torch.randn(3, 4, 9)}
    reference = tower(**pixels).logits
    wrapped = attach(tower, plan)
    assert torch.equal(wrapped(**pixels).logits, reference)
    for layer in plan.layers:
        assert wrapped.base_model.model.get_submodule(layer.name).r["default"] == layer.rank
    for p in wrapped.parameters():
        if p.requires_grad:
            p += 0.05 * torch.randn_like(p)
    export(wrapped, tmp_path / "out", fresh_base=lambda: Towers(PretrainedConfig()).eval(), probe=pixels)
    reloaded = PeftModel.from_pretrained(Towers(PretrainedConfig()).eval(), str(tmp_path / "out"))
    assert relative_difference(reloaded(**pixels).logits, wrapped(**pixels).logits) < 1e-5
    check_ranks(reloaded, plan)


def made_up(specs):
    """A context with a random covariance for each layer."""
    from corda.context.accumulator import pack_upper
    from corda.context.store import Context

    generator = torch.Generator().manual_seed(1)
    packed = {}
    for spec in specs:
        X = 4 * torch.randn(spec.d_in, 40, generator=generator)
        packed[spec.name] = pack_upper(X @ X.T / 40)
    return Context(tuple(specs), {s.name: s.name for s in specs}, dict.fromkeys(packed, 40), packed)


def test_short_names_that_collide_get_their_own_rank():
    """A tree as in vision-language models, where one tower's layer name is the end of another's."""
    from corda.lora_config import lora_config
    from corda.plan.plan import LayerPlan, Plan
    from corda.recipe import AdapterOptions

    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 5, bias=False)}) for _ in range(2)])
            self.vision = nn.ModuleDict(
                {"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(6, 5, bias=False)}) for _ in range(2)])}
            )

    tree = Tree()
    names = ["layers.0.q", "layers.1.q", "vision.layers.0.q", "vision.layers.1.q"]
    ranks = [1, 2, 3, 4]
    layers = tuple(LayerPlan(n, "linear", 5, 6, r) for n, r in zip(names, ranks, strict=True))
    plan = Plan(AdapterOptions(mode="lora", rank=1), layers)
    config = lora_config(tree, plan)
    wrapped = PeftModel(tree, config)
    for name, rank in zip(names, ranks, strict=True):
        assert wrapped.base_model.model.get_submodule(name).r["default"] == rank
    some = Plan(AdapterOptions(mode="lora", rank=1), layers[:1])
    only = PeftModel(Tree(), lora_config(Tree(), some))
    assert hasattr(only.base_model.model.get_submodule("layers.0.q"), "lora_A")
    assert not hasattr(only.base_model.model.get_submodule("vision.layers.0.q"), "lora_A")


def test_plan_and_rounds_survive_the_disk(model, rounds, tmp_path):
    loaded = save(rounds, tmp_path / "context", "k", {})
    plan = make_plan(model, loaded, rank=4, selection="dynamic", allocation="dynamic", **UNIT)
    again = plans.load(plans.save(plan, tmp_path / "plan", "k", {}, {}))
    assert again.layers == plan.layers
    assert artifact.read(tmp_path / "plan", "plan")
