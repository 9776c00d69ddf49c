"""Log-likelihoods of given tokens: answer loss, perplexity, multiple choice. Independent of the batch size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda.data.batches import Encoded, adds_bos, batches, encode_segments
from corda.data.formats import Record
from corda.data.rendering import Segment
from corda.evaluation.scores import Score, mean, ratio
from corda.processing import tokenizer_of
from corda.progress import Progress, silent
from corda.sharding import device_of, in_parts

_GAP = re.compile(r"(?<!\S)_(?!\w)")


@torch.no_grad()
def token_losses(
    model: nn.Module, encoded: Sequence[Encoded], pad_token_id: int, batch_size: int, progress: Progress = silent
) -> list[Tensor]:
    """Negative log-likelihood in nats of every response token, one 1-D fp32 tensor per record, in order given.

    Args:
        model: Any causal language model.
        encoded: Records as tokens.
        pad_token_id: Of pads, which never count.
        batch_size: Rows per forward pass; does not change the result.
        progress: Shows how far it is.
    """
    device = device_of(model)
    order = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    losses: list[Tensor] = [torch.empty(0)] * len(encoded)
    parts = progress(
        batches(encoded, pad_token_id, batch_size, response_only=True), "likelihood", -(-len(encoded) // batch_size)
    )
    done = 0
    for cpu_batch in parts:
        batch = cpu_batch.to(device)
        # Most of a prompt's logits are never looked at, and the head is a good part of a small model.
        kept = batch.counts[:, 1:].any(dim=0).nonzero()[:, 0]
        slot = torch.zeros(batch.input_ids.shape[1], dtype=torch.long, device=device)
        slot[kept] = torch.arange(len(kept), device=device)
        # In parts, the last layer's output is not where `kept` is.
        chosen = {} if in_parts(model) else {"logits_to_keep": kept}
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **chosen,
            **(batch.more or {}),
        ).logits
        if logits.shape[1] != len(kept):  # not asked for, or not heeded
            logits = logits[:, kept]
        for row in range(batch.input_ids.shape[0]):
            wanted = batch.counts[row, 1:].nonzero()[:, 0]
            scores = logits[row, slot[wanted]].float().log_softmax(-1)
            targets = batch.input_ids[row, 1:][wanted]
            losses[order[done + row]] = -scores.gather(1, targets[:, None])[:, 0].cpu()
        done += batch.input_ids.shape[0]
    return losses


def answer_loss(
    model: nn.Module, encoded: Sequence[Encoded], pad_token_id: int, batch_size: int, progress: Progress = silent
) -> Score:
    """Mean loss per response token, in nats; the standard error is over records, long ones weighing more.

    Args:
        model: Any causal language model.
        encoded: Records as tokens.
        pad_token_id: Of pads, which never count.
        batch_size: Rows per forward pass; does not change the result.
        progress: Shows how far it is.
    """
    losses = token_losses(model, encoded, pad_token_id, batch_size, progress)
    return ratio([float(loss.double().sum()) for loss in losses], [float(loss.numel()) for loss in losses])


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    pad_token_id: int,
    batch_size: int,
    window: int,
    progress: Progress = silent,
) -> Score:
    """exp of the mean loss per token of the joined texts, cut into windows; n is the number of windows.

    Texts follow each other as they are given, with a line break between two where neither has white space there.

    Each window's first token does not count: it has no context, or is the mark that the tokenizer begins any text with,
    which then begins every window. The standard error is that of the loss, times the perplexity.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        records: Running texts.
        pad_token_id: Of pads, which never count.
        batch_size: Rows per forward pass; does not change the result.
        window: Tokens per window.
        progress: Shows how far it is.
    """
    text = ""
    for record in records:
        apart = not text or text[-1].isspace() or record.response[:1].isspace()
        text += record.response if apart else f"\n{record.response}"
    ids = encode_segments([Segment(text, True)], tokenizer).ids
    # Models that were trained with that mark need it in front of any text.
    first = ids[:1] if adds_bos(tokenizer_of(tokenizer)) else ()
    body, room = ids[len(first) :], max(1, window - len(first))
    windows = [(*first, *body[i : i + room]) for i in range(0, len(body), room)]
    encoded = [Encoded(w, (False, *[True] * (len(w) - 1))) for w in windows if len(w) > 1]
    loss = answer_loss(model, encoded, pad_token_id, batch_size, progress)
    value = math.exp(loss.value)
    return loss.scaled(value, value)


def _gap(prompt: str) -> re.Match[str] | None:
    gaps = list(_GAP.finditer(prompt))
    return gaps[0] if len(gaps) == 1 and re.search(r"\w", prompt[gaps[0].end() :]) else None


def choice_texts(record: Record, prompt: str) -> list[tuple[str, str]]:
    """For each choice what stands before what is scored, and that.

    Args:
        record: With choices.
        prompt: Holds {context}.
    """
    texts = []
    for choice in record.choices:
        if gap := _gap(record.prompt):
            before, after = record.prompt[: gap.start()], record.prompt[gap.end() :]
            texts.append((prompt.format(context=before.rstrip() + " " + choice), after))
        else:
            texts.append((prompt.format(context=record.prompt), " " + choice))
    return texts


def choice_accuracy(
    model: nn.Module,
    tokenizer: Any,
    records: Sequence[Record],
    pad_token_id: int,
    batch_size: int,
    prompt: str = "{context}",
    progress: Progress = silent,
) -> Score:
    """Share of records whose right choice has the highest likelihood per byte (lm-eval's acc_bytes).

    Where the context has one gap, a "_" by itself with words behind it (WinoGrande), each choice is put into it and
    what follows the gap is scored.

    Args:
        model: Any causal language model.
        tokenizer: Its tokenizer.
        records: With choices and the right one's index.
        pad_token_id: Of pads, which never count.
        batch_size: Rows per forward pass; does not change the result.
        prompt: Holds {context}.
        progress: Shows how far it is.
    """
    encoded: list[Encoded] = []
    lengths: list[int] = []
    for record in records:
        for context, continuation in choice_texts(record, prompt):
            encoded.append(encode_segments([Segment(context, False), Segment(continuation, True)], tokenizer))
            lengths.append(len(continuation.strip().encode()))
    losses = token_losses(model, encoded, pad_token_id, batch_size, progress)
    right, position = [], 0
    for record in records:
        span = range(position, position + len(record.choices))
        position += len(record.choices)
        per_byte = [float(losses[i].double().sum()) / lengths[i] for i in span]
        right.append(float(per_byte.index(min(per_byte)) == record.label))
    return mean(right)
