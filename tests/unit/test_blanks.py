"""Tokenizers that put a blank in front of any text, as LLaMA-2 has; a record in pieces has none more than in one."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from corda.data.batches import encode
from corda.data.formats import to_records

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def made(kind: str) -> PreTrainedTokenizerFast:
    letters = sorted(set("Question:Answer<|user|>assistant,HiParisWhat."))
    words = ["▁Paris", "Paris", "▁Hi", "Hi"]
    merges: list[tuple[str, str]] = []
    for word in words:
        merges += [(word[:i], word[i]) for i in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    whole = [one + two for one, two in merges]
    special = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{b:02X}>" for b in range(256)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*special, *byte, "▁", *letters, *whole]))}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if kind == "prepended":  # LLaMA-2's tokenizer.json
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)


@pytest.mark.parametrize("kind", ["prepended", "metaspace"])
@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_answers_tokens_are_those_of_the_whole_text(kind: str, template: str) -> None:
    tokenizer = made(kind)
    (record,) = to_records([{"question": "Hi", "answer": "Paris"}])
    encoded = encode(record, tokenizer, template=template)
    turns = [{"role": role, "content": said} for role, said in record.turns]
    text = {
        "plain": f"{record.prompt}{record.response}</s>",
        "chat": tokenizer.apply_chat_template(turns, tokenize=False),
    }[template]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = [i for i, mine in zip(encoded.ids, encoded.response, strict=True) if mine]
    assert tokenizer.convert_ids_to_tokens(answer)[0] == ("▁Paris" if template == "plain" else "Paris")
    assert answer == whole[-len(answer) :]


def test_a_tokenizer_without_such_blanks_sees_each_piece_alone(tokenizer) -> None:
    (record,) = to_records([{"instruction": "Add.", "output": "Paris"}])
    encoded = encode(record, tokenizer)
    answer = [i for i, mine in zip(encoded.ids, encoded.response, strict=True) if mine]
    assert answer[:-1] == tokenizer(record.response, add_special_tokens=False)["input_ids"]
