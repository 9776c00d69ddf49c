import json
import re
from collections import Counter
from typing import Any

import pytest

from corda import demo

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
# Written out again rather than imported, so a wrong constant in the generator cannot agree with itself.
UNITS = {
    "dozen": 12,
    "hours": 60,
    "weeks": 7,
    "metres": 100,
    "kilograms": 1000,
    "quarters": 25,
    "years": 12,
}


def plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def every_fact() -> list[dict[str, Any]]:
    return demo.facts("calibration") + demo.facts("heldout")


def problem_values(problem: dict[str, str]) -> tuple[str, ...]:
    kind = problem["answer"].split("=")[0].split()[1]
    days = re.findall("|".join(DAYS), problem["question"])
    return (kind, *days, *re.findall(r"\d+", problem["question"]))


def check_answer(answer: str) -> None:
    body, last = answer.split("\n")
    result = ""
    for step in body.split("; "):
        left, result = step.split(" = ")
        a, op, *rest = left.split()
        if a in DAYS:
            assert op == "+"
            assert result == DAYS[(DAYS.index(a) + int(rest[0])) % 7], answer
            continue
        x, value = int(a), int(result)
        if op in UNITS:
            assert not rest
            assert x * UNITS[op] == value, answer
            continue
        y = int(rest[0])
        assert {"+": x + y, "-": x - y, "x": x * y, "mod": x % y}[op] == value, answer
        assert value >= 0
    assert last == f"#### {result}"


def expected_final(question: str) -> str:
    """Solve a problem from its question alone."""
    n = [int(d) for d in re.findall(r"\d+", question)]
    if "dozen" in question:
        return str(n[0] * n[1] * 12 - n[2])
    if "hours" in question:
        return str((n[0] * 60 + n[1]) * n[2])
    if "weeks" in question:
        return str(n[0] * n[1] * 7 - n[2])
    if "It is" in question:
        today = next(d for d in DAYS if f"It is {d}." in question)
        return DAYS[(DAYS.index(today) + n[0] + n[1]) % 7]
    if " metres" in question:
        return str(n[2] * 100 - n[0] * n[1])
    if "kilograms" in question:
        return str(n[0] * 1000 + n[1] * n[2])
    if "quarters" in question:
        return str(n[0] * 25 + n[1] - n[2])
    assert "dollars a month" in question
    return str(n[0] * (n[1] * 12 + n[2]))


def test_facts_counts_and_domains() -> None:
    rows = every_fact()
    assert 560 <= len(rows) <= 640
    per_domain = Counter(r["domain"] for r in rows)
    assert len(per_domain) >= 10
    assert all(40 <= n <= 70 for n in per_domain.values())
    held = Counter(r["domain"] for r in demo.facts("heldout"))
    for domain, n in per_domain.items():
        assert abs(held[domain] - n / 3) <= 1, domain


def test_fact_records_are_well_formed() -> None:
    for row in every_fact():
        assert set(row) == {"question", "answer", "domain"}
        assert row["question"].endswith("?")
        assert row["answer"]
        assert all(a and a == a.strip() for a in row["answer"])
        assert len(set(row["answer"])) == len(row["answer"])
        assert 1 <= len(row["answer"][0].split()) <= 4


def test_questions_are_unique_over_both_splits() -> None:
    seen = Counter(plain(r["question"]) for r in every_fact())
    assert [q for q, n in seen.items() if n > 1] == []
    a, b = ({plain(r["question"]) for r in demo.facts(s)} for s in ("calibration", "heldout"))
    assert not a & b


def test_no_answer_stands_in_its_question() -> None:
    for row in every_fact():
        question = plain(row["question"])
        for answer in map(plain, row["answer"]):
            assert f" {answer} " not in f" {question} ", row
            # Symbols and small numbers turn up inside other words by chance, so only longer answers count.
            assert len(answer) < 4 or answer not in question, row


@pytest.mark.parametrize("split", ["train", "test"])
def test_word_problems_are_right(split: Any) -> None:
    problems = demo.word_problems(1000, 3, split)
    assert len(problems) == 1000
    for p in problems:
        check_answer(p["answer"])
        assert p["answer"].split("#### ")[1] == expected_final(p["question"]), p
    kinds = Counter(problem_values(p)[0] for p in problems)
    assert len(kinds) == 8
    assert min(kinds.values()) >= 50


def test_word_problem_splits_share_nothing() -> None:
    train = [problem_values(p) for p in demo.word_problems(2000, 1, "train")]
    test = [problem_values(p) for p in demo.word_problems(2000, 1, "test")]
    assert len(set(train)) == len(set(test)) == 2000
    assert not set(train) & set(test)


def test_word_problems_depend_on_the_arguments_only() -> None:
    assert demo.word_problems(50, 7, "train") == demo.word_problems(50, 7, "train")
    assert demo.word_problems(50, 7, "train") == demo.word_problems(80, 7, "train")[:50]
    assert demo.word_problems(50, 7, "train") != demo.word_problems(50, 8, "train")
    assert demo.word_problems(0, 7, "train") == []


def test_asking_for_too_many_problems_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text, words, (plan, *spans) = demo._TEMPLATES[0]
    few = (plan, *(span[:2] for span in spans))
    monkeypatch.setattr(demo, "_TEMPLATES", ((text, words, few),))
    with pytest.raises(ValueError, match="distinct train problems"):
        demo.word_problems(9, 0, "train")


def test_write(tmp_path: Any) -> None:
    paths = demo.write(tmp_path / "data")
    assert list(paths) == ["keep_calibration", "keep_heldout", "learn_train", "learn_test"]
    rows = {k: [json.loads(x) for x in p.read_text(encoding="utf-8").splitlines()] for k, p in paths.items()}
    assert all(p.name == f"{stem}.jsonl" for stem, p in paths.items())
    assert all(set(r) == {"question", "answer"} for table in rows.values() for r in table)
    assert len(rows["keep_calibration"]) == len(demo.facts("calibration"))
    assert len(rows["keep_heldout"]) == len(demo.facts("heldout"))
    assert rows["learn_train"] == demo.word_problems(400, 0, "train")
    assert rows["learn_test"] == demo.word_problems(200, 0, "test")
