"""Put a plan's factors on a model through PEFT, so that at step 0 nothing changes.

Two forms of the same mathematics. `intact`: the base weights stay and each layer computes
W x + s (B A - B0 A0) x with frozen initial factors B0, A0. `residual` (the papers' form): W' = W - s B A replaces W.
Either way the model saves itself as a plain LoRA of rank 2r on the original base, [A; A0] and [B, -B0], which every
PEFT tool loads as it is.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import parameters
from corda.architectures import embeddings_of, heads
from corda.distributed import world
from corda.errors import AdapterError, TargetError
from corda.forms import CORRECTION, INITIAL, TRAINED, Beside, Corrected, Difference, refuse_adapted
from corda.lora_config import exact_key, lora_config, whole
from corda.metric import full_precision
from corda.plan.plan import LayerPlan, Plan
from corda.quantization import full_weight, is_4bit, requantise
from corda.recipe import Base
from corda.sharding import computing_device, refuse_partitioned, subtract, whole_adapters
from corda.targets import refuse_shared, spec_of

_FROZEN = (INITIAL, CORRECTION)


class _ExactSaving:
    """Mixed into a PeftModel class: what is saved is a plain LoRA on the original base, and loads back for resuming."""

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: list[str] | None = None, **kwargs: Any
    ) -> None:
        """As PeftModel.save_pretrained; the trained adapter is written with its start subtracted, rank 2r."""
        model: Any = self
        above: Any = super()
        state = None if kwargs.get("state_dict") else whole_adapters(model)
        if state is not None:  # the model is sharded over processes, all of which have come here
            kwargs |= {"state_dict": state, "is_main_process": world().first}
        names = selected_adapters or [name for name in model.peft_config if name not in _FROZEN]
        if _adapts_embeddings(model):  # PEFT would save their W, which is W - BA here, and put it over the base's
            kwargs["save_embedding_layers"] = False
        above.save_pretrained(str(save_directory), selected_adapters=names, **kwargs)
        if TRAINED in names and INITIAL in model.peft_config and kwargs.get("is_main_process", True):
            embeddings = kwargs.get("save_embedding_layers", "auto")
            config, state = plain_lora(model, kwargs.get("state_dict"), embeddings)
            save_file(state, Path(save_directory) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            config.save_pretrained(str(save_directory))

    def add_adapter(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """As PeftModel.add_adapter; one with the trained adapter's own config is a copy of it, as TRL's references are.

        Raises:
            AdapterError: a copy where stacked experts are adapted in the intact form.
        """
        model: Any = self
        above: Any = super()
        copied = peft_config is model.peft_config.get(TRAINED)
        if copied and any(isinstance(module, parameters.ParameterDifference) for module in model.modules()):
            raise AdapterError(
                "adapters on stacked experts are not copied as a reference",
                where=adapter_name,
                fix="give the trainer a reference model of its own, or mode contrast, or base: residual",
            )
        above.add_adapter(adapter_name, peft_config, *args, **kwargs)
        if not copied:
            return
        for module in model.modules():
            if isinstance(module, LoraLayer) and TRAINED in module.lora_A:
                _fill(module, adapter_name, (module.lora_A[TRAINED].weight, module.lora_B[TRAINED].weight))
                if TRAINED in module.lora_variant:
                    module.lora_variant[adapter_name] = module.lora_variant[TRAINED]

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PeftModel.load_adapter; a folder saved by this class restores the trained half of its factors."""
        path = Path(model_id) / SAFETENSORS_WEIGHTS_NAME
        model: Any = self
        above: Any = super()
        if adapter_name == TRAINED and INITIAL in model.peft_config and path.is_file():
            return restore(model, load_file(path), str(model_id))
        return above.load_adapter(str(model_id), adapter_name, *args, **kwargs)


