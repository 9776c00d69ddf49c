"""What an estimate starts from: the model's shapes from its config, and how many tokens the data holds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from corda import architectures, models
from corda.context.blocks import find_blocks
from corda.data.batches import calibration_rounds, encode
from corda.errors import DataError, ModelError, ResourceError
from corda.estimate.rehearse import shared_inputs
from corda.inputs import Inputs
from corda.plan.byhand import by_hand
from corda.plan.make import uniform_rank
from corda.targets import LayerSpec

_SCALE_BYTES = {False: 4 / 64, True: 1 / 64 + 4 / (64 * 256)}  # of a 4-bit number's share in its block's scale


@dataclass(frozen=True)
class Tokens:
    """Lengths of the data in tokens.

    Attributes:
        rounds: Tokens of each calibration round.
        longest_batch: Tokens per row of the longest calibration batch, after padding.
        batches: Of one round.
        training_row: Tokens per row of the longest batch that training will probably meet.
        training_tokens: Mean tokens of a training batch, with padding.
        training_records: How many there are.
        assumed: What could not be read, and what was assumed for it.
    """

    rounds: tuple[int, ...]
    longest_batch: int
    batches: int
    training_row: int
    training_tokens: float
    training_records: int
    assumed: tuple[str, ...]


class Facts:
    """Model and data of a recipe, without a weight."""

    def __init__(self, inputs: Inputs, kind: str) -> None:
        self.inputs, self.recipe, self.kind = inputs, inputs.recipe, kind
        self.notes: list[str] = []

    @cached_property
    def model(self) -> PreTrainedModel:
        """On the meta device."""
        return models.skeleton(self.inputs.source, self.recipe.model)

    def build(self) -> PreTrainedModel:
        """The model anew, on whatever device is current."""
        trusted = {"trust_remote_code": self.recipe.model.trust_remote_code}
        model: PreTrainedModel = architectures.loader(self._config).from_config(
            copy.deepcopy(self._config), dtype=self.dtype, **trusted
        )
        return model

    @cached_property
    def _config(self) -> Any:
        options, source = self.recipe.model, self.inputs.source
        return AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=options.trust_remote_code
        )

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of weights that are not in 4 bits."""
        if self.recipe.model.dtype != "auto":
            dtype = getattr(torch, self.recipe.model.dtype)
        else:
            dtype = torch.float32 if self.kind == "cpu" else self._config.dtype or torch.float32
        assert isinstance(dtype, torch.dtype)
        return dtype

    @cached_property
    def layers(self) -> list[LayerSpec]:
        """Target layers."""
        return self.inputs.targets

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Layer name -> rank; where ranks are allocated later, the uniform one of the budget."""
        options = self.recipe.adapter
        rank = uniform_rank(self.layers, options)
        return {layer.name: by_hand(options, layer.name).rank or rank for layer in self.layers}

    @cached_property
    def groups(self) -> dict[str, list[LayerSpec]]:
        """Distinct inputs and the layers that take each."""
        try:
            of = shared_inputs(self.build, self.layers)
        except Exception as error:  # any model's own code
            self.notes.append(f"every layer counted with an input of its own: the model does not run without values "
                              f"({type(error).__name__})")
            of = {layer.name: layer.name for layer in self.layers}
        found: dict[str, list[LayerSpec]] = {}
        for layer in self.layers:
            found.setdefault(of[layer.name], []).append(layer)
        return found

    @cached_property
    def blocks(self) -> list[tuple[str, nn.Module]] | None:
        """The decoder's blocks, or None where it cannot be streamed."""
        return find_blocks(self.model.base_model, self.model, self.layers) if self.recipe.context.stream else None

    def block_groups(self) -> list[list[tuple[str, list[LayerSpec]]]]:
        """Distinct inputs of each block; of the whole model where it is not streamed."""
        if self.blocks is None:
            return [list(self.groups.items())]
        return [
            [(group, members) for group, members in self.groups.items() if group.startswith(f"{name}.")]
            for name, _ in self.blocks
        ]

    @cached_property
    def parameters(self) -> int:
        """Of the base model; tied ones once."""
        return int(self.model.num_parameters())

    @cached_property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    def weight_bytes(self, *, full: bool = False) -> int:
        """Of the base as it is held, or (full) in the dtype that a 4-bit base is made from."""
        size = self.dtype.itemsize
        kind = self.inputs.quantisation
        if kind is None or full:
            return self.parameters * size
        packed = sum(layer.d_in * layer.d_out for layer in self.layers)
        return round(packed * (0.5 + _SCALE_BYTES[kind.double_quant]) + (self.parameters - packed) * size)

    def block_bytes(self) -> int:
        """Of the largest block and the embedding, in full precision."""
        if self.blocks is None:
            return self.weight_bytes(full=True)
        largest = max(sum(p.numel() for p in block.parameters()) for _, block in self.blocks)
        return (largest + self.embedding()) * self.dtype.itemsize

    def embedding(self) -> int:
        """Numbers in the input embedding."""
        return int(self.model.get_input_embeddings().weight.numel())

    @cached_property
    def tokens(self) -> Tokens:
        """From the data where it can be read, else from the recipe's limits."""
        r, assumed = self.recipe, []
        try:
            tokenizer = self.inputs.tokenizer
        except ModelError:
            tokenizer = None
            assumed.append("no tokenizer beside the model: every sample counted at its full length")
        rounds, row, batches = self._calibration(tokenizer, assumed)
        steps = r.training.max_steps if r.training.max_steps > 0 else 1_000_000
        lengths = self._training_lengths(tokenizer, assumed)
        batch = r.training.per_device_train_batch_size
        drawn = min(steps * batch * r.training.gradient_accumulation_steps, len(lengths) or 1)
        probable = lengths[min(len(lengths) - 1, len(lengths) * drawn // (drawn + 1))] if lengths else r.data.max_length
        typical = _mean_longest(lengths, batch) if lengths else float(r.data.max_length)
        return Tokens(rounds, row, batches, probable, typical * batch, len(lengths), tuple(assumed))

    def _calibration(self, tokenizer: Any, assumed: list[str]) -> tuple[tuple[int, ...], int, int]:
        r, options = self.recipe, self.recipe.context
        if r.context_source() is None:
            return (), 0, 0
        try:
            if tokenizer is None:
                raise ModelError("no tokenizer")
            chosen = calibration_rounds(
                self.inputs.context_records,
                tokenizer,
                options.rounds,
                template=r.data.template,
                max_length=r.data.max_length,
                samples=options.samples,
                tokens=options.tokens,
                pack_to=options.pack_to,
                seed=r.seed,
            )
        except (DataError, ModelError, ResourceError) as error:
            if tokenizer is not None:
                assumed.append(f"the calibration data could not be read ({error.what}): limits of the recipe counted")
            row = min(options.pack_to or r.data.max_length, r.data.max_length if options.pack_to is None else 1 << 60)
            limits = [x for x in (options.samples and options.samples * row, options.tokens) if x]
            count = min(limits) if limits else 256 * row
            return (count,) * options.rounds, row, -(-count // (row * options.batch_size))
        rounds = tuple(sum(map(len, part)) for part in chosen)
        return rounds, max(len(one) for part in chosen for one in part), -(-len(chosen[0]) // options.batch_size)

    def _training_lengths(self, tokenizer: Any, assumed: list[str]) -> list[int]:
        r = self.recipe
        if tokenizer is None:
            return []
        try:
            records = self.inputs.learn_records
        except (DataError, ResourceError) as error:
            assumed.append(f"the training data could not be read ({error.what}): rows of data.max_length counted")
            return []
        some = records[:: max(1, len(records) // 1000)]
        return sorted(len(encode(x, tokenizer, template=r.data.template, max_length=r.data.max_length)) for x in some)


def _mean_longest(lengths: Sequence[int], batch: int) -> float:
    """Expected length of the longest of `batch` records, for lengths in ascending order."""
    n = len(lengths)
    return sum(x * (((i + 1) / n) ** batch - (i / n) ** batch) for i, x in enumerate(lengths))
