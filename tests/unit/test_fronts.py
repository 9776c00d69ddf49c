"""Fronts: interpolation, overlap, paired differences, choice of the learning rate, steps to a loss."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from corda.comparing.choosing import choose, further, shares_by_rate, smoothed, steps_to_reach
from corda.comparing.fronts import Point, at, compared, front, mean_over, overlap, points, quantile, retained

PERPLEXITIES = (("before", 10.0), ("after", 20.0))


def line(slope, learns, offset=0.0, pulls=()):
    return [Point(x, offset - slope * x, 1e-4 / (i + 1), pulls) for i, x in enumerate(learns)]


def test_front_drops_runs_that_another_one_beats_on_both_sides():
    good = [Point(1.0, 0.9, 3e-3), Point(1.4, 0.3, 1e-3), Point(2.0, 0.1, 1e-4)]
    beaten = [Point(1.5, 0.31, 2e-3), Point(1.0, 0.95, 5e-3)]
    assert front([*beaten, *reversed(good)]) == good


def test_a_front_is_read_between_its_runs_and_never_beyond():
    curve = front([Point(1.0, 0.8, 1e-3, (0.4, -0.4)), Point(2.0, 0.2, 1e-4, (0.0, 0.2))])
    middle = at(curve, 1.25)
    assert middle is not None
    assert middle.rise == pytest.approx(0.65)
    assert middle.pulls == pytest.approx((0.3, -0.25))
    assert at(curve, 0.999) is None
    assert at(curve, 2.001) is None
    assert at(curve, 2.0).rise == pytest.approx(0.2)


def test_fronts_without_a_common_task_loss_are_not_compared():
    one, two = line(1.0, [1.0, 1.2], 3), line(1.0, [1.5, 1.9], 3)
    assert overlap(front(one), front(two)) is None
    found = compared({0: one}, {0: two})
    assert found["why"] == "the fronts do not overlap"
    assert "difference" not in found


def test_a_single_run_is_compared_where_the_other_front_passes_it():
    found = compared({0: [Point(1.5, 0.2, 1e-3)]}, {0: line(0.5, [1.0, 2.0], 1.5)})
    assert found["from"] == found["to"] == 1.5
    assert found["difference"] == pytest.approx(0.2 - 0.75)
    assert found["ratio"] == pytest.approx(0.2 / 0.75)


def test_difference_is_the_mean_over_the_overlap_of_each_seed():
    one = {s: line(1.0, [1.0, 1.4, 2.0], 3.0 + 0.01 * s) for s in range(3)}
    two = {s: line(1.0, [1.2, 1.6, 2.4], 3.3 + 0.03 * s) for s in range(3)}
    found = compared(one, two)
    assert found["seeds"] == 3
    assert (found["from"], found["to"]) == (1.2, 2.0)
    assert found["difference"] == pytest.approx(-0.3 - 0.02)
    assert found["stderr_seeds"] == pytest.approx(0.02 / math.sqrt(3))
    half = quantile(2) * 0.02 / math.sqrt(3)
    assert found["low"] == pytest.approx(-0.32 - half)
    assert found["high"] == pytest.approx(-0.32 + half)


def test_limits_of_one_seed_come_from_the_records_paired():
    generator = random.Random(0)
    shared = [generator.gauss(0, 0.02) for _ in range(50)]
    own = [generator.gauss(0, 0.001) for _ in range(50)]
    one = {0: line(1.0, [1.0, 2.0], 3.0, tuple(a + b for a, b in zip(shared, own, strict=True)))}
    two = {0: line(1.0, [1.0, 2.0], 3.1, tuple(shared))}
    found = compared(one, two)
    expected = math.sqrt(sum(x * x for x in own) * 50 / 49)
    assert found["stderr_records"] == pytest.approx(expected)  # what the records share cancels
    assert found["stderr_seeds"] is None
    assert found["high"] - found["low"] == pytest.approx(2 * quantile(49) * expected)


def test_a_ratio_has_limits_of_its_own():
    """Seeds that forget more or less with both methods alike say little of the difference and much of the ratio."""
    levels = (1.0, 1.3, 1.6)
    one = {s: line(0.0, [1.0, 2.0], 0.3 * level) for s, level in enumerate(levels)}
    two = {s: line(0.0, [1.0, 2.0], level) for s, level in enumerate(levels)}
    found = compared(one, two)
    assert found["ratio"] == pytest.approx(0.3)
    assert found["ratio_low"] == pytest.approx(0.3)
    assert found["ratio_high"] == pytest.approx(0.3)
    assert found["high"] - found["low"] > 0.5


@pytest.mark.parametrize("seeds", [1, 3])
def test_limits_of_a_ratio_are_the_factors_at_which_nothing_is_left_of_the_difference(seeds):
    generator = random.Random(seeds)
    one, two = {}, {}
    for seed in range(seeds):
        rise = 2.0 + generator.gauss(0, 0.2)
        pulls = [tuple(generator.gauss(0, 0.02) for _ in range(30)) for _ in range(2)]
        one[seed] = line(0.0, [1.0, 2.0], 0.3 * rise + generator.gauss(0, 0.05), pulls[0])
        two[seed] = line(0.0, [1.0, 2.0], rise, pulls[1])

    def half(factor):
        rises = [(one[s][0].rise, two[s][0].rise) for s in one]
        over_seeds = np.std([a - factor * b for a, b in rises], ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0
        joint = [
            sum(one[s][0].pulls[i] - factor * two[s][0].pulls[i] for s in one) / seeds for i in range(30)
        ]  # a line's two points pull alike
        over_records = math.sqrt(sum(x * x for x in joint) * 30 / 29)
        seed_part = quantile(seeds - 1) * over_seeds if seeds > 1 else 0.0
        return math.hypot(seed_part, quantile(29) * over_records)

    found = compared(one, two)
    assert found["ratio_low"] < found["ratio"] < found["ratio_high"]
    for factor in (found["ratio_low"], found["ratio_high"]):
        assert abs(found["rise"] - factor * found["reference_rise"]) == pytest.approx(half(factor), rel=1e-6)


def test_a_ratio_has_no_limits_where_the_other_rise_is_not_told_from_none():
    """Seeds between 0.02 and 0.9: Student's t with two degrees of freedom puts 0 well inside."""
    rises = (0.02, 0.3, 0.9)
    one = {s: line(0.0, [1.0, 2.0], 0.4 * rise + 0.01 * s) for s, rise in enumerate(rises)}
    found = compared(one, {s: line(0.0, [1.0, 2.0], rise) for s, rise in enumerate(rises)})
    assert found["ratio"] > 0
    assert "ratio_low" not in found
    assert found["low"] < found["difference"] < found["high"]


