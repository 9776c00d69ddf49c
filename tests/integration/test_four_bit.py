"""4-bit bases: collected and decomposed in full precision, attached, trained, resumed."""

from __future__ import annotations

import pytest

pytest.importorskip("bitsandbytes")

from corda import pipeline
from corda.reading import parse_recipe


def four_bit(raw_recipe, **adapter):
    raw_recipe["model"]["load_in_4bit"] = True
    raw_recipe["adapter"] |= adapter
    return parse_recipe(raw_recipe)


@pytest.mark.parametrize(
    ("mode", "base", "correction", "rounds"),
    [
        ("ipm", None, "none", 1),
        ("ipm", None, "fit", 3),
        ("kpm", None, "frozen", 2),
        ("kpm", "intact", "frozen", 1),
        ("kpm", "intact", "none", 1),
        ("lora", None, "none", 1),
    ],
)
def test_a_run_on_a_4bit_base(raw_recipe, mode, base, correction, rounds):
    recipe = four_bit(raw_recipe, mode=mode, base=base, correction=correction, correction_rounds=rounds)
    results = pipeline.run(recipe)
    before, after = (results["scores"][k]["sums/answer_loss"]["value"] for k in ("before", "after"))
    assert after < before
    assert results["export"]["max_relative_logit_difference"] <= 1e-5
    if mode == "lora":
        assert results["plan"]["quantisation"] is None
        return
    extra = 4 if (base, correction) == ("intact", "frozen") else 0
    assert results["export"]["rank"] == 8 + extra
    errors = results["plan"]["quantisation"]
    assert 0 < errors["output_plain"] < 1
    if correction == "none" and base == "intact":
        assert errors["output_ratio"] == 1
        assert results["step0"]["max_relative_logit_difference"] == 0
    else:
        assert errors["output_ratio"] < 0.9