class _FrozenA:
    """Mixed into a PeftModel class whose A stays frozen: PEFT unfreezes an adapter whenever it is switched on again."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PeftModel.disable_adapter."""
        above: Any = super()
        try:
            with above.disable_adapter():
                yield
        finally:
            freeze_a(self)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As PeftModel.set_adapter."""
        above: Any = super()
        above.set_adapter(*args, **kwargs)
        freeze_a(self)


def freeze_a(model: Any) -> None:
    """Leave B of the trained adapter alone trainable."""
    for name, parameter in model.named_parameters():
        if f".lora_A.{TRAINED}." in name:
            parameter.requires_grad_(False)


@full_precision()
def attach(
    model: PreTrainedModel,
    plan: Plan,
    *,
    base: Base | None = None,
    seed: int = 0,
    weights: Callable[[str], Tensor] | None = None,
) -> PeftModel:
    """Wrap a model in PEFT with the plan's factors; the logits stay those of the model.

    A 4-bit model in the residual form is quantised anew, layer by layer: its logits then come nearer to those in full
    precision than the plain 4-bit model's, and are not the same.

    Args:
        model: The model that the plan was made for. PEFT replaces its target layers in place; with `residual` their
            weights change too.
        plan: From `make_plan`.
        base: "intact" or "residual"; default: the plan's own option.
        seed: For plain LoRA's random start.
        weights: For a 4-bit model in the residual form: gives a parameter in full precision by its full name;
            default: what the 4-bit layer holds.

    Returns:
        A PeftModel in the mode (train/eval) of `model`, the trained adapter named "default".

    Raises:
        AdapterError: the model carries an adapter, a layer is missing or has another shape, a head is in 4 bits, or
            dropout with `residual`.
        TargetError: a layer whose weight another module uses too, with `residual`.
    """
    refuse_partitioned(model)
    form = base or plan.options.form(any(is_4bit(module) for module in model.modules()))
    _check_fits(model, plan)
    if plan.options.has_start and form == "residual" and plan.options.lora_dropout > 0:
        raise AdapterError(
            "dropout with a residual base changes the model from the first step on",
            where="adapter.lora_dropout",
            got=plan.options.lora_dropout,
            fix="set it to 0, or use base: intact",
        )
    if form == "residual" and plan.mode != "lora" and any(p.device.type == "meta" for p in model.parameters()):
        raise AdapterError(
            "weights that are off-loaded cannot be changed",
            where="adapter.base",
            got="residual",
            expected="intact",
            fix="set adapter.base: intact, or a model.device_map without off-loading",
        )
    if form == "residual" and plan.options.has_start:
        refuse_shared(model, [layer.name for layer in plan.layers])
    config = lora_config(model, plan)
    cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[config.task_type]
    as_parameters = parameters.pattern_of(model, [layer.name for layer in plan.layers])
    if plan.mode == "lora":
        return _plain(cls, model, config, plan, as_parameters, seed)
    wrapped: PeftModel = _exact(cls, plan.options.freezes_a)(model, config)
    if plan.options.has_start:
        wrapped.add_adapter(INITIAL, _without_heads(config))
    if plan.corrections:
        wrapped.add_adapter(CORRECTION, _correction_config(model, config, plan))
    parameters.start(wrapped, plan.factors, as_parameters, form)
    with torch.no_grad():
        for layer in plan.layers:
            if layer.name not in as_parameters:
                _begin(wrapped.base_model.model.get_submodule(layer.name), layer, plan, form, weights)
    if plan.options.freezes_a:
        freeze_a(wrapped)
    wrapped.train(model.training)
    return wrapped


def _plain(
    cls: type[PeftModel],
    model: PreTrainedModel,
    config: LoraConfig,
    plan: Plan,
    as_parameters: Container[str],
    seed: int,
) -> PeftModel:
    """Plain LoRA: PEFT's own random start."""
    training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = cls(model, config)
        for layer in plan.layers:
            if layer.name in as_parameters:
                continue
            module = plain.base_model.model.get_submodule(layer.name)
            if _materialise(module, TRAINED):
                module.reset_lora_parameters(TRAINED, True)
    parameters.drop_unplanned(plain, {layer.name: layer.rank for layer in plan.layers})
    plain.train(training)
    return plain