def test_limits_are_unknown_where_neither_seeds_nor_records_give_one():
    found = compared({0: line(0.0, [1.0, 2.0], 0.5)}, {0: line(0.0, [1.0, 2.0], 2.0)})
    assert found["difference"] == pytest.approx(-1.5)
    assert found["low"] is None
    assert found["high"] is None
    assert "ratio_low" not in found


def test_records_that_seeds_drew_apart_are_not_paired_by_their_place():
    """The same records in another order: as if every seed had measured others, the error would halve over four."""
    generator = random.Random(4)
    own = [generator.gauss(0, 0.01) for _ in range(200)]
    one, two = {}, {}
    for seed in range(4):
        shuffled = tuple(generator.sample(own, len(own)))
        one[seed], two[seed] = line(0.0, [1.0, 2.0], 0.5, shuffled), line(0.0, [1.0, 2.0], 2.0, (0.0,) * 200)
    whole = math.sqrt(sum(x * x for x in own) * 200 / 199)
    assert compared(one, two, drawn=True)["stderr_records"] == pytest.approx(whole)
    assert compared(one, two)["stderr_records"] < 0.7 * whole


def test_what_is_missing_is_named():
    one = line(0.0, [1.0, 2.0], 0.5)
    assert compared({0: one}, {1: one})["why"] == "no seed at which both have a finished run"
    assert compared({0: one}, {0: []})["why"] == "no seed at which both have a finished run"


