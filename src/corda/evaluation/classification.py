"""Classes of texts: loss, accuracy and F1 of a classifier, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from corda.data.batches import Encoded, batches
from corda.evaluation.scores import Score, mean, ratio
from corda.progress import Progress, silent
from corda.sharding import device_of

METRICS = ("loss", "accuracy", "f1")


@torch.no_grad()
def class_logits(
    model: nn.Module, encoded: Sequence[Encoded], pad_token_id: int, batch_size: int, progress: Progress = silent
) -> list[Tensor]:
    """Logits of every text, n tensors (classes,) or for each of its L tokens (L, classes), fp32 on the CPU, as given.

    Args:
        model: A classifier of sequences or tokens of transformers, in eval mode.
        encoded: n texts as tokens.
        pad_token_id: Of pads, which never count.
        batch_size: Rows per forward pass; does not change the result.
        progress: Shows how far it is.
    """
    device = device_of(model)
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))  # the order of `batches`
    found: list[Tensor] = [torch.empty(0)] * len(encoded)
    done = 0
    for cpu_batch in progress(batches(encoded, pad_token_id, batch_size), "classify", -(-len(encoded) // batch_size)):
        batch = cpu_batch.to(device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **(batch.more or {})).logits
        for i, own in zip(order[done:], logits.float().cpu(), strict=False):
            found[i] = own if own.dim() == 1 else own[: len(encoded[i])]
        done += len(logits)
    return found


def class_scores(logits: Tensor, labels: Sequence[int]) -> dict[str, Score]:
    """Cross-entropy in nats, share of right classes, and F1.

    Args:
        logits: (n, classes), fp32.
        labels: The n right classes.
    """
    truth = torch.tensor(labels)
    losses = -logits.double().log_softmax(-1).gather(1, truth[:, None])[:, 0]
    guesses = logits.argmax(-1)
    return {
        "loss": mean(losses.tolist()),
        "accuracy": mean((guesses == truth).double().tolist()),
        "f1": f1(guesses.tolist(), labels, logits.shape[1]),
    }


def f1(guesses: Sequence[int], labels: Sequence[int], classes: int) -> Score:
    """2 TP / (2 TP + FP + FN) of class 1 where there are two, as GLUE has it; else the mean over all classes.

    A class that is neither guessed nor right anywhere counts with 0.

    Args:
        guesses: n numbers of classes.
        labels: The n right ones.
        classes: How many there are.
    """
    found = [_f1(guesses, labels, number) for number in ([1] if classes == 2 else range(classes))]
    n, k = len(labels), len(found)
    pulls = tuple(sum(one.influence[i] if one.influence else 0.0 for one in found) / k for i in range(n))
    value = sum(one.value for one in found) / k
    stderr = abs(value) if n == 1 else math.sqrt(sum(p * p for p in pulls) * n / (n - 1))
    return Score(value, stderr, n, pulls if n > 1 else ())


def _f1(guesses: Sequence[int], labels: Sequence[int], number: int) -> Score:
    """Of one class: a ratio of two sums over records, whose standard error is linearised."""
    guessed, right = ([float(one == number) for one in some] for some in (guesses, labels))
    weights = [g + r for g, r in zip(guessed, right, strict=True)]
    if not sum(weights):
        return Score(0.0, 0.0, len(labels), (0.0,) * len(labels))
    return ratio([2 * g * r for g, r in zip(guessed, right, strict=True)], weights)
