"""What lies in a context or in a LoRA adapter, from the files alone; no model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from corda import artifact
from corda.context import store
from corda.context.keeping import NotKept
from corda.errors import ArtifactError
from corda.progress import Progress, silent

_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?")


def context_facts(folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """What a context holds, read from disk covariance by covariance.

    Args:
        folder: The context's.
        progress: Shows how far it is.

    Returns:
        rounds, layers (their number), kept (see `kept`), warnings, and a dict for each distinct input and side: group,
        side (empty for the source that the plan goes by), layers (names), d_in, and per round tokens,
        mean_diagonal (tr C / d_in) and effective_rank ((tr C)² / ‖C‖²_F, between
        1 and d_in, at most the number of tokens).

    Raises:
        ArtifactError: there is no context here.
    """
    found = artifact.read(folder, "context", verify=False)
    context = store.load(found)
    inputs = []
    sides = {"": context} | {name: context.side(name) for name in context.sides}
    members = [(name, side, *one) for name, side in sides.items() for one in side.members().items()]
    for name, side, group, layers in progress(members, "inspect", len(members)):
        facts: dict[str, Any] = {"group": group, "side": name, "layers": [layer.name for layer in layers]}
        facts |= {"d_in": layers[0].d_in, "tokens": [], "mean_diagonal": [], "effective_rank": []}
        for round_ in range(side.rounds):
            facts["tokens"].append(side.token_count(layers[0].name, round_))
            if isinstance(side.packed, NotKept) or isinstance(context.packed, NotKept):
                continue
            C = side.covariance(layers[0].name, round_)
            trace, size = float(C.diagonal().double().sum()), float(torch.linalg.matrix_norm(C))
            facts["mean_diagonal"].append(trace / len(C))
            facts["effective_rank"].append((trace / size) ** 2 if size else 0.0)
        inputs.append(facts)
    return {
        "folder": str(folder),
        "rounds": context.rounds,
        "layers": len(context.layers),
        "kept": kept(found),
        "inputs": inputs,
        "warnings": list(context.warnings),
    }


def kept(found: artifact.Artifact) -> dict[str, Any]:
    """What keeping a context's covariances cost, and what collecting them once more would, where that was noted."""
    again = found.manifest.get("again", {})
    return {
        "bytes": sum(file["bytes"] for file in found.manifest["files"].values()),
        "write_seconds": found.manifest.get("write_seconds"),
        "on_disk": found.manifest.get("kept", True),
        "why": again.get("why", ""),
        "collect_again_tokens": again.get("tokens"),
        "collect_again_seconds": again.get("seconds"),
    }


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What a PEFT LoRA folder holds, whoever wrote it.

    Returns:
        base, rank, lora_alpha, use_rslora, parameters (all tensors), other_parameters (of tensors that are not LoRA
        factors), and a dict for each layer: name, d_in, d_out, rank, scaling s, norm (‖s B A‖_F, how far the weight is
        moved), norm_A, norm_B (Frobenius) and parameters.

    Raises:
        ArtifactError: no adapter here, another kind of adapter, weights in a .bin file, or factors that do not
            fit together.
    """
    config = _config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        old = (folder / "adapter_model.bin").is_file()
        raise ArtifactError(
            "the adapter's weights are in a .bin file, which may hold code" if old else "the adapter has no weights",
            where=str(folder),
            expected="adapter_model.safetensors",
            fix="load it with PEFT and save it again" if old else "name the folder that was saved or exported",
        )
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ArtifactError("the adapter's weights cannot be read", where=str(file), got=error) from None
    factors: dict[str, dict[str, Tensor]] = {}
    others = 0
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            others += tensor.numel()
        else:
            factors.setdefault(match["layer"], {})[match["part"]] = tensor.flatten(1)
    if not factors:
        raise ArtifactError("the adapter has no LoRA factors", where=str(file), got=", ".join(list(tensors)[:3]))
    return {
        "folder": str(folder),
        "base": config.get("base_model_name_or_path"),
        "rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": bool(config.get("use_rslora")),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "other_parameters": others,
        "layers": [_layer(name, pair, config, file) for name, pair in factors.items()],
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            "there is no adapter here", where=str(folder), expected="a folder with adapter_config.json"
        ) from None
    except ValueError:
        raise ArtifactError("adapter_config.json is not JSON", where=str(path)) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= set(config):
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ArtifactError("the adapter is not a LoRA", where=str(path), got=kind, expected="LORA")
    return config


def _layer(name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    A, B = pair.get("A"), pair.get("B")
    if A is None or B is None or A.shape[0] != B.shape[1]:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(pair.items()))
        raise ArtifactError(
            "the factors of a layer do not fit together",
            where=f"{file}, {name}",
            got=shapes,
            expected="A (r, d_in) and B (d_out, r)",
        )
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    rank = ranks.get(get_pattern_key(ranks, name), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, name), config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    R_A, R_B = (torch.linalg.qr(X.double(), mode="r")[1] for X in (A.T, B))
    return {
        "name": name,
        "d_in": A.shape[1],
        "d_out": B.shape[0],
        "rank": A.shape[0],
        "scaling": scaling,
        "norm": scaling * float(torch.linalg.matrix_norm(R_B @ R_A.T)),
        "norm_A": float(torch.linalg.matrix_norm(A.double())),
        "norm_B": float(torch.linalg.matrix_norm(B.double())),
        "parameters": A.numel() + B.numel(),
    }
