"""What turns a record into a model's inputs: a tokenizer, or a processor of images and text that has one."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from corda.errors import ModelError

# Chat templates have these themselves.
_AROUND = {"<|image_pad|>": ("<|vision_start|>", "<|vision_end|>")}


def takes_images(processing: Any) -> bool:
    """Whether images go in beside the text."""
    return isinstance(processing, ProcessorMixin) and getattr(processing, "image_processor", None) is not None


def tokenizer_of(processing: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself."""
    inner: PreTrainedTokenizerBase = processing.tokenizer if isinstance(processing, ProcessorMixin) else processing
    return inner


def image_mark(processor: Any) -> str:
    """What stands for one image in text that the processor is given.

    Raises:
        ModelError: images do not become tokens of the text in this model.
    """
    mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if not isinstance(mark, str):
        raise ModelError(
            "images are no tokens of the text in this model, so its covariances cannot be collected from them",
            where=type(processor).__name__,
            expected="a processor with an image token, as those of LLaVA, Qwen-VL and Idefics3 have",
        )
    return mark


def framed_mark(processor: Any) -> str:
    """The mark with what its model wants around it in text that no chat template renders."""
    mark = image_mark(processor)
    before, after = _AROUND.get(mark, ("", ""))
    known = tokenizer_of(processor).get_vocab() if before else {}
    return f"{before}{mark}{after}" if before in known and after in known else mark


def image_token_id(processor: Any) -> int:
    """The token that an image's features take the place of."""
    known = getattr(processor, "image_token_id", None)
    token = tokenizer_of(processor).convert_tokens_to_ids(processor.image_token) if known is None else known
    assert isinstance(token, int)
    return token