def _begin(module: Any, layer: LayerPlan, plan: Plan, form: Base, weights: Callable[[str], Tensor] | None) -> None:
    """Fill a layer's adapters, and choose how they act together or what the base gives up for them."""
    _fill(module, TRAINED, plan.factors[layer.name])
    if layer.name in plan.corrections:
        _fill(module, CORRECTION, plan.corrections[layer.name])
    if not plan.options.has_start:
        if layer.name in plan.corrections:
            module.lora_variant[TRAINED] = Beside()
        return
    _fill(module, INITIAL, plan.factors[layer.name])
    if form == "intact":
        module.lora_variant[TRAINED] = Difference()
        return
    if layer.name in plan.corrections:
        module.lora_variant[TRAINED] = Corrected()
    inner = module.base_layer
    if not is_4bit(inner):
        subtract(inner.weight, module.get_delta_weight(INITIAL))
        return
    W = full_weight(inner) if weights is None else weights(f"{layer.name}.weight").float()
    W = W.T if weights is not None and layer.kind == "conv1d" else W
    A, B = plan.factors[layer.name]
    A, B = plan.removed.get(layer.name, (A, plan.scaling(layer.rank) * B))
    place = inner.weight.device
    requantise(inner, W.to(place) - B.to(place) @ A.to(place))


def _materialise(module: Any, name: str) -> bool:
    """Give a layer whose weight is off-loaded an adapter in memory; PEFT puts it where the weight is: nowhere."""
    parts = [p[name] for p in (module.lora_A, module.lora_B) if p[name].weight.device.type == "meta"]
    for part in parts:
        part.to_empty(device=computing_device(module.get_base_layer()))
    return bool(parts)


@torch.no_grad()
def _fill(module: Any, name: str, factors: tuple[Tensor, Tensor]) -> None:
    _materialise(module, name)
    module.lora_A[name].weight.copy_(factors[0])
    module.lora_B[name].weight.copy_(factors[1])


def _without_heads(config: LoraConfig) -> LoraConfig:
    own = copy.deepcopy(config)
    own.modules_to_save = None
    return own