def test_quantiles_of_students_t():
    from scipy.stats import t

    for freedom in (1, 2, 5, 10, 11, 12, 20, 59, 400):
        assert quantile(freedom) == pytest.approx(float(t.ppf(0.975, freedom)), abs=1e-3)


def test_the_bases_spread_over_records_is_no_part_of_a_ratios_error():
    def run(seed, rise, loss):
        rng = np.random.default_rng(0)
        base, noise = rng.normal(5, 2, 200), np.random.default_rng(seed).normal(rise, 0.1 * rise, 200)
        after = base + noise
        pulls = [(some - some.mean()) / 200 for some in (base, after)]
        keep = {
            "before": {"k/answer_loss": {"value": base.mean()}},
            "after": {"k/answer_loss": {"value": after.mean()}},
        }
        keep["after"]["t/answer_loss"] = {"value": loss}
        influence = {"influence_before": {"k/answer_loss": pulls[0]}, "influence": {"k/answer_loss": pulls[1]}}
        return {"status": "done", "learning_rate": 1e-3, "scores": keep} | influence

    first, second = ([run(seed + i, rise * (2 - i), 1.0 + i) for i in range(2)] for seed, rise in ((1, 0.2), (7, 0.8)))
    made = [{0: points(runs, "t/answer_loss", "k/answer_loss")} for runs in (first, second)]
    found = compared(*made)
    assert found["ratio"] == pytest.approx(0.25, rel=0.05)
    # 10 % of spread over 200 records in either rise, and less in their means over two runs
    assert 0.25 * 0.1 * 1.96 * 0.5 < (found["ratio_high"] - found["ratio"]) * math.sqrt(200) < 0.25 * 0.1 * 1.96 * 2


def test_seeds_may_have_other_numbers_of_records():
    few, many = (0.1, -0.1), (0.1, -0.2, 0.1)
    one = {0: line(0.0, [1.0, 2.0], 0.5, few), 1: line(0.0, [1.0, 2.0], 0.5, many)}
    two = {0: line(0.0, [1.0, 2.0], 2.0, few), 1: line(0.0, [1.0, 2.0], 2.0, many)}
    assert compared(one, two)["stderr_records"] == 0.0
    one[1] = line(0.0, [1.0, 2.0], 0.5, tuple(x + y for x, y in zip(many, (0.01, 0.0, -0.01), strict=True)))
    assert compared({k: one[k] for k in (1, 0)}, two)["stderr_records"] > 0


def test_there_is_no_ratio_to_a_method_that_forgets_nothing():
    found = compared({0: line(0.0, [1.0, 2.0], 0.5)}, {0: line(0.0, [1.0, 2.0], -0.1)})
    assert found["ratio"] is None
    assert found["difference"] == pytest.approx(0.6)


def test_mean_over_a_range_of_a_bent_front():
    curve = [Point(1.0, 1.0, 1e-3), Point(2.0, 0.0, 1e-4), Point(4.0, -0.5, 1e-5)]
    assert mean_over(curve, (1.0, 2.0)).rise == pytest.approx(0.5)
    assert mean_over(curve, (2.0, 4.0)).rise == pytest.approx(-0.25)


def test_a_run_without_pulls_leaves_the_mean_without():
    curve = [Point(1.0, 1.0, 1e-3, (0.1, -0.1)), Point(2.0, 0.0, 1e-4), Point(4.0, -0.5, 1e-5, (0.2, -0.2))]
    assert mean_over(curve, (1.0, 4.0)).pulls == ()


