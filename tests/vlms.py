"""Random vision-language models of three layouts, a few thousand weights each, with processors made here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.conftest import byte_tokenizer, write_jsonl

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = {"red": (220, 30, 20), "green": (10, 200, 60), "blue": (20, 40, 230), "white": (240, 240, 240)}


def picture(colour: str, width: int = 24, height: int = 16) -> Image.Image:
    """A colour with a dark stripe in it."""
    image = Image.new("RGB", (width, height), COLOURS[colour])
    image.paste((5, 5, 5), (0, 0, width // 3, height))
    return image


def records(folder: Path, n: int = 12) -> list[dict[str, Any]]:
    """Questions about images that lie beside the data."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(n):
        colour = sorted(COLOURS)[i % len(COLOURS)]
        name = f"images/{colour}-{i}.png"
        picture(colour, 20 + 2 * i, 16).save(folder / name)
        found.append({"image": name, "question": f"Which colour is number {i}?", "answer": colour})
    return found


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def _text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        **more,
    }


def llava() -> tuple[PreTrainedModel, Any]:
    """LLaVA-1.5: CLIP, an MLP, Llama; 4 tokens an image."""
    tokenizer = _tokenizer("<image>")
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=24,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text(len(tokenizer))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    square = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    return LlavaForConditionalGeneration(config), processor


class _ImagesOnly(Qwen2VLProcessor):
    """Qwen2-VL's processor without videos, whose part of it needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def qwen() -> tuple[PreTrainedModel, Any]:
    """Qwen2-VL: images of any shape, three numbers for a position; a token for 8 x 8 pixels."""
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    known = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=_text(
            len(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        ),
        image_token_id=known("<|image_pad|>"),
        video_token_id=known("<|video_pad|>"),
        vision_start_token_id=known("<|vision_start|>"),
        vision_end_token_id=known("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 128, "longest_edge": 768}
    )
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen2VLForConditionalGeneration(config), _ImagesOnly(images, tokenizer, None, chat_template=template)


def idefics() -> tuple[PreTrainedModel, Any]:
    """Idefics3, the layout of SmolVLM: SigLIP, pixel shuffle, Llama; wide images are split into frames of 4 tokens."""
    places = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    tokenizer = _tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places)
    config = Idefics3Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        text_config=LlamaConfig(**_text(len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT.replace("IMAGE", "<image>"))
    return Idefics3ForConditionalGeneration(config), processor


LAYOUTS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {"llava": llava, "qwen": qwen, "idefics": idefics}


def save(layout: str, folder: Path) -> Any:
    """A folder with such a model, and its processor, in it where it can be."""
    torch.manual_seed(0)
    model, processor = LAYOUTS[layout]()
    model.save_pretrained(folder)
    if layout != "qwen":
        processor.save_pretrained(folder)
    return processor


def recipe(folder: Path) -> dict[str, Any]:
    """A recipe of KPM, as YAML gives it, on a tiny model and data that are written into the folder."""
    save("llava", folder / "model")
    found = records(folder / "data", 16)
    for name, part in {"learn": found[:6], "keep": found[6:12], "test": found[12:]}.items():
        write_jsonl(folder / "data" / f"{name}.jsonl", part)
    return {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(folder / "model"), "device": "cpu"},
        "data": {"data_dir": str(folder / "data"), "learn": "learn.jsonl", "keep": "keep.jsonl"},
        "adapter": {"mode": "kpm", "rank": 4},
        "training": {"max_steps": 2, "learning_rate": 0.002, "per_device_train_batch_size": 6, "warmup_steps": 0},
        "evaluation": {
            "tasks": {
                "colours": {
                    "dataset": "test.jsonl",
                    "measures": "learn",
                    "metrics": ["answer_loss", "exact_match"],
                    "max_new_tokens": 3,
                }
            }
        },
    }
