"""The run's model in the forms that its stages need; one of them in memory at a time."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from corda import adapter, models
from corda.context.again import Recollected, march
from corda.context.capture import Captured
from corda.context.store import Context
from corda.data.batches import pad_id
from corda.errors import CheckError
from corda.exporting.check import allowed, probe_logits
from corda.inputs import Inputs
from corda.metric import full_precision
from corda.offload import LazyWeights, empty_model
from corda.options import ModelOptions
from corda.plan.plan import Plan
from corda.quantization import round_trip

STEP0_TOLERANCE = {torch.float32: 1e-5}
_LOOSE = 2e-2


class Bases:
    """The base model of a run: bare, as an empty shell, or with an adapter on it.

    Attributes:
        live: What is in memory now.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.recipe = inputs, inputs.recipe
        self.live: PreTrainedModel | PeftModel | None = None

    def bare(self) -> PreTrainedModel:
        """The base without an adapter."""
        if self.live is None or isinstance(self.live, PeftModel):
            self.live = None
            gc.collect()
            self.live = models.load(self.inputs.model).model
        return self.live

    def for_context(self) -> tuple[PreTrainedModel, LazyWeights | None]:
        """The base, or with off-loading or in 4 bits its empty shell and where weights in full precision come from."""
        if not self.recipe.context.offload and self.inputs.quantisation is None:
            return self.bare(), None
        shell = self.shell()
        return shell, LazyWeights(self.inputs.source, shell, self.dtype())

    def collecting_again(self, context: Context, batch_size: int, threads: int) -> Context:
        """The context with covariances that the base as it is before training gives block by block; see `Recollected`.

        Args:
            context: One whose covariances were not kept.
            batch_size: That they were collected with.
            threads: Of torch, that they were collected with.
        """
        options = self.recipe.context

        def start() -> Iterator[Captured]:
            chosen, _ = self.inputs.calibration()
            model, weights = self.for_context()
            return march(
                model,
                chosen,
                self.inputs.targets,
                pad_token_id=pad_id(self.inputs.tokenizer),
                batch_size=batch_size,
                response_only=options.positions == "response",
                weights=weights,
                device=models.pick_device(self.recipe.model.device),
            )

        parts = context.rounds + len(context.sides)
        return replace(context, packed=Recollected(context.tokens, start, parts, threads))

    def shell(self) -> PreTrainedModel:
        """The base without weights."""
        return empty_model(self.inputs.source, self.inputs.model, self.dtype())

    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return models.pick_dtype(self.inputs.model, self.inputs.source)

    def quantise(self) -> Callable[[Tensor], Tensor] | None:
        """W (d_out, d_in) -> Q(W), of the same shape, of a 4-bit base, None for any other."""
        kind = self.inputs.quantisation
        return None if kind is None else functools.partial(round_trip, kind=kind, dtype=self.dtype())

    def for_export(self) -> ModelOptions:
        """The base that an export is for: as in the run; in full precision, on the CPU, where it was quantised anew.

        A checkpoint that is stored in 4 bits stays so.
        """
        full = self.inputs.exports_in_full
        changed: dict[str, Any] = {"load_in_4bit": False} if full else {}
        # PEFT cannot load an adapter onto off-loaded layers; and what is there in 4 bits may not fit a GPU in 16.
        if self.recipe.model.device_map is not None or full:
            changed |= {"device_map": None, "device": "cpu", "dtype": str(self.dtype()).removeprefix("torch.")}
        return self.inputs.model.model_copy(update=changed)

    @full_precision()
    def attached(self, plan: Plan) -> tuple[PeftModel, dict[str, Any]]:
        """The base with the plan's adapter at its start, and how far its logits are from the base's.

        Raises:
            CheckError: the adapter changes the model before training.
        """
        base, probe = self.bare(), self.probe()
        reference = probe_logits(base, probe)
        dtype = base.dtype
        base.eval()
        four_bit = self.inputs.quantisation is not None
        form = self.recipe.adapter.form(four_bit)
        tolerance = STEP0_TOLERANCE.get(dtype, _LOOSE)
        if (
            tolerance == _LOOSE and form == "residual" and not four_bit
        ):  # W - BA is rounded: as much as this model shows
            tolerance = max(tolerance, allowed(base, [layer.name for layer in plan.layers], probe))
        weights = self.for_context()[1] if four_bit and form == "residual" else None
        model = adapter.attach(base, plan, base=form, seed=self.recipe.seed, weights=weights.get if weights else None)
        for config in model.peft_config.values():  # so that readers of the adapter load the very base
            config.revision = self.inputs.source.revision
        self.live = model
        differences = {}
        for mode in ("eval", "train"):
            for module in model.modules():
                if isinstance(module, LoraLayer):  # the base's own dropout is none of the adapter's business
                    module.train(mode == "train")
            differences[mode] = adapter.relative_difference(probe_logits(model, probe), reference)
        model.eval()
        largest = max(differences.values())
        nearer = four_bit and (form == "residual" or bool(plan.corrections))  # meant to differ from the 4-bit base
        if not (largest <= tolerance or (nearer and math.isfinite(largest))):
            raise CheckError(
                "the adapter changes the model before training",
                where="step 0",
                got=f"relative logit difference {largest:.2g}",
                expected=f"at most {tolerance:.2g}",
                fix="use base: intact, or a float32 model",
            )
        return model, {"max_relative_logit_difference": largest, **differences}

    def probe(self) -> dict[str, Tensor]:
        """A few training records, (B, L): what logits are compared on."""
        return self.inputs.kind.shown(self.inputs.learn_records[:4], 64)

    def measured_on(self) -> list[dict[str, Tensor]]:
        """Some records of the context's and the training data, each as (1, L) token ids without padding."""
        records = [*self.inputs.context_records[:8], *self.inputs.learn_records[:8]]
        return [self.inputs.kind.shown([record], 256) for record in records]
