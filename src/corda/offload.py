"""Weights that stay in their safetensors files until a block needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corda.architectures import loader
from corda.errors import ModelError
from corda.models import Source, config_of
from corda.options import ModelOptions
from corda.quantization import unpacked


class LazyWeights:
    """A checkpoint's tensors by the model's own parameter names, read when asked for.

    Layers that the checkpoint holds in 4 bits (bitsandbytes) are given as numbers. Buffers that it has are read at once
    into the model: they are small, and nothing else would.

    Raises:
        ModelError: the checkpoint is not in safetensors, or has no tensor for a parameter of the model.
    """

    def __init__(self, source: Source, model: PreTrainedModel, dtype: torch.dtype) -> None:
        folder = Path(source.path)
        if not folder.is_dir():
            allowed = ["*.safetensors", "*.json"]
            folder = Path(snapshot_download(source.path, revision=source.revision, allow_patterns=allowed))
        self._dtype = dtype
        self._places = _index(folder)
        self._transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        prefix = f"{model.base_model_prefix}."
        self._keys: dict[str, str] = {}
        tied = set(model.all_tied_weights_keys)
        for name, _ in model.named_parameters():
            key = self._key(name, prefix)
            if key is not None:
                self._keys[name] = key
            elif name not in tied:
                raise ModelError(
                    "weights cannot be off-loaded: the checkpoint names them in another way",
                    where=f"{source.path}, {name}",
                    fix="set context.offload: false; for a 4-bit model, save the checkpoint anew with transformers",
                )

        kept = model.state_dict()
        for name, _ in model.named_buffers():
            key = self._key(name, prefix)
            if key is not None and name in kept:  # older checkpoints hold what a model makes anew
                set_module_tensor_to_device(model, name, "cpu", value=self._read(key))

    def _key(self, name: str, prefix: str) -> str | None:
        return next((k for k in (name, name.removeprefix(prefix)) if k in self._places), None)

    def get(self, name: str) -> Tensor:
        """One parameter, of its own shape, on the CPU, in the dtype of the run."""
        key = self._keys[name]
        tensor = self._read(key)
        parts = [part for part in self._places if part.startswith(f"{key}.")]
        if parts:
            tensor = unpacked(tensor, {part: self._read(part) for part in parts})
            tensor = tensor.T if name in self._transposed else tensor
        return tensor.to(self._dtype)

    def _read(self, key: str) -> Tensor:
        with safe_open(self._places[key], framework="pt") as stream:
            tensor = stream.get_tensor(key)
            assert isinstance(tensor, Tensor)
            return tensor

    @contextmanager
    def on(self, module: nn.Module, prefix: str, device: torch.device) -> Iterator[None]:
        """Inside, the parameters of `module` (named `prefix` in the model) are on `device`; after, nowhere.

        Its buffers are there too, and after that where they were.
        """
        buffers = {name: buffer.device for name, buffer in module.named_buffers() if buffer.device != device}
        names = [name for name, parameter in module.named_parameters() if parameter.device.type == "meta"]
        try:
            for name in names:
                set_module_tensor_to_device(
                    module, name, device, value=self.get(f"{prefix}.{name}" if prefix else name)
                )
            for name in buffers:
                set_module_tensor_to_device(module, name, device)
            yield
        finally:
            for name in names:
                set_module_tensor_to_device(module, name, "meta")
            for name, place in buffers.items():
                set_module_tensor_to_device(module, name, place)


def empty_model(source: Source, options: ModelOptions, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its buffers but without weights.

    Args:
        source: Where the model's files are.
        options: Revision and whether its own code may run.
        dtype: Of the weights to come.
    """
    config, trusted = config_of(source, options), options.trust_remote_code
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = loader(config, options.task).from_config(
            config, dtype=dtype, trust_remote_code=trusted
        )
    return model.eval()


def _index(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: folder / name for key, name in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ModelError(
            "weights cannot be off-loaded: no safetensors", where=str(folder), fix="convert the checkpoint"
        )
    with safe_open(single, framework="pt") as stream:
        return dict.fromkeys(stream.keys(), single)
