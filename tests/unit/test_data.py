"""Sources and formats: what is read, how it becomes tokens, and what is said of bad input."""

from __future__ import annotations

import json

import pytest
from tokenizers.processors import TemplateProcessing

from corda.data.batches import Encoded, calibration_rounds, encode, load_records
from corda.data.formats import to_records
from corda.data.rendering import render
from corda.data.sources import read_records
from corda.errors import DataError
from corda.evaluation.generation import prompt
from corda.tasks import DataSource

FORMS = {
    "qa": {"question": "Who?", "answer": ["Me", "I"]},
    "alpaca": {"instruction": "Say", "input": "hi", "output": "hello"},
    "prompt_completion": {"prompt": "1 2 3", "completion": " 4"},
    "messages": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me"}]},
    "text": {"text": "Once upon a time"},
    "choice": {"context": "Snow is", "choices": ["white", "red"], "label": 0},
}


def source(path, **settings):
    return DataSource(dataset=str(path), **settings)


@pytest.mark.parametrize("name", FORMS)
def test_each_format_is_detected_and_marks_its_response(name, tokenizer):
    record = to_records([FORMS[name]])[0]
    segments = render(record, tokenizer, "plain")
    response = "".join(s.text for s in segments if s.response)
    expected = {"qa": " Me</s>", "alpaca": "\nhello</s>", "prompt_completion": " 4</s>", "text": "Once upon a time"}
    expected |= {"messages": "Me</s>", "sharegpt": "Me</s>", "choice": " white</s>"}
    assert response == expected[name]


def test_what_is_mapped_comes_before_what_the_data_calls_so():
    one = {"question": "Who?", "short": "Me", "answer": "It was me, as I have said before."}
    [record] = to_records([one], columns={"answer": "short"})
    assert record.response == " Me"
    talk = [{"role": "user", "content": "no"}, {"role": "assistant", "content": "no"}]
    [record] = to_records(
        [{"problem": "2 + 2?", "solution": "4", "messages": talk}],
        columns={"question": "problem", "answer": "solution"},
    )
    assert record.response == " 4"