def _correction_config(model: nn.Module, config: LoraConfig, plan: Plan) -> LoraConfig:
    """Of the frozen part: its own ranks, scaling 1."""
    ranks = {name: A.shape[0] for name, (A, _) in plan.corrections.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    own = _without_heads(config)
    own.r, own.lora_alpha, own.use_rslora = r, r, False
    own.rank_pattern = {exact_key(model, name): rank for name, rank in ranks.items() if rank != r}
    own.alpha_pattern = dict(own.rank_pattern)
    return own


def plain_lora(
    model: PeftModel, state_dict: Mapping[str, Tensor] | None = None, embeddings: bool | str = False
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as a plain LoRA of rank 2r on the original base: [A; A0], [B, -B0].

    Args:
        model: From `attach`, in a mode with a start.
        state_dict: Gathered weights, for a sharded model.
        embeddings: Whether those of tokens go with it; PEFT's "auto": where the vocabulary was resized.

    Returns:
        Its configuration, and parameter name -> A (2r, d_in) or B (d_out, 2r).
    """
    now, start = (
        get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=name, save_embedding_layers=which)
        for name, which in ((TRAINED, embeddings), (INITIAL, False))
    )
    state = {}
    experts = parameters.experts_of_keys(model)
    for key, tensor in now.items():
        if ".lora_A." in key:
            state[key] = parameters.joined(tensor, start[key], experts.get(key.rpartition(".lora_")[0], 1))
        elif ".lora_B." in key:
            state[key] = torch.cat([tensor, -start[key]], dim=1).contiguous()
        else:
            state[key] = tensor
    config = copy.deepcopy(model.peft_config[TRAINED])
    growth = 2**0.5 if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha = whole(config.lora_alpha * growth)
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: whole(alpha * growth) for key, alpha in config.alpha_pattern.items()}
    config.init_lora_weights = True
    config.inference_mode = True
    return config, state


def restore(model: PeftModel, saved: Mapping[str, Tensor], where: str) -> None:
    """Set the trained factors from a plain LoRA that `plain_lora` made of the same start.

    Args:
        model: From `attach`.
        saved: Parameter name -> A (2r, d_in) or B (d_out, 2r), as saved.
        where: Named in messages.

    Raises:
        AdapterError: other layers, other shapes, or another start.
    """
    start = get_peft_model_state_dict(model, adapter_name=INITIAL, save_embedding_layers=False)
    own = model.state_dict()
    experts = parameters.experts_of_keys(model)
    for key, initial in ((key, tensor) for key, tensor in start.items() if ".lora_" in key):
        is_A = ".lora_A." in key
        tensor = saved.get(key)
        r = initial.shape[0 if is_A else 1]
        if tensor is None or tensor.shape[0 if is_A else 1] != 2 * r:
            raise AdapterError("the checkpoint does not fit the plan", where=f"{where}, {key}", fix="train anew")
        if is_A:
            trained, frozen = parameters.halves(tensor, experts.get(key.rpartition(".lora_")[0], 1))
        else:
            trained, frozen = tensor.chunk(2, dim=1)
        if not torch.equal(frozen.to(initial), initial if is_A else -initial):
            raise AdapterError("the checkpoint starts from other factors", where=f"{where}, {key}", fix="train anew")
        target = own[f"{key.removesuffix('.weight')}.{TRAINED}.weight"]
        target.copy_(trained.to(target))
    others = {key: tensor for key, tensor in saved.items() if ".lora_" not in key}
    if others:
        set_peft_model_state_dict(model, others, adapter_name=TRAINED)


def _adapts_embeddings(model: PeftModel) -> bool:
    """Whether an adapter sits on the output head or on the embeddings of tokens."""
    return any(isinstance(module, LoraLayer) for module in embeddings_of(model.get_base_model()))


def relative_difference(now: Tensor, reference: Tensor) -> float:
    """max |now - reference| / max |reference|, for logits of equal shape."""
    return float((now.float() - reference.float()).abs().max() / reference.float().abs().max())


@functools.cache
def _exact(cls: type[PeftModel], frozen_a: bool) -> type[PeftModel]:
    mixed = (_FrozenA, _ExactSaving, cls) if frozen_a else (_ExactSaving, cls)
    return type(f"Corda{cls.__name__}", mixed, {"__doc__": cls.__doc__})


def _check_fits(model: PreTrainedModel, plan: Plan) -> None:
    refuse_adapted(model)
    for head in heads(model):
        if any(is_4bit(module) for module in model.get_submodule(head).modules()):
            raise AdapterError(
                "the head is in 4 bits and cannot be trained",
                where=head,
                fix=f"load the model with BitsAndBytesConfig(llm_int8_skip_modules={heads(model)})",
            )
    for layer in plan.layers:
        try:
            found = spec_of(model, layer.name)
        except TargetError:
            where = layer.name
            raise AdapterError(
                "a layer of the plan is not in the model", where=where, fix="plan for this model"
            ) from None
        shape = (found.d_out, found.d_in)
        if shape != (layer.d_out, layer.d_in):
            raise AdapterError(
                "a layer of the plan has another shape in the model",
                where=layer.name,
                got=shape,
                expected=(layer.d_out, layer.d_in),
                fix="plan for this model",
            )
        if plan.options.lora_dropout and layer.kind in {"expert", "expert_t"}:
            raise AdapterError(
                "PEFT has no dropout in adapters of stacked experts",
                where=layer.name,
                got=f"lora_dropout {plan.options.lora_dropout}",
                fix="set adapter.lora_dropout: 0, or leave the experts out of target_modules",
            )
