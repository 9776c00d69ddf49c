"""Memory, disk, network and time of a recipe's stages, from its config and a short calibration of the machine.

Everything that can be run without values is run: steps on fake tensors, decompositions on small random layers of the
same proportions. The rest is counted. Bytes are bytes, times are seconds.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import psutil
import torch

from corda import linalg
from corda.context.keeping import readings
from corda.context.lanes import lanes_for
from corda.errors import RecipeError
from corda.estimate import machine
from corda.estimate.counting import FP32, eigenproblem, half, makespan, packed, square
from corda.estimate.facts import Facts
from corda.estimate.machine import Device, Rehearsed, decomposition_flops, triangle_flops
from corda.estimate.rehearse import TILES, Step, forward_bytes, training_bytes
from corda.inputs import Inputs
from corda.recipe import TWO_CONTEXTS, Recipe
from corda.targets import LayerSpec

_ENOUGH = 8  # tokens per input of the widest layer
_LANE = 60_000_000  # bytes that the libraries set aside for a thread that batches run in, measured
_PER_NODE = 8  # processes that share a disk
_METER_BYTES = 2 << 30  # covariances that the drift meter keeps between readings
_TRAINER = 200_000_000  # bytes of the libraries that only training loads, on a CPU


@dataclass(frozen=True)
class Setting:
    """How a recipe is spread over devices.

    Attributes:
        processes: With one device each; calibration tokens, layers and training batches are divided over them.
        shard: Weights are divided over the processes (FSDP), one block gathered at a time.
        offload: Instead of the recipe's context.offload.
    """

    processes: int = 1
    shard: bool = False
    offload: bool | None = None


def estimate(recipe: Recipe, profile: str = "auto", *, processes: int = 1, shard: bool = False) -> dict[str, Any]:
    """What a recipe needs, before anything is loaded.

    Args:
        recipe: Of the run.
        profile: "auto" measures this machine for some seconds; or the name of one in `machine.PROFILES`.
        processes: See `Setting`.
        shard: See `Setting`.

    Raises:
        CordaError: the recipe does not fit the model.
        RecipeError: there is no profile of that name, or a run would refuse so many processes.
    """
    return estimates(recipe, profile, [Setting(processes, shard)])[0]


def estimates(recipe: Recipe, profile: str, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """`estimate` for several settings of one recipe on one profile, which is rehearsed once.

    Raises:
        CordaError: see `estimate`.
    """
    if profile != "auto" and profile not in machine.PROFILES:
        known = ", ".join(["auto", *machine.PROFILES])
        raise RecipeError("there is no such device profile", got=profile, expected=known)
    kind = "cpu" if profile == "auto" else machine.PROFILES[profile].kind
    facts = Facts(Inputs(recipe), kind, max(setting.processes for setting in settings))
    shapes = [(layer.d_out, layer.d_in) for layer in facts.layers]
    widest = max(layer.d_in for layer in facts.layers)
    device = machine.PROFILES.get(profile) or machine.measure(shapes, widest, recipe.output_dir)
    work = _Work(facts, device)
    return [work.spread(setting).everything() for setting in settings]


class _Work:
    def __init__(self, facts: Facts, device: Device) -> None:
        self.facts, self.recipe, self.device = facts, facts.recipe, device
        self.on_cpu = device.kind == "cpu"
        _ = facts.tokens, facts.groups  # the records are in memory in a run as well
        self.baseline = psutil.Process(os.getpid()).memory_info().rss if self.on_cpu else 0
        self.rehearsed: dict[tuple[int, int], Rehearsed] = {}
        self.side_by_side = self.on_cpu and max(x.max_rank for x in facts.layers) <= linalg.EXACT_LIMIT
        self.plans = self.recipe.adapter.mode != "lora"
        if self.plans:
            self._rehearse()
        self.step = self._training_step()
        self.pass_ = self._forward_step() if facts.tokens.rounds else Step(0, 0, 0)

    def spread(self, setting: Setting) -> _Work:
        """The same work in another setting."""
        other = copy.copy(self)
        other.processes, other.shard = setting.processes, setting.shard
        other.offload = self.recipe.context.offload if setting.offload is None else setting.offload
        return other

    processes: int
    shard: bool
    offload: bool

    def everything(self) -> dict[str, Any]:
        """The whole estimate."""
        facts = self.facts
        tokens = facts.tokens
        memory, seconds = {}, {}
        if tokens.rounds:
            memory["collect"], seconds["collect"] = self._collect_memory(), self._collect_seconds()
        if self.plans:
            memory["plan"], seconds["plan"] = self._plan_memory(), self._plan_seconds()
        memory |= {"train": self._train_memory(self.step), "export": self._export_memory()}
        seconds["train"] = self._train_seconds(self.step)
        widest = max(layer.d_in for layer in facts.layers)
        calibration = {
            "tokens_per_round": tokens.rounds[0] if tokens.rounds else 0,
            "sets": len(tokens.rounds),
            "would_do": _ENOUGH * widest,
            "enough": bool(tokens.rounds) and tokens.rounds[0] >= 2 * widest,
        }
        above = max((part["device"]["above_weights"] for part in memory.values()), default=0)
        return {
            "model_parameters": facts.parameters,
            "layers": len(facts.layers),
            "trainable_parameters": facts.trainable,
            "calibration": calibration if tokens.rounds else None,
            "memory": memory,
            "memory_above_weights": {
                "initialisation": max(
                    (memory[s]["device"]["above_weights"] for s in ("collect", "plan") if s in memory), default=0
                ),
                "any_stage": above,
            },
            "fits": max(part["device"]["total"] for part in memory.values()) <= self.device.memory,
            "disk": self._disk(),
            "network": self._network(),
            "seconds": {stage: parts | {"total": sum(parts.values())} for stage, parts in seconds.items()},
            "device": self.device.as_json(),
            "processes": self.processes,
            "shard": self.shard,
            "assumptions": [*self._assumptions(), *tokens.assumed, *facts.notes],
        }

    # Collect

    def _collect_memory(self) -> dict[str, Any]:
        facts, step = self.facts, self.pass_
        tokens = facts.tokens
        covariances = max(square(groups) for groups in facts.block_groups())
        packed_all = sum(packed(groups) for groups in facts.block_groups())
        largest = max((m[0].d_in for groups in facts.block_groups() for _, m in groups), default=0)
        # Packing: the triangles of a block so far, and one more while it is divided.
        packing = max(packed(groups) for groups in facts.block_groups()) + FP32 * half(largest)
        streamed = facts.blocks is not None
        forward = step.peak(1) if streamed else step.peak(2)
        copies = 0 if facts.dtype.itemsize == FP32 or not self.on_cpu else FP32 * self._batch_tokens() * largest
        hidden = sum(tokens.rounds) * facts.hidden * facts.dtype.itemsize // self.processes if streamed else 0
        kept = 0 if streamed else packed_all * len(tokens.rounds)
        weights = self._resident("plan")
        lanes = lanes_for(facts.layers, torch.device("cpu")) if self.on_cpu else 1
        work = max(lanes * (forward + copies), packing) + (_LANE * lanes if lanes > 1 else 0)
        device = {"weights": weights, "covariances": lanes * covariances, "work": work}
        return self._memory(device, {"hidden_states": hidden, "kept_covariances": kept})

    def _forward_step(self) -> Step:
        return self._rehearsed_pass(
            lambda: forward_bytes(
                self.facts.build, self.facts.layers, self.recipe.context.batch_size, self.facts.tokens.longest_batch
            ),
            self._batch_tokens(),
        )

    def _batch_tokens(self) -> int:
        return self.recipe.context.batch_size * self.facts.tokens.longest_batch

    def _collect_seconds(self) -> dict[str, float]:
        facts, device = self.facts, self.device
        tokens = sum(facts.tokens.rounds)
        share = tokens / self.processes
        forward = 2.0 * self.facts.active * share / device.forward
        triangles = sum(triangle_flops(m[0].d_in, share * facts.share(m[0])) for m in facts.groups.values())
        written = facts.kept_bytes
        moved = 2.0 * share * facts.hidden * facts.dtype.itemsize * len(facts.blocks or []) / device.link
        read = facts.weight_bytes(full=True) / device.disk  # once for all processes of a node
        parts = {
            "forward": forward,
            "products": triangles / device.products,
            "write": written / device.disk,
            "read_weights": read,
        }
        if not self.on_cpu:
            parts["move"] = moved + written / device.link
        if self.processes > 1:
            parts["network"] = self._network()["collect"] / device.network
        return parts

    # Plan

    def _rehearse(self) -> None:
        """Decompose small layers of the same proportions; on a CPU that gives the rate as well."""
        options, facts = self.recipe.adapter, self.facts
        end: linalg.End = "largest" if options.mode == "ipm" else "smallest"
        for layer in facts.layers:
            shape = (layer.d_out, layer.d_in)
            if shape in self.rehearsed:
                continue
            found = machine.rehearse_decomposition(
                *shape, facts.ranks[layer.name], end, options.exponent, facts.dtype, side_by_side=self.side_by_side
            )
            if options.mode in TWO_CONTEXTS:  # a second covariance, and an eigenproblem of both
                more = FP32 * layer.d_in**2 + 2 * 8 * eigenproblem(layer, options.mode) ** 2
                found = replace(found, bytes=found.bytes + more)
            self.rehearsed[shape] = found
        if self.device.measured:
            slowest = min(found.rate for found in self.rehearsed.values())
            self.device = replace(self.device, solve=slowest)

    def _plan_memory(self) -> dict[str, Any]:
        facts = self.facts
        layer = max((found.bytes for found in self.rehearsed.values()), default=0)
        copies = self.device.threads if self.side_by_side and not facts.recollects else 1
        kept = facts.factor_bytes + sum(x.max_rank for x in facts.layers) * FP32
        host, work = {"factors": 2 * kept}, layer * copies  # once more while they are written
        if facts.recollects:  # the model runs while layers wait
            march, host["covariances"] = self._collect_memory(), facts.again_bytes
            work, host = work + march["device"]["above_weights"], host | march["host"]
        return self._memory({"weights": self._resident("plan"), "work": work}, host)

    def _layer_seconds(self, layer: LayerSpec) -> float:
        facts, options, shape = self.facts, self.recipe.adapter, (layer.d_out, layer.d_in)
        rank = facts.ranks[layer.name]
        rate = self.rehearsed[shape].rate if self.device.measured else self.device.solve
        seconds = decomposition_flops(*shape, rank, options.exponent) / rate
        if options.mode in TWO_CONTEXTS:
            n = eigenproblem(layer, options.mode)
            return (4.0 * layer.d_in**2 * layer.max_rank + 12.0 * n**3) / rate
        rounds = self.recipe.context.rounds
        if self.recipe.context.selection == "dynamic" or options.allocation == "dynamic":
            candidates = rounds if self.recipe.context.selection == "dynamic" else 1
            seconds += candidates * machine.survey_flops(*shape) / rate
        return seconds

    def _plan_seconds(self) -> dict[str, float]:
        facts = self.facts
        layers = [self._layer_seconds(layer) for layer in facts.layers]
        read = facts.kept_bytes / len(facts.tokens.rounds) / self.device.disk / -(-self.processes // _PER_NODE)
        parts = {"decompose": makespan(layers, self.processes), "read": read}
        parts["collect_again"] = facts.recollects * readings(self.recipe) * sum(self._collect_seconds().values())
        if self.processes > 1:
            parts["gather"] = facts.factor_bytes / self.device.network
        return parts

    # Train

    def _training_step(self) -> Step:
        facts, options = self.facts, self.recipe.training
        batch, row = options.per_device_train_batch_size, facts.tokens.training_row
        adapter = self.recipe.adapter
        intact = adapter.has_start and adapter.form(facts.inputs.quantisation is not None) == "intact"
        return self._rehearsed_pass(
            lambda: training_bytes(
                facts.build,
                facts.layers,
                facts.ranks,
                batch,
                row,
                checkpointing=options.gradient_checkpointing,
                intact=intact,
                tiles=TILES[self.device.kind],
            ),
            batch * row,
        )

    def _rehearsed_pass(self, run: Any, tokens: int) -> Step:
        try:
            return cast(Step, run())
        except Exception as error:  # any model's own code
            note = f"activations counted, not rehearsed: the model does not run without values ({type(error).__name__})"
            if note not in self.facts.notes:
                self.facts.notes.append(note)
            config = self.facts.model.config.get_text_config()
            wide = getattr(config, "intermediate_size", None) or 4 * self.facts.hidden
            per_token = (10 * self.facts.hidden + 4 * wide) * self.facts.dtype.itemsize
            return Step(tokens * self.facts.hidden * 8, tokens * per_token, 0)

    def _train_memory(self, step: Step) -> dict[str, Any]:
        depth = len(self.facts.blocks or self._layer_count())
        among = self.processes if self.shard else 1
        adapters = self.facts.factor_bytes * (1 if self.recipe.adapter.mode == "lora" else 2) // among
        optimiser = self.facts.trainable * FP32 * 3 // among  # gradients and two moments
        weights, work = self._resident("train"), step.peak(depth)
        device = {"weights": weights, "adapters": adapters, "optimiser": optimiser, "work": work}
        host = {"libraries": _TRAINER, "plan": self.facts.factor_bytes} if self.on_cpu else {}
        if self.recipe.metered:  # covariances that stay in memory where there is room for all
            size = sum(square([group]) for group in self.facts.groups.items())
            sides = 2 if self.recipe.context.held_out else 1
            host["drift_meter"] = sides * (size if size <= _METER_BYTES else 0)
        return self._memory(device, host)

    def _layer_count(self) -> range:
        return range(int(self.facts.model.config.get_text_config().num_hidden_layers))

    def _train_seconds(self, step: Step) -> dict[str, float]:
        facts, options = self.facts, self.recipe.training
        batch, depth = options.per_device_train_batch_size, len(facts.blocks or self._layer_count())
        per_step = options.gradient_accumulation_steps * facts.tokens.training_tokens
        if options.max_steps > 0:
            steps = float(options.max_steps)
        else:
            global_batch = batch * options.gradient_accumulation_steps * self.processes
            steps = math.ceil(options.num_train_epochs * max(facts.tokens.training_records, 1) / global_batch)
        rows = max(batch * facts.tokens.training_row, 1)
        head = 6.0 * facts.embedding()
        passes = 4.0 * self.facts.active  # forwards, and backwards to the inputs: weights are frozen
        flops = (max(step.flops * depth / rows, passes) + head) * per_step
        if options.gradient_checkpointing:
            flops *= 1.33
        parts = {"steps": steps * flops / self.device.forward}
        if self.processes > 1:
            parts["network"] = steps * self._network()["train_per_step"] / self.device.network
        return parts

    # Export

    def _export_memory(self) -> dict[str, Any]:
        full = self.facts.inputs.exports_in_full and self.recipe.export.format != "residual"
        fresh = self.facts.weight_bytes(full=full)  # beside the trained model, to load the export into
        host = {"libraries": _TRAINER} if self.on_cpu else {"weights": fresh} if full else {}
        weights = self.facts.weight_bytes() + (fresh if self.on_cpu or not full else 0)
        return self._memory({"weights": weights, "adapters": 4 * self.facts.factor_bytes}, host)

    # Shared

    def _memory(self, device: Mapping[str, int], host: Mapping[str, int]) -> dict[str, Any]:
        """Totals; on a CPU device and host are one memory, which holds the process itself as well."""
        on_device = dict(device)
        on_device["above_weights"] = sum(device.values()) - device["weights"]
        if self.on_cpu:
            total = self.baseline + sum(device.values()) + sum(host.values())
            return {"device": on_device | {"process": self.baseline, "total": total}, "host": dict(host)}
        return {"device": on_device | {"total": sum(device.values())}, "host": dict(host)}

    def _resident(self, stage: Literal["collect", "plan", "train"]) -> int:
        """Bytes of weights on one device."""
        facts = self.facts
        starting = stage != "train"
        if starting and (self.offload or facts.inputs.quantisation is not None):
            return facts.block_bytes()
        if stage != "train" and self.on_cpu and not self.shard:
            return facts.touched_bytes(stage)
        size = facts.weight_bytes(full=starting)
        return size // self.processes + facts.block_bytes() if self.shard and self.processes > 1 else size

    def _disk(self) -> dict[str, int]:
        facts, factors = self.facts, self.facts.factor_bytes
        spectra, doubled = sum(x.max_rank for x in facts.layers) * FP32, 1 + self.recipe.adapter.has_start
        parts = {
            "covariances": facts.kept_bytes,
            "plan": (factors + spectra) * 2 if self.plans else 0,  # and its journal until it is done
            "adapter": factors * doubled,
            "checkpoints": factors * (doubled + 2) if self.recipe.training.save_steps else 0,
            "export": factors * doubled,
        }
        if self.recipe.export.format in {"residual", "merged"}:
            parts["export"] += facts.weight_bytes(full=True)
        return parts | {"total": sum(parts.values())}

    def _network(self) -> dict[str, int]:
        """Bytes that each process sends in each stage."""
        if self.processes == 1:
            return {}
        facts, share = self.facts, (self.processes - 1) / self.processes
        reduced = 2 * share * sum(packed(g) for g in facts.block_groups()) * len(facts.tokens.rounds)
        found = {
            "collect": round(reduced),
            "plan": round(share * facts.factor_bytes),
            "train_per_step": round(2 * share * facts.trainable * FP32),
        }
        if self.shard:
            found["collect"] += round(share * facts.weight_bytes(full=True))
            found["train_per_step"] += round(2 * share * facts.weight_bytes())
        return found

    def _assumptions(self) -> list[str]:
        found = ["evaluation, generation and downloads are not counted"]
        if not self.device.measured:
            found.append(f"rates of {self.device.name} are assumed, not measured")
        return found
