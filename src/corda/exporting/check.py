"""The check that every export passes before it is called done: reload, run, compare logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from corda import architectures
from corda.adapter import relative_difference
from corda.architectures import embeddings_of
from corda.errors import AdapterError, CheckError, ModelError
from corda.exporting.update import Factors
from corda.models import keep_exact
from corda.sharding import device_of
from corda.targets import spec_of, weight_view

# Largest max |reloaded - live| / max |live| for a base in fp32, where only the order of sums changes.
EXACT = 1e-5
# In 16 bits: so many times what one random rounding of each adapted layer's output does to the base's logits.
# Merged and residual weights are rounded once, and were measured at 0.8 to 1.9 of that: docs/log.md.
ROUNDINGS = 4.0

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


@torch.no_grad()
def probe_logits(model: nn.Module, probe: Mapping[str, Tensor]) -> Tensor:
    """Logits on the probe, (B, L, V) or a classifier's (B, classes), fp32, on the CPU; without a head hidden states.

    Args:
        model: Any causal language model.
        probe: Keyword arguments of a forward pass, (B, L) ids among them.
    """
    device = device_of(model)
    out = model(**{name: value.to(device) for name, value in probe.items()})
    logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
    assert isinstance(logits, Tensor)
    return logits.float().cpu()


def spread_probe(model: nn.Module) -> dict[str, Tensor]:
    """(2, 32) token ids spread evenly over the vocabulary."""
    whole: Any = model
    embeddings = whole.get_input_embeddings()
    ids = torch.linspace(0, embeddings.weight.shape[0] - 1, 64).long().reshape(2, 32)
    probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return probe | {"decoder_input_ids": ids.flip(1)} if two else probe


def same_vocabulary(base: PreTrainedModel, load: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """`load`, which refuses a base that has other rows in its embedding than the trained one.

    Args:
        base: What was trained on.
        load: Loads the original base once more.

    Raises:
        AdapterError: it has, when it is loaded.
    """

    def loaded() -> PreTrainedModel:
        fresh = load()
        rows = [getattr(module, "num_embeddings", 0) for m in (base, fresh) for module in embeddings_of(m)[:1]]
        if len(set(rows)) > 1:
            raise AdapterError(
                "the original base has another vocabulary than the model that was trained",
                where="token embeddings",
                got=f"{rows[1]:,} rows, {rows[0]:,} trained",
                fix="save the resized model before training and load that one, or give export it as `fresh_base`",
            )
        return fresh

    return loaded


def allowed(base: PreTrainedModel, names: Iterable[str], probe: Mapping[str, Tensor]) -> float:
    """The relative logit difference that arithmetic in the base's dtype explains.

    In 16 bits a model amplifies each rounding by a factor of its own, so that is measured: every adapted layer's
    output is multiplied by 1 + δ, δ uniform within one rounding and drawn with a fixed seed, and the change of the
    logits times `ROUNDINGS` is allowed.

    Args:
        base: The original base.
        names: Its adapted layers.
        probe: What to measure on.
    """
    unit = torch.finfo(base.dtype).eps / 2
    if unit < 1e-6:
        return EXACT
    generator = torch.Generator().manual_seed(0)

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        noise = 2 * torch.rand(out.shape, generator=generator) - 1
        return (out.float() * (1 + unit * noise.to(out.device))).to(out.dtype)

    exact = probe_logits(base, probe)
    modules = dict.fromkeys(spec_of(base, name).stored[0].rpartition(".")[0] for name in names)
    with _hooked(base, dict.fromkeys(modules, hook)):
        return max(unit, ROUNDINGS * relative_difference(probe_logits(base, probe), exact))


def confirm(reloaded: Tensor, expected: Tensor, tolerance: float, where: Path) -> float:
    """max |reloaded - expected| / max |expected|, where that is small enough.

    Args:
        reloaded: Logits (..., vocabulary).
        expected: Of the same shape.
        tolerance: Largest value that is no error.
        where: The export, for messages.

    Raises:
        CheckError: it is not.
    """
    found = relative_difference(reloaded, expected)
    if not found <= tolerance:
        raise CheckError(
            "the export does not give the trained model's logits after reload",
            where=str(where),
            got=f"relative difference {found:.2g}",
            expected=f"at most {tolerance:.2g}",
            fix="if this model amplifies roundings so much, set export.tolerance",
        )
    return found


def largest_difference(one: nn.Module, other: nn.Module, records: Sequence[Mapping[str, Tensor]]) -> tuple[float, int]:
    """max |one - other| / max |other| over the logits of all records, and the number of tokens."""
    apart = scale = 0.0
    tokens = 0
    for record in records:
        expected = probe_logits(other, record)
        apart = max(apart, float((probe_logits(one, record) - expected).abs().max()))
        scale = max(scale, float(expected.abs().max()))
        tokens += record["input_ids"].numel()
    return apart / scale, tokens


@contextmanager
def added(model: nn.Module, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Inside, each named layer's output is increased by B A x, computed in fp32; independent of PEFT.

    B A of an expert of a stacked parameter is added to its weight instead, and taken out again with its very bits.

    Args:
        model: The base.
        factors: Full dotted layer name -> A (k, d_in) and B (d_out, k).
    """

    def hook(pair: Factors) -> Hook:
        def add(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            A, B = (factor.to(out.device) for factor in pair)
            more: Tensor = args[0].to(A.dtype) @ A.T @ B.T
            return (out + more).to(out.dtype)

        return add

    specs = {name: spec_of(model, name) for name in factors}
    layers = {name: hook(factors[name]) for name, spec in specs.items() if spec.stored[1] is None}
    views = {name: weight_view(model, spec) for name, spec in specs.items() if name not in layers}
    before = {name: view.clone() for name, view in views.items()}
    try:
        for name, view in views.items():
            A, B = (factor.to(view.device) for factor in factors[name])
            view.add_((B @ A).to(view.dtype))
        with _hooked(model, layers):
            yield
    finally:
        for name, view in views.items():
            view.copy_(before[name])


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reloader(
    like: PreTrainedModel, task_type: str | None, dtype: torch.dtype | None = None
) -> Callable[[Path | str], PreTrainedModel]:
    """What loads a model from its folder as its users do, in the dtype and on the device of another.

    Args:
        like: Gives dtype, device and class.
        task_type: PEFT's.
        dtype: Another dtype than its.
    """
    ours = type(like).__module__.startswith("transformers.")
    loader = architectures.loader(like.config) if ours and task_type == "CAUSAL_LM" else type(like)
    wanted, device = dtype or like.dtype, device_of(like)

    def load(folder: Path | str) -> PreTrainedModel:
        model: PreTrainedModel = loader.from_pretrained(str(folder), dtype=wanted)
        return model.to(device).eval()

    return load


def again(base: PreTrainedModel, *, as_it_is: bool = False) -> Callable[[], PreTrainedModel]:
    """What loads the original weights of a model once more, from where it came.

    Args:
        base: The model.
        as_it_is: Quantise them as `base` is quantised, instead of loading them as they are stored.

    Raises:
        ModelError: it did not come from anywhere.
    """
    dtype, device = next(base.parameters()).dtype, device_of(base)
    if not base.name_or_path:
        raise ModelError("the base model has no path to load it from again", fix="give export a `fresh_base`")
    revision = getattr(base.config, "_commit_hash", None)
    kind = getattr(base.config, "quantization_config", None) if as_it_is else None
    more: dict[str, Any] = {"quantization_config": kind, "device_map": {"": device}} if kind else {}

    def load() -> PreTrainedModel:
        model: PreTrainedModel = type(base).from_pretrained(
            base.name_or_path, dtype=dtype, revision=revision or "main", **more
        )
        keep_exact(model)
        return (model if more else model.to(device)).eval()

    return load
