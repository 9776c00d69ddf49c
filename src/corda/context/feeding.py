"""What a model's body is called with for a batch: decoders, encoders, and encoders with a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda.architectures import carrying
from corda.data.batches import Batch, Encoded
from corda.errors import CalibrationError


def two_sequences(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder with inputs of their own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Whether a model generates, or any of its attention layers looks back only."""
    can_generate: Any = getattr(model, "can_generate", None)
    looks_back = (getattr(module, "is_causal", False) is True for module in model.modules())
    return (callable(can_generate) and bool(can_generate())) or any(looks_back)


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a decoder body for a batch.

    Packed rows go without a mask: from positions that start again, transformers makes one that keeps records (and the
    pads behind them) apart, in the form that each layer's attention wants, windows included. Where positions are
    those that a model counts itself, it is left to it: not all of them begin at 0. A model of images and
    text makes its own positions.
    """
    more = batch.more or {}
    if batch.visual:
        tokens = {} if "inputs_embeds" in more else {"input_ids": batch.input_ids}
        return tokens | {"attention_mask": batch.attention_mask, "use_cache": False, **more}
    told = batch.packed or not bool(batch.attention_mask[:, 0].all())
    return {
        "input_ids": batch.input_ids,
        "attention_mask": None if batch.packed else batch.attention_mask,
        **({"position_ids": batch.position_ids} if told else {}),
        "use_cache": False,
        **more,
    }


def encoder_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments of an encoder.

    Raises:
        CalibrationError: rows of several records, which attention without direction cannot keep apart.
    """
    if batch.packed:
        raise CalibrationError(
            "an encoder cannot keep the records of one window apart",
            where="context.pack_to",
            fix="leave context.pack_to out",
        )
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **(batch.more or {})}


def feeder(model: nn.Module) -> Callable[[Batch], dict[str, Any]]:
    """What makes the keyword arguments of a model's body of a batch.

    Args:
        model: To be fed.

    Raises:
        CalibrationError: by what is returned, for rows of several records that the model cannot keep apart.
    """
    if not is_causal(model):
        return encoder_inputs
    layer = carrying(model)

    def one_by_one(batch: Batch) -> dict[str, Any]:
        if batch.packed:
            refuse_windows(layer)
        return model_inputs(batch)

    return one_by_one


def refuse_windows(layer: str | None) -> None:
    """Refuse windows of several records for a model whose layers do not keep them apart.

    Args:
        layer: One that carries a state along the row, if there is any.

    Raises:
        CalibrationError: there is.
    """
    if layer is not None:
        raise CalibrationError(
            "the records of one window are not kept apart by a layer that carries a state along it",
            where="context.pack_to",
            got=layer,
            fix="leave context.pack_to out",
        )


def fed_as_two(encoded: Sequence[Encoded], start: int) -> list[dict[str, Tensor]]:
    """Records one by one, (1, L) ids, for a model of two sequences: prompt to the encoder, answer to the decoder.

    Running text goes to both. The decoder's input is the answer shifted right by its start token.

    Args:
        encoded: Records as tokens.
        start: The decoder's start token.
    """
    fed = []
    for one in encoded:
        answer = [t for t, r in zip(one.ids, one.response, strict=True) if r]
        prompt = [t for t, r in zip(one.ids, one.response, strict=True) if not r] or answer
        if answer:
            fed.append(
                {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *answer[:-1]]])}
            )
    return fed
