"""Tags of words: loss and accuracy per word, and F1 over spans, each with its standard error over records."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corda.evaluation.scores import Score, ratio


def tag_scores(logits: Sequence[Tensor], labels: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Score]:
    """Cross-entropy in nats per word, share of right words, and F1 of spans.

    Args:
        logits: Of n records, (words, classes) each, fp32.
        labels: Their right classes.
        classes: Names by number; B-, I- and O where F1 is to mean anything.
    """
    losses, right, found, weights = [], [], [], []
    for own, numbers in zip(logits, labels, strict=True):
        truth = torch.tensor(list(numbers), dtype=torch.long)
        guesses = own.argmax(-1)
        losses.append(-float(own.double().log_softmax(-1).gather(1, truth[:, None]).sum()))
        right.append(float((guesses == truth).sum()))
        guessed, meant = (spans([classes[i] for i in some]) for some in (guesses.tolist(), numbers))
        found.append(2.0 * len(guessed & meant))
        weights.append(float(len(guessed) + len(meant)))
    counts = [float(len(one)) for one in labels]
    n = len(counts)
    f1 = ratio(found, weights) if sum(weights) else Score(0.0, 0.0, n, (0.0,) * n)
    return {"loss": ratio(losses, counts), "accuracy": ratio(right, counts), "f1": f1}


def named_as_spans(classes: Sequence[str]) -> bool:
    """Whether classes are named O, B-... and I-..., as spans are tagged."""
    return any(name != "O" for name in classes) and all(name == "O" or name[:2] in {"B-", "I-"} for name in classes)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word behind the last) of every span; an I- behind another type or O begins one.

    Args:
        tags: B-type, I-type or O of every word.
    """
    found = set()
    kind, start = "", -1
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if start >= 0 and (prefix != "I" or name != kind):
            found.add((kind, start, i))
            start = -1
        if start < 0 and prefix in {"B", "I"}:
            kind, start = name, i
    return found
