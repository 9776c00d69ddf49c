"""Figures and tables of a comparison, from a comparison.json that is written here."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

from corda.comparing.conclusions import conclusions
from corda.comparing.study import parse_study
from corda.report.bent import Bent
from corda.report.comparison import _plain, best_table, write_comparison
from corda.report.front import convergence, learning_forgetting
from corda.report.metered import drift_against_rise

STUDY = {
    "output_dir": "unused",
    "base": {},
    "learn": "sums/answer_loss",
    "development": "sums_dev/answer_loss",
    "keep": ["facts/answer_loss", "stories/perplexity", "choices/accuracy"],
    "unseen": ["stories", "choices"],
    "methods": ["lora", "kpm"],
    "learning_rates": [1e-3, 3e-3, 4e-2],
    "seeds": [0],
}
BASE = {"facts": 0.37, "stories": 8.0, "choices": 0.7, "sums": 4.0, "sums_dev": 4.1}
KIND = {"stories": "perplexity", "choices": "accuracy"}
AFTER = {
    "lora": [(2.0, 0.39, 9.0, 0.71), (1.5, 0.9, 30.0, 0.65), (1.2, 9.0, 50_000.0, 0.5)],
    "kpm": [(2.1, 0.36, 7.9, 0.7), (1.6, 0.5, 12.0, 0.66), (1.3, 1.4, 25.0, 0.6)],
}


def scores(**values: float) -> dict:
    return {f"{k}/{KIND.get(k, 'answer_loss')}": {"value": v, "stderr": 0.04 * v, "n": 90} for k, v in values.items()}


@pytest.fixture
def comparison() -> dict:
    study, before = parse_study(STUDY), scores(**BASE)
    runs = []
    for method, all_after in AFTER.items():
        for rate, (sums, facts, stories, choices) in zip(STUDY["learning_rates"], all_after, strict=True):
            after = scores(sums=sums, sums_dev=sums + 0.01, facts=facts, stories=stories, choices=choices)
            moved = {k: {"value": a["value"] - before[k]["value"], "stderr": a["stderr"]} for k, a in after.items()}
            runs.append(
                {
                    "method": method,
                    "learning_rate": rate,
                    "seed": 0,
                    "variant": {},
                    "extension": False,
                    "status": "done",
                    "scores": {"before": before, "after": after},
                    "change": moved,
                    "retained": {name: 90.0 for name in STUDY["keep"]},
                    "drift": {"total": rate, "rms": rate, "held_out": rate},
                    "curve": {"step": [1, 2, 3], "loss": [4.0, 3.0, sums]},
                    "timing": {"train": 3.0},
                    "memory": {},
                    "trainable_parameters": 640,
                }
            )
    return {
        "study": study.model_dump(mode="json", exclude={"output_dir", "base", "overrides"}),
        "recipe": {},
        "labels": {"lora": "LoRA", "kpm": "CorDA-KPM"},
        "trainable_parameters": 640,
        "runs": runs,
        "empty": [],
        "conclusions": conclusions(study, runs),
        "device": "cpu",
        "provenance": {},
    }


@pytest.mark.parametrize("keep", STUDY["keep"])
def test_a_front_goes_through_its_own_points(comparison: dict, keep: str) -> None:
    figure = learning_forgetting(comparison, keep)
    drawn = {(trace.name, trace.mode): set(zip(trace.x, trace.y, strict=True)) for trace in figure.data}
    for name in ("LoRA", "CorDA-KPM"):
        line = drawn[name, "lines"]
        assert len(line) > 1
        for x, y in line:
            assert any(math.isclose(x, a) and math.isclose(y, b) for a, b in drawn[name, "markers"])


@pytest.mark.parametrize("keep", STUDY["keep"])
def test_every_tick_says_the_value_that_lies_there(comparison: dict, keep: str) -> None:
    for figure in (learning_forgetting(comparison, keep), drift_against_rise(comparison, keep)):
        axis = figure.layout.yaxis
        heights = [y for trace in figure.data if trace.mode == "markers" for y in trace.y]
        assert list(axis.tickvals) == sorted(axis.tickvals)
        assert axis.tickvals[-1] > 0.6 * max(heights)
        values = [float(text) for text in axis.ticktext]
        unit = values[-1] / math.sinh(axis.tickvals[-1])
        for place, value in zip(axis.tickvals, values, strict=True):
            assert math.sinh(place) * unit == pytest.approx(value, rel=0.02)


def test_error_bars_end_where_the_error_does(comparison: dict) -> None:
    keep = "stories/perplexity"
    trace = next(t for t in learning_forgetting(comparison, keep).data if t.name == "LoRA" and t.mode == "markers")
    bent = Bent.of([0.04] * 3)  # 0.04 of every perplexity, so of the loss
    for y, up, down, (_, _, after, _) in zip(
        trace.y, trace.error_y.array, trace.error_y.arrayminus, AFTER["lora"], strict=True
    ):
        rise = math.log(after / BASE["stories"])
        assert (y, y + up, y - down) == pytest.approx((bent(rise), bent(rise + 0.04), bent(rise - 0.04)))


def test_the_axis_is_linear_below_the_errors_and_logarithmic_beyond() -> None:
    bent = Bent.of([0.034, 0.05, 0.7])
    assert bent.unit == pytest.approx(0.01)
    assert bent(0.002) / bent(0.001) == pytest.approx(2, rel=0.01)
    assert bent(-7.0) == -bent(7.0)
    assert bent(40.0) - bent(4.0) == pytest.approx(math.log(10), rel=1e-3)
    assert Bent.of([]).unit > 0


@pytest.mark.parametrize("values", [[-0.5, -3.0], [0.0], [0.004, 900.0], [-0.2, 20.0]])
def test_ticks_cover_both_signs(values: list[float]) -> None:
    places, texts = Bent(0.01).ticks(values)
    assert 2 <= len(places) <= 14 or values == [0.0]
    assert "0" in texts
    assert any(text.startswith("-") for text in texts) == (min(values) < -0.006)
    assert any(text.startswith("+") for text in texts) == (max(values) > 0.006)


def test_a_diverged_run_leaves_the_others_their_room(comparison: dict) -> None:
    assert learning_forgetting(comparison, "facts/answer_loss").layout.xaxis.range is None
    lost = copy.deepcopy(comparison["runs"][0]) | {"status": "diverged"}
    lost["scores"]["after"]["sums/answer_loss"]["value"] = 70.0
    comparison["runs"].append(lost)
    figure = learning_forgetting(comparison, "facts/answer_loss")
    low, high = figure.layout.xaxis.range
    assert 1.0 < low < 1.2
    assert 2.1 < high < 2.3
    assert 70.0 in figure.data[0].x


def test_what_is_retained_is_of_each_seeds_own_base(comparison: dict) -> None:
    """Seeds may draw other records; where nothing changed, all of it is retained."""
    keep, runs = "facts/answer_loss", []
    for seed, base in ((0, 0.4), (1, 1.9)):
        one = copy.deepcopy(comparison["runs"][0]) | {"seed": seed}
        for side in ("before", "after"):
            one["scores"][side][keep]["value"] = base
        runs.append(one)
    best = conclusions(parse_study(STUDY), runs)["best"]["lora"]["scores"][keep]
    assert best["retained"] == pytest.approx(100)
    assert best["base"] == pytest.approx(1.15)


def test_a_share_of_next_to_nothing_is_given_as_a_difference(comparison: dict, tmp_path) -> None:
    wide = {"ratio": 54.0, "ratio_low": -8100.0, "ratio_high": 8200.0, "difference": 0.017, "low": -0.02, "high": 0.05}
    comparison["conclusions"]["differences"]["choices/accuracy"]["kpm"] |= wide
    write_comparison(comparison, tmp_path / "comparison.html")
    before_details = (tmp_path / "comparison.html").read_text().partition("<summary>Differences")[0]
    assert ">+0.017 (-0.020 to +0.050)<" in before_details


def test_equal_loss_is_one_table_with_the_details_folded_away(comparison: dict, tmp_path) -> None:
    bounded = {"ratio": 0.4, "ratio_low": 0.2, "ratio_high": 0.7}
    comparison["conclusions"]["differences"]["facts/answer_loss"]["kpm"] |= bounded
    comparison["conclusions"]["differences"]["choices/accuracy"]["kpm"] |= {"ratio": None, "difference": -0.03}
    write_comparison(comparison, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    assert ">0.40 (0.20 to 0.70)<" in text
    assert ">-0.030 (" in text
    assert "against LoRA" in text
    assert text.count("<summary>Differences") == 1


def test_a_base_that_scored_nothing_has_no_share_to_retain(comparison: dict, tmp_path) -> None:
    """0 of an accuracy cannot be lost; NaN has no place in JSON, where it is null."""
    keep = "choices/accuracy"
    for run in comparison["runs"]:
        run["retained"][keep] = None
    for best in comparison["conclusions"]["best"].values():
        best["scores"][keep]["retained"] = None
    write_comparison(comparison, tmp_path / "comparison.html")
    assert " (–)" in (tmp_path / "comparison.html").read_text()
    best_table(comparison)


def test_variants_of_a_methods_own_grid_are_told_apart(comparison: dict, tmp_path) -> None:
    for run in [run for run in comparison["runs"] if run["method"] == "kpm"]:
        other = copy.deepcopy(run)
        other["curve"]["loss"] = [9.0, 9.0, 9.0]
        run["variant"], other["variant"] = {"training.weight_decay": 0.01}, {"training.weight_decay": 0.1}
        comparison["runs"].append(other)
    comparison["conclusions"]["best"]["kpm"]["variant"] = {"training.weight_decay": 0.01}
    [drawn] = [trace for trace in convergence(comparison).data if trace.name.startswith("CorDA-KPM")]
    assert max(drawn.y) < 9
    write_comparison(comparison, tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    for name in ("CorDA-KPM (weight_decay 0.01)", "CorDA-KPM (weight_decay 0.1)"):
        assert name in text


def test_the_error_of_a_perplexitys_rise_is_that_of_its_logarithm(comparison: dict) -> None:
    keep = "stories/perplexity"
    for run in comparison["runs"]:
        run["rise_stderr"] = {keep: 0.01}
    trace = next(t for t in learning_forgetting(comparison, keep).data if t.name == "LoRA" and t.mode == "markers")
    bent = Bent.of([0.01] * 3)
    rise = math.log(AFTER["lora"][0][2] / BASE["stories"])
    assert trace.error_y.array[0] == pytest.approx(bent(rise + 0.01) - bent(rise))


def with_validation(comparison: dict, lora: list[float], kpm: list[float]) -> dict:
    made = copy.deepcopy(comparison)
    for run in made["runs"]:
        losses = lora if run["method"] == "lora" else kpm
        run["curve"] |= {"eval_step": [1, 2, 3], "eval_loss": losses}
    made["conclusions"] = conclusions(parse_study(STUDY), made["runs"])
    return made


def test_steps_are_those_of_the_validation_loss_where_it_was_read(comparison: dict, tmp_path: Path) -> None:
    assert "validation" not in comparison["conclusions"]["steps"]["kpm"]
    made = with_validation(comparison, lora=[4.0, 3.0, 2.0], kpm=[3.0, 1.0, 0.5])
    found = made["conclusions"]["steps"]["kpm"]["validation"]
    assert found["share"] == pytest.approx(1.5 / 3)  # halfway from 3.0 at 1 to 1.0 at 2
    assert found["by_rate"]["0.003"] == {"share": pytest.approx(0.5), "seeds": 1}
    lines = convergence(made).data
    assert [list(line.y) for line in lines] == [[4.0, 3.0, 2.0], [3.0, 1.0, 0.5]]
    assert "validation" in convergence(made).layout.yaxis.title.text
    page = tmp_path / "page.html"
    write_comparison(made, page)
    text = page.read_text(encoding="utf-8")
    assert "final validation loss, seed by seed" in text
    assert "1.5 of 3" in text
    assert "too noisy" not in text


def test_a_reference_that_passes_its_own_final_loss_early_times_nobody(comparison: dict, tmp_path: Path) -> None:
    made = with_validation(comparison, lora=[4.0, 1.0, 1.1], kpm=[3.0, 1.0, 0.5])
    page = tmp_path / "page.html"
    write_comparison(made, page)
    assert "LoRA passes its own final validation loss after less than 80% of its steps" in page.read_text("utf-8")


def test_where_some_runs_read_no_validation_loss_that_of_training_is_shown(comparison: dict) -> None:
    made = with_validation(comparison, lora=[4.0, 3.0, 2.0], kpm=[3.0, 1.0, 0.5])
    for run in made["runs"]:
        if run["method"] == "kpm":
            del run["curve"]["eval_loss"]
    assert "training" in convergence(made).layout.yaxis.title.text


@pytest.mark.parametrize(("steps", "shown"), [(1234, "1234"), (1236.52, "1236.5"), (41.0, "41")])
def test_steps_are_not_rounded_to_three_digits(steps: float, shown: str) -> None:
    assert _plain(steps) == shown
