"""Modes dual and contrast on a live model: both sides collected, directions, allocation, attaching, exporting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from scipy import linalg as scipy_linalg
from transformers import AutoModelForCausalLM

from corda import linalg, pipeline, tradeoff
from corda.adapter import attach, relative_difference
from corda.context.collect import collect, collect_encoded
from corda.context.store import load, save
from corda.data.batches import encode
from corda.data.formats import to_records
from corda.errors import AdapterError, ArtifactError, PlanError, RecipeError
from corda.exporting.export import export
from corda.forms import INITIAL
from corda.journal import Journal
from corda.metric import Metric
from corda.plan import plan as plans
from corda.plan.make import make_plan
from corda.plan.weigh import allocate_by_theta
from corda.reading import parse_adapter, parse_recipe
from corda.targets import find_targets, weight_of

IDS = torch.tensor([[5, 9, 100, 33, 7, 250, 41], [77, 3, 8, 160, 161, 12, 90]])
SUMS = [f"Add {i} and {3 * i + 2}: {i} + {3 * i + 2} = {4 * i + 2}." for i in range(30)]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def with_random_b(adapted, size=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B.default" in name:
                parameter.add_(size * torch.randn_like(parameter))
    return adapted


@pytest.fixture
def both(model, tokenizer, texts):
    return collect(model, tokenizer, texts, learn=SUMS, samples=10, rounds=2)


def test_both_sides_are_collected_as_if_alone(model, tokenizer, texts, both, tmp_path):
    assert (both.rounds, both.sides) == (2, ("learn", "learn"))
    alone = collect(model, tokenizer, SUMS, samples=10, rounds=2)
    kept = collect(model, tokenizer, texts, samples=10, rounds=2)
    stored = save(both, tmp_path / "context", "k", {})
    for context in (both, stored):
        task = context.side("learn")
        for layer in both.layers[::4]:
            for round_ in (0, 1, None):
                for one, other in ((task, alone), (context, kept)):
                    assert one.token_count(layer.name, round_) == other.token_count(layer.name, round_)
                    C, D = one.covariance(layer.name, round_), other.covariance(layer.name, round_)
                    assert torch.allclose(C, D, rtol=1e-5, atol=1e-6 * float(D.abs().max()))
    with pytest.raises(ArtifactError, match=r"lacks a source.*data\.keep"):
        both.side("held_out")


@pytest.mark.parametrize("stream", [True, False])
def test_streaming_and_a_journal_change_nothing_for_two_sides(model, tokenizer, texts, stream, tmp_path):
    def encoded(some):
        return [encode(record, tokenizer) for record in to_records([{"text": t} for t in some])]

    layers = find_targets(model)
    options = {"pad_token_id": 0, "sides": ["learn", "held_out"], "stream": stream}
    rounds = [encoded(texts[:10]), encoded(SUMS[:12]), encoded(texts[10:14])]
    plain = collect_encoded(model, rounds, layers, **options)
    noted = collect_encoded(model, rounds, layers, journal=Journal(tmp_path / "j", "k"), **options)
    assert plain.sides == noted.sides == ("learn", "held_out")
    assert noted.side("held_out").token_count(layers[0].name) == sum(map(len, rounds[2]))
    for layer in layers:
        for side in ("learn", "held_out"):
            C, D = plain.side(side).covariance(layer.name), noted.side(side).covariance(layer.name)
            assert torch.allclose(C, D, rtol=1e-5, atol=1e-6 * float(D.abs().max()))


def test_contrast_takes_the_generalised_eigenvectors_of_the_inputs(model, both):
    plan = make_plan(model, both, mode="contrast", rank=5, mu=0.5, row_norm=0.3)
    task = both.side("learn")
    for layer in plan.layers:
        A, B = plan.factors[layer.name]
        C_t, C_k = task.covariance(layer.name, 0).double().numpy(), both.covariance(layer.name, 0).double().numpy()
        E = C_k / np.trace(C_k) + 0.5 / len(C_k) * np.eye(len(C_k))
        theta = scipy_linalg.eigh(C_t / np.trace(C_t), E, eigvals_only=True)[::-1]
        along = [np.einsum("ri,ij,rj->r", A.numpy(), M, A.numpy()) for M in (C_t / np.trace(C_t), E)]
        assert np.allclose(along[0] / along[1], theta[:5], rtol=1e-3)
        assert (A.shape, B.shape) == ((5, layer.d_in), (layer.d_out, 5))
        assert not B.any()
        assert torch.allclose(A.norm(dim=1), torch.full((5,), 0.3))
        assert layer.theta == pytest.approx((theta[0], theta[4]), rel=1e-6)
        assert 0 < layer.energy < layer.task_energy < 1
        assert np.allclose(plan.weighed[f"{layer.name}.theta"], theta, rtol=1e-4, atol=1e-6 * theta[0])
        spectrum = np.linalg.eigvalsh(C_k / np.trace(C_k))[::-1]
        assert np.allclose(plan.weighed[f"{layer.name}.knowledge"], spectrum, atol=1e-5)
    assert plan.trainable_parameters == sum(5 * layer.d_out for layer in plan.layers)
    assert make_plan(model, both, mode="contrast", rank=5, train_a=True).trainable_parameters == sum(
        5 * (layer.d_out + layer.d_in) for layer in plan.layers
    )


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_dual_projects_onto_generalised_eigenvectors_of_the_outputs(model, both, exponent):
    plan = make_plan(model, both, mode="dual", rank=4, exponent=exponent)
    for layer, spec in list(zip(plan.layers, both.layers, strict=True))[::3]:
        W = weight_of(model, spec).double()
        G = []
        for context in (both.side("learn"), both):
            M = Metric(context.covariance(layer.name, 0).double(), exponent, 0.0).root(linalg.reduce(W).R)
            G.append((M @ M.T / (M @ M.T).trace()).numpy())
        n = len(G[0])
        values, vectors = scipy_linalg.eigh(G[0], G[1] + 0.1 / n * np.eye(n))
        U = torch.linalg.qr(linalg.reduce(W).lift(torch.from_numpy(vectors[:, ::-1][:, :4].copy())))[0]
        A, B = (factor.double() for factor in plan.factors[layer.name])
        assert float((B @ A - U @ U.T @ W).norm() / W.norm()) < 1e-5
        assert layer.theta == pytest.approx((values[-1], values[-4]), rel=1e-5)


@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_the_scale_is_a_setting(model, both, mode):
    plans_ = [make_plan(model, both, mode=mode, rank=4, normalise=how) for how in ("trace", "median")]
    name = plans_[0].layers[0].name
    assert not torch.allclose(plans_[0].factors[name][0], plans_[1].factors[name][0], atol=1e-3)
    assert all(0 < layer.energy < 1 and 0 < layer.task_energy < 1 for layer in plans_[1].layers)
    if mode == "contrast":
        moments = [tradeoff.unit_median(c.covariance(name, 0)) for c in (both.side("learn"), both)]
        expected = tradeoff.directions(*moments, 4).values
        assert plans_[1].layers[0].theta == pytest.approx((float(expected[0]), float(expected[-1])), rel=1e-6)


@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_a_singular_knowledge_and_fewer_tokens_than_inputs(model, tokenizer, texts, mode):
    context = collect(model, tokenizer, texts[:1], learn=SUMS[:1], samples=1)
    assert context.token_count(context.layers[0].name) < min(layer.d_in for layer in context.layers)
    plan = make_plan(model, context, mode=mode, rank=4)
    assert all(torch.isfinite(factor).all() for pair in plan.factors.values() for factor in pair)
    adapted = attach(model, plan)
    assert torch.isfinite(logits(adapted)).all()


def test_only_b_is_trained_whatever_peft_switches_on_and_off(model, both):
    base = logits(model)
    adapted = attach(model, make_plan(model, both, mode="contrast", rank=4))
    assert torch.equal(logits(adapted), base)
    assert INITIAL not in adapted.peft_config

    def trainable():
        return {name.rsplit(".", 3)[1] for name, p in adapted.named_parameters() if p.requires_grad}

    assert trainable() == {"lora_B"}
    with_random_b(adapted)
    moved = logits(adapted)
    assert not torch.allclose(moved, base)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), base)
    assert trainable() == {"lora_B"}
    with pytest.raises(KeyboardInterrupt), adapted.disable_adapter():
        raise KeyboardInterrupt
    assert trainable() == {"lora_B"}
    adapted.set_adapter("default")
    assert trainable() == {"lora_B"}
    assert torch.equal(logits(adapted), moved)


def test_train_a_trains_both(model, both):
    adapted = attach(model, make_plan(model, both, mode="contrast", rank=4, train_a=True))
    kinds = {name.rsplit(".", 3)[1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B"}


@pytest.mark.parametrize("alpha", [None, 12])
def test_knowledge_moves_by_no_more_than_the_bound(model, both, alpha):
    adapted = with_random_b(attach(model, make_plan(model, both, mode="contrast", rank=4, lora_alpha=alpha)))
    s = 1 if alpha is None else alpha / 4
    for layer in both.layers:
        module = adapted.base_model.model.get_submodule(layer.name)
        A, B = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        assert module.scaling["default"] == s
        C = both.covariance(layer.name, 0).double()
        values, vectors = torch.linalg.eigh(C)
        X = vectors * values.clamp_min(0).sqrt()
        moved, allowed = s * (B @ A @ X).norm(), s * torch.linalg.matrix_norm(B, 2) * (A @ X).norm()
        assert 0 < moved <= allowed * (1 + 1e-9)


@pytest.mark.parametrize("form", ["lora", "merged"])
@pytest.mark.parametrize("layout", ["patterns", "uniform"])
def test_contrast_exports_at_its_own_rank(pico, model, both, form, layout, tmp_path):
    if (form, layout) == ("merged", "uniform"):
        pytest.skip("full weights have no layout")
    plan = make_plan(model, both, mode="contrast", rank=4, allocation="dynamic")
    adapted = with_random_b(attach(model, plan))
    settings = {"layout": layout} if form == "lora" else {}
    done = export(adapted, tmp_path / "out", format=form, **settings)
    assert done.max_relative_logit_difference <= 1e-5
    base = AutoModelForCausalLM.from_pretrained(pico if form == "lora" else tmp_path / "out", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")) if form == "lora" else base
    assert relative_difference(logits(loaded.eval()), logits(adapted)) <= 1e-5
    if form == "lora":
        assert done.rank == max(layer.rank for layer in plan.layers)
        ranks = {layer.name: layer.rank for layer in plan.layers}
        for name, rank in ranks.items():
            held = loaded.base_model.model.get_submodule(name).lora_A["default"].weight.shape[0]
            assert held == (rank if layout == "patterns" else done.rank)


def test_contrast_has_no_residual_to_export(model, both, tmp_path):
    adapted = with_random_b(attach(model, make_plan(model, both, mode="contrast", rank=4)))
    with pytest.raises(AdapterError, match="no residual base"):
        export(adapted, tmp_path / "out", format="residual")


def test_a_checkpoint_of_contrast_is_a_plain_lora_and_loads_back(pico, model, both, tmp_path):
    plan = make_plan(model, both, mode="contrast", rank=4)
    adapted = with_random_b(attach(model, plan))
    moved = logits(adapted)
    adapted.save_pretrained(str(tmp_path / "checkpoint"))
    other = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32)
    again = attach(other, plan)
    again.load_adapter(str(tmp_path / "checkpoint"), "default", is_trainable=True)
    assert torch.equal(logits(again.eval()), moved)
    assert {name.rsplit(".", 3)[1] for name, p in again.named_parameters() if p.requires_grad} == {"lora_B"}


@pytest.mark.parametrize("directions", ["random", "task", "null", "combination"])
@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_controls_are_settings(model, both, directions, mode):
    plan = make_plan(model, both, mode=mode, rank=4, directions=directions)
    other = make_plan(model, both, mode=mode, rank=4)
    name = plan.layers[0].name
    A, B = plan.factors[name], other.factors[name]
    assert A[0].shape == B[0].shape
    assert not torch.allclose(A[0], B[0], atol=1e-2)
    if mode == "contrast":  # the task has something in each, whatever the directions were ordered by
        assert not [layer.name for layer in plan.layers if layer.dead]
        assert not [note for note in plan.warnings if "the task has nothing" in note]
    if directions == "task" and mode == "contrast":
        values = torch.linalg.eigvalsh(tradeoff.unit_trace(both.side("learn").covariance(name, 0)))
        assert plan.layers[0].theta == pytest.approx((float(values[-1]), float(values[-4])), rel=1e-6)
    if directions == "random":
        seeds = [make_plan(model, both, mode=mode, rank=4, directions="random", seed=s).factors[name] for s in (0, 1)]
        assert torch.equal(seeds[0][0], A[0])
        assert not torch.allclose(seeds[1][0], A[0], atol=1e-2)


@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_ranks_go_where_theta_per_parameter_is_largest(model, both, mode):
    options = {"mode": mode, "rank": 4, "allocation": "dynamic", "rank_floor": 2, "rank_cap": 9}
    plan = make_plan(model, both, **options)
    uniform = make_plan(model, both, mode=mode, rank=4)
    cost = {layer.name: layer.parameters // layer.rank for layer in plan.layers}
    slack = max(cost.values())
    assert uniform.trainable_parameters - slack < plan.trainable_parameters <= uniform.trainable_parameters
    ranks = {layer.name: layer.rank for layer in plan.layers}
    assert set(ranks.values()) != {4}
    assert all(2 <= rank <= 9 for rank in ranks.values())
    thetas = {layer.name: plan.weighed[f"{layer.name}.theta"].double() / cost[layer.name] for layer in plan.layers}
    taken = [float(thetas[name][r - 1]) for name, r in ranks.items() if r > 2]
    left = [float(thetas[name][r]) for name, r in ranks.items() if r < 9 and r < len(thetas[name])]
    assert min(taken) >= max(left) * (1 - 1e-5)


def test_the_sort_is_the_greedy_loop():
    torch.manual_seed(0)
    thetas = [torch.rand(n, dtype=torch.float64).sort(descending=True).values for n in (5, 9, 7)]
    costs, budget = [3, 5, 4], 47
    ranks = [1, 1, 1]
    while True:
        best = max((i for i in range(3) if ranks[i] < len(thetas[i])), key=lambda i: thetas[i][ranks[i]] / costs[i])
        if sum(c * r for c, r in zip(costs, ranks, strict=True)) + costs[best] > budget:
            break
        ranks[best] += 1
    assert allocate_by_theta(thetas, costs, budget) == ranks
    with pytest.raises(ValueError, match="below 12"):
        allocate_by_theta(thetas, costs, 11)


@pytest.mark.parametrize("selection", ["first", "pooled", "dynamic"])
@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_selection_chooses_among_the_knowledges_candidates(model, both, mode, selection):
    plan = make_plan(model, both, mode=mode, rank=4, selection=selection, compactness_scale="unit")
    kpm = make_plan(model, both, mode="kpm", rank=4, selection=selection, compactness_scale="unit")
    assert [layer.chosen for layer in plan.layers] == [layer.chosen for layer in kpm.layers]
    assert [layer.scores for layer in plan.layers] == [layer.scores for layer in kpm.layers]
    layer = plan.layers[3]
    if mode == "contrast":
        task = both.side("learn").covariance(layer.name, 0 if selection == "first" else None)
        T, K = (tradeoff.unit_trace(C) for C in (task, both.covariance(layer.name, layer.chosen)))
        expected = tradeoff.directions(T, K, 4).values
        assert layer.theta == pytest.approx((float(expected[0]), float(expected[-1])), rel=1e-6)


def test_an_interrupted_plan_continues_with_the_same_bytes(model, both, tmp_path, monkeypatch):
    options = {"mode": "contrast", "rank": 4, "allocation": "dynamic"}
    whole = make_plan(model, both, **options)
    done: list[str] = []
    original = Journal.put

    def put(self, key, tensors, facts):
        if len(done) == 11:
            done.append("interrupt")
            raise KeyboardInterrupt
        done.append(key)
        original(self, key, tensors, facts)

    monkeypatch.setattr(Journal, "put", put)
    with pytest.raises(KeyboardInterrupt):
        make_plan(model, both, journal=Journal(tmp_path / "j", "k"), **options)
    again = make_plan(model, both, journal=Journal(tmp_path / "j", "k"), **options)
    assert len(set(done)) == len(done)
    assert again.as_json() == whole.as_json()
    for name, pair in whole.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, again.factors[name], strict=True))
    assert all(torch.equal(again.weighed[key], tensor) for key, tensor in whole.weighed.items())
    stored = plans.load(plans.save(whole, tmp_path / "plan", "k", {}, {}))
    assert stored.layers == whole.layers
    assert set(stored.weighed) == set(whole.weighed)


def test_ranks_by_hand_hold_in_contrast_too(model, both):
    name = both.layers[1].name
    plan = make_plan(model, both, mode="contrast", rank=4, ranks={name: {"rank": 7, "round": 1}})
    layer = next(one for one in plan.layers if one.name == name)
    assert (layer.rank, layer.chosen, layer.edited) == (7, 1, True)
    assert plan.factors[name][0].shape[0] == 7
    T = tradeoff.unit_trace(both.side("learn").covariance(name, 0))
    expected = tradeoff.directions(T, tradeoff.unit_trace(both.covariance(name, 1)), 7).values
    assert layer.theta == pytest.approx((float(expected[0]), float(expected[-1])), rel=1e-6)


def test_a_mode_of_two_contexts_needs_both(model, tokenizer, texts):
    alone = collect(model, tokenizer, texts, samples=10)
    with pytest.raises(ArtifactError, match=r"lacks a source.*Where: learn"):
        make_plan(model, alone, mode="contrast", rank=4)


def test_an_input_of_zeros_is_named(model, both, tmp_path):
    stored = save(both, tmp_path / "c", "k", {})
    zero = {key: torch.zeros_like(t) if "down_proj" in key else t for key, t in both.packed.items()}
    broken = type(stored)(both.layers, both.groups, both.tokens, zero, (), both.rounds, both.sides)
    with pytest.raises(PlanError, match=r"cannot be weighed.*down_proj.*trace"):
        make_plan(model, broken, mode="contrast", rank=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "kpm", "directions": "task"}, "modes contrast and dual only"),
        ({"mode": "contrast", "directions": "null", "allocation": "dynamic"}, "goes by θ"),
        ({"mode": "dual", "train_a": False}, "frozen in mode contrast only"),
        ({"mode": "contrast", "base": "residual"}, "no residual"),
        ({"mode": "dual", "exponent": 0}, "exponent 0.5 or 1"),
        ({"mode": "dual", "balance": "sigma"}, "balance 'equal'"),
        ({"mode": "contrast", "mu": 0}, "greater than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        parse_adapter(change)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"data": {"keep": None}}, r"mode contrast collects its context from data\.keep"),
        ({"training": {"decay_to_init": 0.1}}, "initial factors, which mode contrast has not"),
        ({"export": {"format": "residual"}}, "initial factors, which mode contrast has not"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(raw_recipe, block, message):
    raw_recipe["adapter"]["mode"] = "contrast"
    for name, values in block.items():
        raw_recipe.setdefault(name, {}).update(values)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw_recipe)


@pytest.mark.parametrize("mode", ["dual", "contrast"])
def test_offloading_changes_nothing(raw_recipe, tmp_path, mode):
    raw_recipe["adapter"] |= {"mode": mode, "allocation": "dynamic"}
    raw_recipe["context"] |= {"rounds": 1, "held_out": 2}
    whole = pipeline.run(parse_recipe(raw_recipe))
    raw_recipe["output_dir"] = str(tmp_path / "offloaded")
    raw_recipe["context"]["offload"] = True
    offloaded = pipeline.run(parse_recipe(raw_recipe))
    ranks = [[layer["rank"] for layer in run["plan"]["layers"]] for run in (whole, offloaded)]
    assert ranks[0] == ranks[1]
    assert offloaded["train"]["loss"] == pytest.approx(whole["train"]["loss"], rel=1e-4)
    assert offloaded["drift"]["total"] == pytest.approx(whole["drift"]["total"], rel=1e-3)


def test_a_resumed_training_keeps_a_frozen_and_its_curve(raw_recipe, tmp_path, monkeypatch):
    import trl
    from transformers import TrainerCallback

    raw_recipe["adapter"]["mode"] = "contrast"
    raw_recipe["training"] |= {"max_steps": 6, "save_steps": 2, "drift_steps": 1}
    straight = pipeline.run(parse_recipe(raw_recipe | {"output_dir": str(tmp_path / "straight")}))

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    original = trl.SFTTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(
            trl.SFTTrainer, "__init__", lambda self, *a, **k: original(self, *a, callbacks=[Interrupt()], **k)
        )
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(parse_recipe(raw_recipe))
    resumed = pipeline.run(parse_recipe(raw_recipe))
    assert resumed["train"]["drift_step"] == straight["train"]["drift_step"] == [1, 2, 3, 4, 5, 6]
    assert resumed["train"]["drift"] == pytest.approx(straight["train"]["drift"], rel=1e-3)
    assert resumed["train"]["loss"] == pytest.approx(straight["train"]["loss"], rel=1e-4)
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    planned = load_file(tmp_path / "run" / "plan" / "factors.safetensors")
    for name, tensor in exported.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert torch.equal(tensor, planned[f"{layer}.A"])


def test_collected_covariances_serve_every_setting_of_the_adapter(raw_recipe, monkeypatch):
    calls = []
    original = pipeline.collect.collect_encoded
    monkeypatch.setattr(pipeline.collect, "collect_encoded", lambda *a, **k: calls.append(1) or original(*a, **k))
    raw_recipe["adapter"]["mode"] = "contrast"
    pipeline.run(parse_recipe(raw_recipe))
    for change in ({"mu": 0.1}, {"directions": "task"}, {"train_a": True}, {"orthonormal": True}):
        raw_recipe["adapter"] |= change
        pipeline.run(parse_recipe(raw_recipe))
    assert len(calls) == 1


def test_peft_s_preprocessing_says_where_two_contexts_are(model, texts):
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig

    from corda.compat import preprocess_corda

    config = LoraConfig(init_lora_weights="corda", target_modules=["q_proj"], corda_config=CordaConfig())
    config.corda_config.corda_method = "contrast"
    with pytest.raises(RecipeError, match=r"that mode two.*collect\(..., learn=...\)"):
        preprocess_corda(model, config, run_model=lambda: model(input_ids=IDS))


def test_the_stored_context_tells_its_sides(both, tmp_path):
    from corda import artifact
    from corda.inspecting import context_facts

    save(both, tmp_path / "context", "k", {})
    found = load(artifact.read(tmp_path / "context", "context"))
    assert found.sides == ("learn", "learn")
    facts = context_facts(tmp_path / "context")
    sides = {one["side"] for one in facts["inputs"]}
    assert sides == {"", "learn"}
    assert len(facts["inputs"]) == 2 * len(both.members())
    for one in facts["inputs"]:
        context = both.side("learn") if one["side"] else both
        assert one["tokens"] == [context.token_count(one["layers"][0], r) for r in range(2)]


def test_the_command_line_shows_both_contexts(raw_recipe, write_recipe, tmp_path):
    import yaml
    from typer.testing import CliRunner

    from corda.cli import app

    raw_recipe["adapter"] |= {"mode": "contrast", "allocation": "dynamic"}
    recipe = str(write_recipe(raw_recipe))

    def call(*arguments):
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    call("plan", recipe, "--save-ranks", str(tmp_path / "ranks.yaml"))
    ranks = yaml.safe_load((tmp_path / "ranks.yaml").read_text())
    assert len(set(ranks.values())) > 1
    assert "(learn)" in call("inspect", "context", recipe)
    assert "(held_out)" in call("inspect", "context", recipe)
    call("inspect", "plan", recipe)
    call("inspect", "plan", recipe, "--html")
    assert "Task against knowledge" in (tmp_path / "run" / "plan.html").read_text()