def test_accuracies_are_turned_so_that_forgetting_is_a_rise():
    run = {
        "status": "done",
        "learning_rate": 1e-3,
        "influence": {"arc/accuracy": [0.1, -0.1]},
        "influence_before": {"arc/accuracy": [0.25, -0.25]},
        "scores": {
            "before": {"gsm/exact_match": {"value": 0.1}, "arc/accuracy": {"value": 0.5}},
            "after": {"gsm/exact_match": {"value": 0.3}, "arc/accuracy": {"value": 0.4}},
        },
    }
    [point] = points([run], "gsm/exact_match", "arc/accuracy")
    assert point.learn == pytest.approx(-0.3)
    assert point.rise == pytest.approx(0.1)
    assert point.pulls == pytest.approx((0.15, -0.15))
    assert points([run | {"influence_before": {}}], "gsm/exact_match", "arc/accuracy")[0].pulls == ()
    assert points([run | {"status": "diverged"}], "gsm/exact_match", "arc/accuracy") == []


def test_the_rise_of_a_perplexity_is_that_of_the_loss():
    scores = {side: {"gsm/answer_loss": {"value": 1.5}, "wiki/perplexity": {"value": v}} for side, v in PERPLEXITIES}
    pulls = {"influence": {"wiki/perplexity": [4.0, -4.0]}, "influence_before": {"wiki/perplexity": [3.0, -3.0]}}
    run = {"status": "done", "learning_rate": 1e-3, "scores": scores} | pulls
    [point] = points([run], "gsm/answer_loss", "wiki/perplexity")
    assert point.rise == pytest.approx(math.log(2))
    assert point.pulls == pytest.approx((4 / 20 - 3 / 10, 3 / 10 - 4 / 20))


def test_retained_share_of_the_base():
    assert retained("a/answer_loss", 2.0, 2.0 + math.log(2)) == pytest.approx(50)
    assert retained("a/perplexity", 10.0, 12.5) == pytest.approx(80)
    assert retained("a/accuracy", 0.5, 0.4) == pytest.approx(80)


def made(rate, seed, dev, status="done", variant=None):
    after = {"dev/answer_loss": {"value": dev}} if dev is not None else {}
    return {
        "learning_rate": rate,
        "seed": seed,
        "status": status,
        "variant": variant or {},
        "scores": {"after": after},
    }


def test_the_rate_is_chosen_by_the_mean_on_the_development_split():
    runs = [made(1e-4, 0, 1.5), made(1e-3, 0, 1.0), made(1e-2, 0, 0.9), made(1e-4, 1, 1.5), made(1e-3, 1, 1.1)]
    runs.append(made(1e-2, 1, 1.9))
    best = choose(runs, "dev/answer_loss")
    assert best.learning_rate == 1e-3
    assert best.inside
    assert best.development == pytest.approx({1e-4: 1.5, 1e-3: 1.05, 1e-2: 1.4})


def test_a_diverged_run_counts_against_its_rate():
    runs = [made(1e-4, 0, 1.5), made(1e-3, 0, 1.0), made(1e-2, 0, 0.5), made(1e-2, 1, None, "diverged")]
    assert choose(runs, "dev/answer_loss").learning_rate == 1e-3
    assert choose([made(1e-2, 1, None, "diverged")], "dev/answer_loss") is None


def test_a_best_rate_at_an_end_is_not_inside():
    low = choose([made(1e-4, 0, 1.0), made(1e-3, 0, 1.5)], "dev/answer_loss")
    high = choose([made(1e-4, 0, 1.5), made(1e-3, 0, 1.0)], "dev/answer_loss")
    assert (low.inside, low.end, high.inside, high.end) == (False, "low", False, "high")
    assert further([1e-4, 1e-3], "low") == pytest.approx(1e-4 / 3, rel=1e-2)
    assert further([1e-3, 1e-4, 2e-3], "high") == pytest.approx(4e-3)
    assert further([1e-3, 2e-3] * 2, "high") == pytest.approx(4e-3)  # two seeds