def test_nothing_is_added_to_what_a_chat_template_gives(tokenizer):
    """As apply_chat_template(tokenize=True) and servers have it; plain text has the tokenizer's first token."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    record = to_records([FORMS["qa"]])[0]
    assert encode(record, tokenizer, template="plain").ids[0] == 1
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
    assert rendered[0] != 1
    assert list(encode(record, tokenizer, template="chat").ids) == rendered
    asked = prompt(record, tokenizer, "chat").ids
    assert list(asked) == rendered[: len(asked)]


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    said = [("gpt", "Hello."), ("human", "Who?"), ("gpt", "Me")]
    [record] = to_records([{"conversations": [{"from": f, "value": v} for f, v in said]}])
    segments = render(record, tokenizer, "plain")
    assert [s.text for s in segments if s.response] == ["Me</s>"]
    assert "".join(s.text for s in segments) == "<|assistant|>Hello.</s><|user|>Who?</s><|assistant|>Me</s>"
    [alone] = to_records([{"conversations": [{"from": "gpt", "value": "Hello."}]}])
    assert render(alone, tokenizer, "plain") == []
    refusing = "{% if messages | length > 1 %}{{ messages[0]['content'] + 3 }}{% endif %}x"
    tokenizer.chat_template = refusing.replace("{{ messages[0]['content'] + 3 }}", "{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="refuses a conversation"):
        render(record, tokenizer, "plain")


@pytest.mark.parametrize("name", ["lines.json", "marked.jsonl", "marked.json"])
def test_json_as_other_tools_write_it(tmp_path, name):
    lines = '{"question": "Who?", "answer": "Me"}\n{"question": "What?", "answer": "It"}\n'
    text = lines if name != "marked.json" else f"[{','.join(lines.splitlines())}]"
    (tmp_path / name).write_text(text, encoding="utf-8-sig" if "marked" in name else "utf-8")
    assert [r["answer"] for r in read_records(DataSource(dataset=str(tmp_path / name)))] == ["Me", "It"]


def test_an_empty_cell_of_running_text_is_a_blank_line(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\n1,One.\n2,\n3,Three.\n")
    records = to_records(read_records(DataSource(dataset=str(tmp_path / "t.csv"))))
    assert [record.response for record in records] == ["One.", "Three."]


def test_encoding_is_the_tokens_of_the_text(tokenizer):
    record = to_records([FORMS["qa"]])[0]
    encoded = encode(record, tokenizer)
    assert tokenizer.decode(encoded.ids) == "Question: Who?\nAnswer: Me</s>"
    assert tokenizer.decode([t for t, r in zip(encoded.ids, encoded.response, strict=True) if r]) == " Me</s>"
    assert len(encode(record, tokenizer, max_length=5)) == 5


def test_chat_template_and_several_turns(tokenizer):
    record = to_records([FORMS["qa"]])[0]
    assert tokenizer.decode(encode(record, tokenizer, template="chat").ids) == "<|user|>Who?</s><|assistant|>Me</s>"
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    chat = to_records([{"messages": [{"role": r, "content": c} for r, c in turns]}])[0]
    segments = render(chat, tokenizer, "plain")
    assert [s.text for s in segments if s.response] == ["b</s>", "d</s>"]
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template.*begins 'a'.*prompts and completions"):
        render(chat, tokenizer, "plain")


# Qwen3's in short: the last answer alone begins with an empty thought, which the generation prompt has not.
THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == "assistant" and loop.last %}<think>

</think>

{% endif %}{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# R1-Distill's: a thought is opened by the generation prompt, and answers are shown without one.
OPENS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)


def conversation(*turns):
    roles = ("user", "assistant") * len(turns)
    return to_records([{"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]}])[0]


def test_what_a_template_puts_before_an_answer_is_prompt(tokenizer):
    tokenizer.chat_template = THINKS
    (record,) = to_records([FORMS["qa"]])
    asked, said = render(record, tokenizer, "chat")
    assert asked.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (asked.response, said.response) == (False, True)
    assert said.text == "Me<|im_end|>\n"
    assert render(record, tokenizer, "chat", end=False)[1].text == "Me"
    thought = conversation("a", "<think>\nso\n</think>\n\nb")
    assert render(thought, tokenizer, "chat")[1].text.startswith("<think>\nso")


def test_a_template_may_render_earlier_turns_in_another_way(tokenizer):
    tokenizer.chat_template = THINKS
    several = conversation("a", " b ", "c", "d")
    segments = render(several, tokenizer, "chat")
    assert "".join(s.text for s in segments) == tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in several.turns], tokenize=False
    )
    assert [s.text for s in segments if s.response] == ["b<|im_end|>\n", "d<|im_end|>\n"]
    assert segments[2].text.endswith("c<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert [s.text for s in render(several, tokenizer, "chat", end=False) if s.response] == ["b", "d"]
    tokenizer.chat_template = OPENS
    asked, said = render(conversation("a", "b"), tokenizer, "chat")
    assert (asked.text, said.text) == ("<|User|>a<|Assistant|>", "b</s>")
    with pytest.raises(DataError, match=r"changes earlier turns.*begins 'a'"):
        render(conversation("a", "x</think>b"), tokenizer, "chat")


# Phi-3's and gpt-oss's in short: the last answer ends with another token of the tokenizer's than those before it.
ENDS = {
    "<|end|>\n": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<|endoftext|>{% endif %}",
    "": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>"
    "{% else %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}


@pytest.mark.parametrize("closing", ENDS)
def test_no_token_is_cut_where_the_last_answer_ends_in_another_way(tokenizer, closing):
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|return|>"], special_tokens=True)
    tokenizer.chat_template = ENDS[closing]
    several = conversation("a", "b", "c", "d")
    segments = render(several, tokenizer, "chat")
    whole = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in several.turns], tokenize=False)
    assert "".join(s.text for s in segments) == whole
    assert next(s.text for s in segments if s.response) == f"b{closing}"
    assert list(encode(several, tokenizer).ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_what_a_template_refuses_is_said_with_the_conversation(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"turns: user.*begins 'a'.*roles must alternate"):
        render(conversation("a", "b"), tokenizer, "chat")


def test_prompts_are_the_same_on_any_day(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert render(conversation("a", "b"), tokenizer, "chat")[0].text.startswith("26 Jul 2024<a>")
    tokenizer.chat_template = tokenizer.chat_template.replace("%d %b %Y", "%Y-%m-%d")
    assert render(conversation("a", "b"), tokenizer, "chat")[0].text.startswith("2024-07-26<a>")


def test_shots_precede_and_do_not_count(tokenizer):
    records = to_records([FORMS["qa"], {"question": "Where?", "answer": "Here"}])
    encoded = encode(records[1], tokenizer, shots=records[:1])
    assert tokenizer.decode(encoded.ids).startswith("Question: Who?\nAnswer: Me\n\nQuestion: Where?")
    assert sum(encoded.response) == len(" Here") + 1


def test_columns_are_mapped():
    record = to_records([{"q": "Who?", "a": "Me"}], columns={"question": "q", "answer": "a"})[0]
    assert record.answers == ("Me",)
    with pytest.raises(DataError, match="mapped column is not in the data: z"):
        to_records([{"q": "Who?"}], columns={"question": "z"})


def test_records_that_fit_no_format_show_fields_and_mapping():
    with pytest.raises(DataError, match=r"fit no format.*fields foo, bar.*columns: \{question"):
        to_records([{"foo": 1, "bar": 2}])
    with pytest.raises(DataError, match=r"record 2.*question is '', expected text"):
        to_records([FORMS["qa"], {"question": "", "answer": "x"}])


def test_malformed_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\n{"question": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3"):
        read_records(source(path))
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"not an object.*line 1"):
        read_records(source(path))
    path.write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_records(source(path))
    path.write_bytes(b'{"question": "\xff\xfe"}\n')
    with pytest.raises(DataError, match="not UTF-8"):
        read_records(source(path))
    with pytest.raises(DataError, match=r"is a folder.*Got: .*name one of its files"):
        read_records(source(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        read_records(source(tmp_path / "none.jsonl"))


def test_json_csv_and_parquet(tmp_path):
    import pandas

    records = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    pandas.DataFrame(records).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    for name in ("a.json", "a.csv", "a.parquet"):
        assert read_records(source(tmp_path / name)) == records


def test_a_sample_is_drawn_with_the_seed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t{i}"}}\n' for i in range(50)))
    one = read_records(source(path, max_records=10), seed=1)
    assert one == read_records(source(path, max_records=10), seed=1)
    assert one != read_records(source(path, max_records=10), seed=2)
    assert one != [{"text": f"t{i}"} for i in range(10)]


def test_calibration_budgets(data, tokenizer):
    records = load_records(DataSource(dataset="keep.jsonl"), data, 0)
    assert len(calibration_rounds(records, tokenizer, samples=5)[0]) == 5
    assert sum(map(len, calibration_rounds(records, tokenizer, samples=None, tokens=101)[0])) == 101
    windows = calibration_rounds(records, tokenizer, samples=3, pack_to=100)[0]
    assert len(windows) == 3
    assert all(len(w) <= 100 for w in windows)
    assert [len(w.starts) for w in windows] == [2, 2, 2]


def test_a_round_ends_where_an_image_does_not_fit_into_the_tokens_that_are_left(tokenizer):
    records = to_records([{"text": f"t{n}"} for n in range(40)])
    drawn: list[int] = []

    def whole_or_not_at_all(_record, limit):
        drawn.append(limit)
        return Encoded((5,) * 10, (True,) * 10) if limit >= 10 else Encoded((), ())

    rounds = calibration_rounds(
        records, tokenizer, 2, max_length=30, samples=None, tokens=25, encoding=whole_or_not_at_all
    )
    assert [len(chosen) for chosen in rounds] == [2, 2]
    assert drawn == [25, 15, 5] * 2


def test_an_answers_loss_does_not_count_the_end(tokenizer):
    qa, chat = to_records([FORMS["qa"]])[0], to_records([FORMS["messages"]])[0]
    for record, template, expected in ((qa, "plain", " Me"), (qa, "chat", "Me"), (chat, "plain", "Me")):
        segments = render(record, tokenizer, template, end=False)
        assert [s.text for s in segments if s.response] == [expected]


def test_rounds_are_disjoint_and_seeded(data, tokenizer):
    records = load_records(DataSource(dataset="keep.jsonl"), data, 0)
    rounds = calibration_rounds(records, tokenizer, 4, samples=5)
    ids = [one.ids for part in rounds for one in part]
    assert [len(part) for part in rounds] == [5] * 4
    assert len(set(ids)) == 20
    assert rounds == calibration_rounds(records, tokenizer, 4, samples=5)
    assert rounds[0] == calibration_rounds(records, tokenizer, 1, samples=5)[0]
    with pytest.raises(DataError, match=r"not enough calibration records.*round 5 of 5"):
        calibration_rounds(records, tokenizer, 5, samples=5)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is 12 + 7?", "What is 12 - 7?", False),
        ("Is x < y?", "is x > y", False),
        ("Add 1.5 to it.", "Add 1 5 to it", False),
        ("Add 15, please!", "add 15 please", True),
        ("A well-known author.", "a well known author", True),
        ("**Bold** and/or plain", "bold and or plain", True),
        ("काल", "किल", False),
        ("😀", "😢", False),
    ],
)
def test_keys_keep_what_arithmetic_needs(one, other, same):
    keys = [record.key for record in to_records([{"question": q, "answer": "a"} for q in (one, other)])]
    assert (keys[0] == keys[1]) is same


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"content": "Hi."}]}, r"no field 'role'"),
        (
            {"messages": [{"role": "tool", "content": None}, {"role": "assistant", "content": "Hi."}]},
            "what tool says is None",
        ),
        ({"conversations": [{"from": "tool", "value": "3"}]}, "a turn is from 'tool', expected one of human, gpt"),
        ({"question": "How many?", "answer": []}, "answer is an empty list"),
        ({"question": "How many?", "answer": None}, "no record has an answer.*answer is None"),
        ({"context": "A", "choices": ["b", "c"], "label": "C"}, r"label is 'C', expected one of A, B"),
        ({"context": "A", "choices": ["b", "c"], "label": 2}, "label is 2, expected one of 0, 1"),
        (
            {"context": "A", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "label": "0"},
            "label is '0', expected one of 1, 2",
        ),
        ({"question": "Which?", "choices": ["b", "c"], "answer": 1}, r"context: question, label: answer"),
        ({"text": " "}, "all texts are blank"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_in_its_own_terms(record, message):
    with pytest.raises(DataError, match=message) as caught:
        to_records([record])
    assert "Error:" not in str(caught.value)
    assert "To fix" in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "label"),
    [(["b", "c"], "B"), ({"text": ["b", "c"], "label": ["A", "B"]}, "B"), ({"text": ["b", "c"], "label": [1, 2]}, "2")],
)
def test_choices_come_with_letters_and_names_as_in_arc(choices, label):
    raw = {"question": "Which?", "choices": choices, "answerKey": label}
    (record,) = to_records([raw], "choice", {"context": "question", "label": "answerKey"})
    assert (record.choices, record.label) == (("b", "c"), 1)


def test_a_passage_to_read_is_in_the_prompt():
    raw = {"context": "It rained.", "question": "Was it dry?", "answers": {"text": ["No"], "answer_start": [0]}}
    (record,) = to_records([raw], columns={"answer": "answers"})
    assert record.prompt == "It rained.\n\nQuestion: Was it dry?\nAnswer:"
    assert record.turns == (("user", "It rained.\n\nWas it dry?"), ("assistant", "No"))


def test_blank_lines_of_running_text_are_no_records():
    records = to_records([{"text": ""}, {"text": " = A heading = \n"}, {"text": "\n"}])
    assert [record.response for record in records] == [" = A heading = \n"]


def test_numbers_are_taken_as_text():
    (record,) = to_records([{"question": "How many?", "answer": [4, 4.5]}])
    assert record.answers == ("4", "4.5")
    assert to_records([{"question": "How many?", "answer": ["", 4, None]}])[0].answers == ("4",)  # blank aliases
    assert to_records([{"text": 7}])[0].response == "7"
    for empty in (True, float("nan")):  # the second is an empty cell of a table
        with pytest.raises(DataError, match=f"answer is {empty}"):
            to_records([{"question": "How many?", "answer": empty}])


@pytest.mark.parametrize(
    "empty",
    [
        {"instruction": "Say nothing.", "output": ""},
        {"question": "Why?", "answer": None},
        {"question": "Why?", "answer": {"text": [], "answer_start": []}},  # as in SQuAD 2
        {"prompt": "Go on:", "completion": " "},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": ""}]},
        {"messages": [{"role": "user", "content": "Hi."}]},
    ],
)
def test_records_without_an_answer_are_left_out_and_counted(empty, caplog):
    name = next(n for n, form in FORMS.items() if set(empty) <= set(form))
    records = to_records([FORMS[name], empty, FORMS[name]], where="train.jsonl")
    assert len(records) == 2
    assert "train.jsonl: 1 of 3 records have no answer and are left out; the first is record 2" in caplog.text


def test_an_empty_system_turn_is_none():
    turns = [("system", ""), ("user", "Hi."), ("assistant", "Yes.")]
    (record,) = to_records([{"messages": [{"role": role, "content": said} for role, said in turns]}])
    assert record.turns == (("user", "Hi."), ("assistant", "Yes."))


def test_cells_of_a_csv_file_are_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\ufeffquestion,answer\nHow many?,72\nWhich code?,02139\nWhich version?,1.10\n", encoding="utf-8")
    assert [record.answers for record in load_records(source(path), None, 0)] == [("72",), ("02139",), ("1.10",)]
    path.write_text('question,answer\nHow many?,72\nNone?,\n"Two\nlines, and NA?",NA\n', encoding="utf-8")
    records = load_records(source(path), None, 0)
    assert [record.answers for record in records] == [("72",), ("NA",)]
    assert "Two\nlines" in records[1].prompt
    path.write_text("question,answer\na?,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 1.*3 cells.*double quotes"):
        read_records(source(path))
    path.write_text("text\n" + "long " * 100_000, encoding="utf-8")
    assert len(read_records(source(path))[0]["text"]) == 500_000


def test_which_record_comes_first_decides_nothing():
    blank, right = {"question": "a?", "answer": None}, {"question": "b?", "answer": "x"}
    assert (
        [r.answers for r in to_records([blank, right])] == [r.answers for r in to_records([right, blank])] == [("x",)]
    )
    rows = [{"instruction": f"i{n}", "output": said, "text": "both"} for n, said in enumerate((None, "x"))]
    assert [record.is_text for record in to_records(rows)] == [False]


@pytest.mark.parametrize("completion", [[], None])
def test_a_conversation_without_its_completion_is_left_out(completion):
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    whole = {"prompt": turns, "completion": [{"role": "assistant", "content": "b"}]}
    assert len(to_records([whole, {"prompt": turns, "completion": completion}])) == 1


@pytest.mark.parametrize("label", [1, 1.0, " 1", "1"])
def test_the_number_of_a_choice_may_be_written_in_several_ways(label):
    assert to_records([{"context": "A", "choices": ["b", "c"], "label": label}])[0].label == 1
