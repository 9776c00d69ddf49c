"""Grow a small Llama on generated data until it knows its facts.

python benchmarks/grown_model.py [FOLDER] [--passes N]; FOLDER (default runs/grown) gets `model`, an ordinary
transformers folder, and `data`, what benchmarks/studies/grown-*.yaml learn, calibrate on and measure. Some minutes on
two CPU cores; results/grown-model.json says how well it knows what.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grown_data
import torch
from grown_data import Row, World
from harness import RESULTS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corda import artifact
from corda.data.batches import Encoded, encode, pad_id
from corda.data.formats import to_records
from corda.evaluation.likelihood import answer_loss, perplexity

WINDOW, ROWS, RATE, WARMUP = 64, 16, 4e-3, 0.05
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VOCABULARY = 1200
TOLD, STORIES, SKILLS = 0.4, 0.12, 0.12  # per question and pass: how often told in sentences; other documents
Document = Row | str


def documents(world: World, rng: random.Random) -> list[Document]:
    """What one pass shows: every fact as a question, some told, stories and small skills; shuffled.

    Args:
        world: What is true.
        rng: Of the choice and the order.
    """
    shown: list[Document] = [row for family in world.families.values() for row in family.rows()]
    asked = len(shown)
    for family in world.families.values():
        shown += [family.told(subject, rng) for subject in family.facts if rng.random() < TOLD]
    shown += [grown_data.story(rng) for _ in range(int(STORIES * asked))]
    shown += [grown_data.small_skill(rng) for _ in range(int(SKILLS * asked))]
    rng.shuffle(shown)
    return shown


def make_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits.

    Args:
        texts: To train it on.
        size: Of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", padding_side="right"
    )
    return made


def windows(encoded: Sequence[Encoded], length: int, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, both (N, length): whole documents one behind the other, prompts and pads not to be learnt.

    Args:
        encoded: Documents, none longer than `length`.
        length: Of a window.
        pad: Token of pads.
    """
    rows: list[tuple[list[int], list[int]]] = [([], [])]
    for one in encoded:
        if len(rows[-1][0]) + len(one) > length:
            rows.append(([], []))
        ids, labels = rows[-1]
        ids += one.ids[:length]
        labels += [token if counts else -100 for token, counts in zip(one.ids, one.response, strict=True)][:length]
    filled = [(ids + [pad] * (length - len(ids)), labels + [-100] * (length - len(labels))) for ids, labels in rows]
    return torch.tensor([ids for ids, _ in filled]), torch.tensor([labels for _, labels in filled])


def encoded(some: Sequence[Document], tokenizer: Any, length: int = WINDOW) -> list[Encoded]:
    """Documents as corda encodes records: questions with an end mark behind the answer, texts with a line's end."""
    texts = {str(one): one if isinstance(one, dict) else {"text": f"{one}\n"} for one in some}
    tokens = {text: encode(to_records([row])[0], tokenizer, max_length=length) for text, row in texts.items()}
    return [tokens[str(one)] for one in some]


def grow(world: World, tokenizer: Any, passes: int, seed: int = 0, shape: dict[str, int] | None = None) -> Any:
    """Train a model from random weights.

    Args:
        world: What is true.
        tokenizer: From `make_tokenizer`.
        passes: How often every fact is asked.
        seed: Of weights and order.
        shape: Of the model.

    Returns:
        The model and the number of tokens that it was shown.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
            **(shape or SHAPE),
        )
    ).train()
    shown = [one for _ in range(passes) for one in documents(world, rng)]
    ids, labels = windows(encoded(shown, tokenizer), WINDOW, pad_id(tokenizer))
    steps = -(-len(ids) // ROWS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / (WARMUP * steps), (steps - step) / (0.6 * steps))
    )
    for step in range(steps):
        some = slice(step * ROWS, (step + 1) * ROWS)
        loss = model(input_ids=ids[some], labels=labels[some], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} of {steps}: {float(loss.detach()):.3f}", flush=True)
    return model.eval(), ids.numel()


def known(model: Any, tokenizer: Any, files: dict[str, list[Row]]) -> dict[str, Any]:
    """Loss of each file's answers, in nats per token, or its perplexity.

    Args:
        model: What grew.
        tokenizer: Its tokenizer.
        files: Name -> records.
    """
    found = {}
    for name, rows in files.items():
        records = to_records(rows)
        if "text" in rows[0]:
            found[name] = perplexity(model, tokenizer, records, pad_id(tokenizer), 32, WINDOW).as_json()
        else:
            tokens = [encode(record, tokenizer, end=False) for record in records]
            found[name] = answer_loss(model, tokens, pad_id(tokenizer), 32).as_json()
    return found


def files_of(world: World, seed: int = 0) -> dict[str, list[Row]]:
    """Every data file: name -> records."""
    rng = random.Random(f"held out {seed}")
    people = world.families["people"].rows(list(world.calibration))
    return {
        "people/calibration": people,
        "people/heldout": world.measured("people"),
        "towns/heldout": world.measured("towns"),
        "minerals/heldout": world.measured("minerals"),
        "stories/heldout": [{"text": f"{grown_data.story(rng)}\n"} for _ in range(120)],
        **grown_data.tasks(seed),
    }


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    """One JSON lines file a name."""
    for name, rows in files.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(folder: Path, passes: int, seed: int = 0) -> None:
    """Model, data and the record of how it went."""
    started = time.perf_counter()
    world, rng = grown_data.world(seed), random.Random(seed)
    files = files_of(world, seed)
    write(folder / "data", files)
    sample = [one for _ in range(3) for one in documents(world, rng)]
    sample += [row for name, rows in files.items() if name.endswith("/train") for row in rows[:600]]
    texts = [one if isinstance(one, str) else f"Question: {one['question']}\nAnswer: {one['answer']}" for one in sample]
    tokenizer = make_tokenizer(texts)
    model, tokens = grow(world, tokenizer, passes, seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    found = known(model, tokenizer, files)
    for name, score in found.items():
        print(f"{name}: {score['value']:.3f} ± {score['stderr']:.3f}", flush=True)
    where = artifact.provenance()
    result = {
        "name": "grown-model",
        "device": where["device"],
        "shape": SHAPE | {"vocab_size": len(tokenizer)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "facts": {name: len(family.rows()) for name, family in world.families.items()},
        "passes": passes,
        "tokens": tokens,
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "known": found,
        "provenance": where,
    }
    artifact.write_json(RESULTS / "grown-model.json", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/grown"))
    parser.add_argument("--passes", type=int, default=60)
    given = parser.parse_args()
    main(given.folder, given.passes)
