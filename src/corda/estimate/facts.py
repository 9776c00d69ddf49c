"""What an estimate starts from: the model's shapes from its config, and how many tokens the data holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from corda import architectures, models
from corda.context.blocks import find_blocks
from corda.context.keeping import refuse_recollecting
from corda.errors import DataError, ModelError, ResourceError
from corda.estimate.counting import packed
from corda.estimate.rehearse import shared_inputs
from corda.inputs import Inputs, refuse_several
from corda.plan.byhand import by_hand
from corda.plan.make import uniform_rank
from corda.targets import LayerSpec

_SAMPLES = 256  # where a recipe has no limit and its data cannot be read
_DRAWN = 4000  # training records that are looked at
_SCALE_BYTES = {False: 4 / 64, True: 1 / 64 + 4 / (64 * 256)}  # of a 4-bit number's share in its block's scale


@dataclass(frozen=True)
class Tokens:
    """Lengths of the data in tokens.

    Attributes:
        rounds: Tokens of each calibration set: rounds, sides, held-out records.
        longest_batch: Tokens per row of the longest calibration batch, after padding.
        batches: Of one round.
        training_row: Tokens per row of the longest batch that training meets.
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
    """Model and data of a recipe, without a weight.

    Args:
        inputs: Of the recipe.
        kind: Of device.
        processes: Most that any setting has.

    Raises:
        RecipeError: the recipe trains something else than a model that continues text, or a run would refuse it.
    """

    def __init__(self, inputs: Inputs, kind: str, processes: int = 1) -> None:
        inputs.kind.refuse_unless_text("corda estimate")
        refuse_recollecting(inputs.recipe)
        if processes > 1:
            refuse_several(inputs.recipe, processes)
        self.inputs, self.recipe, self.kind = inputs, inputs.recipe, kind
        self.notes: list[str] = []

    @cached_property
    def model(self) -> PreTrainedModel:
        """On the meta device."""
        return models.skeleton(self.inputs.source, self.inputs.model)

    def build(self) -> PreTrainedModel:
        """The model anew, on whatever device is current."""
        options = self.inputs.model
        model: PreTrainedModel = architectures.loader(self._config, options.task).from_config(
            copy.deepcopy(self._config), dtype=self.dtype, trust_remote_code=options.trust_remote_code
        )
        return model

    @cached_property
    def _config(self) -> Any:
        return models.config_of(self.inputs.source, self.inputs.model)

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
    def trainable(self) -> int:
        """Trained parameters."""
        options = self.recipe.adapter
        return sum(options.cost(x.d_out, x.d_in) * self.ranks[x.name] for x in self.layers)

    @cached_property
    def factor_bytes(self) -> int:
        """Of A and B of every layer, fp32."""
        return sum((x.d_out + x.d_in) * self.ranks[x.name] for x in self.layers) * 4

    @cached_property
    def groups(self) -> dict[str, list[LayerSpec]]:
        """Distinct inputs and the layers that take each."""
        try:
            of = shared_inputs(self.build, self.layers)
        except Exception as error:  # any model's own code
            self.notes.append(
                f"every layer counted with an input of its own: the model does not run without values "
                f"({type(error).__name__})"
            )
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

    @property
    def recollects(self) -> bool:
        """Whether covariances are not kept on disk; with `auto` they are taken to be."""
        return self.recipe.context.covariances == "recollect"

    @property
    def kept_bytes(self) -> int:
        """Covariances of all rounds on disk."""
        size = sum(packed(groups) for groups in self.block_groups()) * len(self.tokens.rounds)
        return 0 if self.recollects else size

    @property
    def again_bytes(self) -> int:
        """Covariances of one block, of all rounds, that are in memory where they are collected again."""
        size = max(packed(groups) for groups in self.block_groups()) * len(self.tokens.rounds)
        return size if self.recollects else 0

    @cached_property
    def parameters(self) -> int:
        """Of the base model; tied ones once."""
        return int(self.model.num_parameters())

    @cached_property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    @cached_property
    def active(self) -> float:
        """Parameters that a token meets between embedding and head: of experts, those of the chosen ones."""
        tied = getattr(self.model.config.get_text_config(), "tie_word_embeddings", False)
        all_ = self.parameters - self.embedding() * (1 if tied else 2)
        inside = sum(p.numel() for n, p in self.model.named_parameters() if ".experts." in n)
        return float(all_ - inside * (1 - self.routed))

    @cached_property
    def routed(self) -> float:
        """Share of the experts that a token is sent to; 1 for a model without."""
        config = self.model.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        chosen = getattr(config, "num_experts_per_tok", None)
        return float(chosen / experts) if experts and chosen else 1.0

    def share(self, layer: LayerSpec) -> float:
        """Of the tokens, those that reach a layer."""
        return self.routed if ".experts." in layer.name else 1.0

    def weight_bytes(self, *, full: bool = False) -> int:
        """Of the base as it is held, or (full) in the dtype that a 4-bit base is made from."""
        size = self.dtype.itemsize
        kind = self.inputs.quantisation
        if kind is None or full:
            return self.parameters * size
        packed = sum(layer.d_in * layer.d_out for layer in self.layers)
        return round(packed * (0.5 + _SCALE_BYTES[kind.double_quant]) + (self.parameters - packed) * size)

    def touched_bytes(self, stage: Literal["collect", "plan"]) -> int:
        """Of a model on a CPU, whose file is mapped where it has the run's dtype: what the stage reads of it."""
        if self._config.dtype not in {self.dtype, None} or self.blocks is None:
            return self.weight_bytes(full=True)
        if stage == "plan":
            numbers = sum(x.d_in * x.d_out for x in self.layers)
        else:
            last = max(i for i, groups in enumerate(self.block_groups()) if groups)
            numbers = sum(p.numel() for _, block in self.blocks[: last + 1] for p in block.parameters())
        return numbers * self.dtype.itemsize

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
        r = self.recipe
        assumed: list[str] = []
        has_tokenizer = True
        try:
            _ = self.inputs.tokenizer
        except ModelError:
            has_tokenizer = False
            assumed.append("no tokenizer beside the model: every sample counted at its full length")
        rounds, row, batches = self._calibration(has_tokenizer, assumed)
        batch = r.training.per_device_train_batch_size
        lengths, records = self._drawn_lengths(assumed) if has_tokenizer else ([], 0)
        longest = [max(lengths[i : i + batch]) for i in range(0, len(lengths), batch)] or [r.data.max_length]
        return Tokens(rounds, row, batches, max(longest), batch * sum(longest) / len(longest), records, tuple(assumed))

    def _calibration(self, has_tokenizer: bool, assumed: list[str]) -> tuple[tuple[int, ...], int, int]:
        """Tokens of each set that is collected, of the longest row, and batches of the first set."""
        r, options = self.recipe, self.recipe.context
        sides = r.context_sources()
        if not sides:
            return (), 0, 0
        try:
            if has_tokenizer:
                chosen, _ = self.inputs.calibration()
                sets = tuple(sum(map(len, part)) for part in chosen)
                row = max(len(one) for part in chosen for one in part)
                return sets, row, -(-len(chosen[0]) // options.batch_size)
        except (DataError, ResourceError) as error:
            assumed.append(f"the calibration data could not be read ({error.what}): limits of the recipe counted")
        row = options.pack_to or r.data.max_length
        limits = [x for x in (options.samples and options.samples * row, options.tokens) if x]
        count = min(limits) if limits else _SAMPLES * row
        return (count,) * (options.rounds * len(sides)), row, -(-count // (row * options.batch_size))

    def _drawn_lengths(self, assumed: list[str]) -> tuple[list[int], int]:
        """Lengths of the training records in the order that the trainer's sampler draws them in its first epoch."""
        r = self.recipe
        try:
            records = self.inputs.learn_records
        except (DataError, ResourceError) as error:
            assumed.append(f"the training data could not be read ({error.what}): rows of data.max_length counted")
            return [], 0
        options = r.training
        step = options.per_device_train_batch_size * options.gradient_accumulation_steps
        count = min(len(records), _DRAWN, step * options.max_steps if options.max_steps > 0 else len(records))
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(r.seed))[:count].tolist()
        return [len(self.inputs.kind.encode(records[i])) for i in order], len(records)
