"""Answer loss and exact match of models with an encoder for the question and a decoder for the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from corda.data.batches import IGNORED, pad_id
from corda.evaluation.evaluate import Task
from corda.evaluation.generation import Answer, cut, end_tokens, judged
from corda.evaluation.scores import Score, mean, ratio
from corda.progress import Progress, silent
from corda.sharding import device_of

Batches = Sequence[tuple[Sequence[int], Mapping[str, Tensor]]]


@torch.no_grad()
def answer_loss(model: nn.Module, batches: Batches, tokenizer: Any, progress: Progress = silent) -> Score:
    """Mean loss per token of the answers without the mark that ends them, in nats.

    Args:
        model: With an encoder and a decoder, in eval mode.
        batches: Numbers of records, and (B, L) ids of prompts with labels (B, M) and what the decoder is fed.
        tokenizer: For the end mark.
        progress: Shows how far it is.
    """
    device, end = device_of(model), tokenizer.eos_token_id
    sums, counts = dict[int, float](), dict[int, float]()
    for rows, cpu_batch in progress(batches, "likelihood", len(batches)):
        batch = {name: value.to(device) for name, value in cpu_batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        counted = (labels != IGNORED) & (labels != (IGNORED if end is None else end))
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        ).double()
        for r, i in enumerate(rows):
            sums[i], counts[i] = float(losses[r][counted[r]].sum()), float(counted[r].sum())
    return ratio([sums[i] for i in range(len(sums))], [counts[i] for i in range(len(counts))])


@torch.no_grad()
def exact_match(
    model: nn.Module, batches: Batches, tokenizer: Any, task: Task, progress: Progress = silent
) -> tuple[Score, list[Answer]]:
    """Share of records whose greedy generation, normalised, equals an accepted answer; see `generation.exact_match`.

    Args:
        model: With an encoder and a decoder, in eval mode.
        batches: Numbers of the task's records, and (B, L) ids of their prompts.
        tokenizer: The model's.
        task: With the accepted answers, stop strings and longest answer.
        progress: Shows how far it is.
    """
    device, options = device_of(model), task.options
    generator: Any = model
    texts = [""] * len(task.records)
    for rows, cpu_batch in progress(batches, "generate", len(batches)):
        ids = cpu_batch["input_ids"].to(device)
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            num_beams=1,
            # What is left unset, transformers fills from the checkpoint's own defaults.
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            encoder_no_repeat_ngram_size=0,
            min_length=0,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=end_tokens(model, tokenizer),
            decoder_start_token_id=int(cpu_batch["decoder_input_ids"][0, 0]),
        )
        out = generator.generate(
            input_ids=ids, attention_mask=cpu_batch["attention_mask"].to(device), generation_config=config
        )
        for r, i in enumerate(rows):
            said = tokenizer.decode(out[r], skip_special_tokens=True)
            texts[i] = cut(said, options.stop)
    answers = [judged(record, text, options.answer_after) for record, text in zip(task.records, texts, strict=True)]
    return mean([float(answer.right) for answer in answers]), answers