def test_other_settings_are_chosen_with_the_rate():
    decayed = {"training.weight_decay": 0.1}
    runs = [made(1e-3, 0, 1.0), made(1e-3, 0, 0.8, variant=decayed), made(1e-4, 0, 0.9, variant=decayed)]
    best = choose(runs, "dev/answer_loss")
    assert best.variant == (("training.weight_decay", 0.1),)
    assert set(best.development) == {1e-4, 1e-3}


def test_rates_are_chosen_by_the_seeds_that_all_of_them_have():
    easy = 1  # seed 1 is easier, and the higher rate has not run with it yet
    runs = [made(1e-4, 0, 1.2), made(1e-3, 0, 1.0), made(1e-3, easy, 0.5), made(3e-3, 0, 0.9)]
    assert choose(runs, "dev/answer_loss").learning_rate == 3e-3
    assert choose([*runs, made(1e-2, easy, 0.7)], "dev/answer_loss").learning_rate == 1e-2  # no seed in common


def test_steps_to_reach_the_final_loss_of_another_run():
    steps = list(range(1, 41))
    slow = {"curve": {"step": steps, "loss": [4.0 - 0.05 * s for s in steps]}}
    fast = {"curve": {"step": steps, "loss": [max(1.0, 4.0 - 0.2 * s) for s in steps]}}
    found = steps_to_reach(fast, slow)
    # Smoothed over 4: the slow one ends at 4 - 0.05 * 38.5 = 2.075, which the fast one passes with its mean at step
    # s - 1.5: 4 - 0.2 (s - 1.5) <= 2.075 from s = 11.125 on.
    assert found == {"steps": 12, "of": 40, "share": 0.3, "loss": pytest.approx(2.075)}
    assert steps_to_reach(slow, fast)["steps"] is None
    assert smoothed([2.0, 4.0, 6.0], 2) == [2.0, 3.0, 5.0]


def test_steps_to_reach_the_final_validation_loss_lie_between_readings():
    slow = {"curve": {"step": list(range(1, 41)), "eval_step": [10, 20, 40], "eval_loss": [3.0, 2.5, 2.0]}}
    fast = {"curve": {"step": list(range(1, 41)), "eval_step": [10, 20, 40], "eval_loss": [2.6, 1.6, 1.7]}}
    found = steps_to_reach(fast, slow, "eval_loss")
    assert found == {"steps": pytest.approx(16.0), "of": 40, "share": pytest.approx(0.4), "loss": 2.0}
    assert steps_to_reach(slow, slow, "eval_loss")["share"] == 1.0
    assert steps_to_reach(slow, fast, "eval_loss")["steps"] is None
    at_once = {"curve": {"step": [1], "eval_step": [10], "eval_loss": [1.9]}}
    assert steps_to_reach(at_once, slow, "eval_loss")["steps"] == 10  # no earlier reading to draw a line from


def test_steps_at_one_rate_for_both():
    steps = list(range(1, 41))

    def run(rate, seed, slope):
        return {"learning_rate": rate, "seed": seed, "curve": {"step": steps, "loss": [4.0 - slope * s for s in steps]}}

    references = [run(1e-3, 0, 0.025), run(1e-3, 1, 0.05), run(1e-2, 0, 0.1)]
    found = shares_by_rate([run(1e-3, 1, 0.1), run(1e-3, 0, 0.1), run(1e-2, 0, 0.05), run(0.1, 0, 1.0)], references)
    # smoothed over 4, a line that is k times as steep is where the other one ends after 1.5 + 38.5 / k steps
    assert found == {
        "0.001": {"share": pytest.approx((12 + 21) / 2 / 40), "seeds": 2},
        "0.01": {"share": None, "seeds": 1},
    }
