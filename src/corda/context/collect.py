"""Run the calibration set through the model and keep one covariance per distinct layer input."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from corda import artifact
from corda.context.capture import Capture, Captured, candidate, hooked
from corda.context.feeding import fed_as_two, feeder, two_sequences
from corda.context.keeping import Keeping
from corda.context.lanes import Lanes, lanes, lanes_for
from corda.context.masks import followed
from corda.context.rounds import as_rounds, share
from corda.context.route import Route, body_of, find_route
from corda.context.routing import few_tokens_of_experts, pooled_tokens, rows_a_pass
from corda.context.store import HELD_OUT, Context
from corda.context.stream import streamed
from corda.context.vision import patches_counted, refuse_response_only
from corda.data.batches import Batch, Encoded, calibration_rounds, pad_id
from corda.data.formats import to_records
from corda.data.rendering import Template
from corda.distributed import ALONE, Processes, world
from corda.errors import CalibrationError, ModelError
from corda.journal import Journal, merged
from corda.offload import LazyWeights
from corda.progress import Progress, silent
from corda.recipe import Tower
from corda.sharding import device_of, gathered_around, is_sharded, is_spread, refuse_partitioned
from corda.targets import LayerSpec, find_targets


def collect(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[str | dict[str, Any]],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    towers: Sequence[Tower] | None = None,
    samples: int | None = 256,
    tokens: int | None = None,
    pack_to: int | None = None,
    rounds: int = 1,
    max_length: int = 1024,
    template: Template = "plain",
    positions: Literal["all", "response"] = "all",
    batch_size: int = 8,
    skip_unseen: bool = False,
    seed: int = 0,
    learn: Sequence[str | dict[str, Any]] | None = None,
    processes: Processes = ALONE,
) -> Context:
    """Collect C = X Xᵀ / T for every target layer (CorDA, section 3.1), X being its inputs over T real tokens.

    Args:
        model: Any transformers model; left as it was, whatever happens.
        tokenizer: Its tokenizer; for a model of images and text, its processor.
        records: Texts, or dicts of any format in `data.formats`, with an `image` or `images`
            where the model takes them.
        target_modules: As in `find_targets`.
        towers: Of a vision-language model, where they are looked for; default: the language model.
        samples: Records drawn for each round (windows with pack_to).
        tokens: Limit in tokens, for each round.
        pack_to: Window length in tokens; attention does not cross records.
        rounds: Disjoint sets of samples, each of which makes a candidate covariance (CorDA++).
        max_length: Longest record in tokens.
        template: "plain" or "chat".
        positions: Count all tokens, or those of responses only.
        batch_size: Rows per forward pass; does not change the result.
        skip_unseen: Leave out layers that saw no token instead of failing.
        seed: Of the order drawn.
        learn: Records of the task, where `records` are the knowledge to keep: for modes dual and contrast.
        processes: `corda.distributed.world()` shares the records out over all of torch.distributed's processes, which
            then all have to call this with the same arguments; a model sharded by FSDP2 is always shared out.

    Raises:
        TargetError: nothing matched.
        DataError: a record fits no format.
        CalibrationError: a layer saw no token, or activations are not finite.
    """
    chosen = []
    for source in (records, learn or ()):
        raw = [{"text": record} if isinstance(record, str) else record for record in source]
        if raw or source is records:
            chosen += calibration_rounds(
                to_records(raw),
                tokenizer,
                rounds,
                template=template,
                max_length=max_length,
                samples=samples,
                tokens=tokens,
                pack_to=pack_to,
                seed=seed,
            )
    return collect_encoded(
        model,
        chosen,
        find_targets(model, target_modules, towers),
        pad_token_id=pad_id(tokenizer),
        batch_size=batch_size,
        response_only=positions == "response",
        skip_unseen=skip_unseen,
        sides=("learn",) * (len(chosen) - rounds),
        processes=processes,
    )


def collect_encoded(
    model: PreTrainedModel,
    encoded: Sequence[Encoded] | Sequence[Sequence[Encoded]],
    layers: Sequence[LayerSpec],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    response_only: bool = False,
    skip_unseen: bool = False,
    stream: bool = True,
    journal: Journal | None = None,
    weights: LazyWeights | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
    sides: Sequence[str] = (),
    processes: Processes = ALONE,
    keeping: Keeping | None = None,
) -> Context:
    """`collect` for records that are tokens already and layers that are chosen already.

    Args:
        model: See `collect`.
        encoded: Calibration records, or those of several rounds, each of which makes a candidate covariance.
        layers: Target layers.
        pad_token_id: Of pads, which never count.
        batch_size: Rows per forward pass.
        response_only: Only response tokens count.
        skip_unseen: Leave out layers that saw no token instead of failing.
        stream: One block after the other where the model allows it; the result is the same.
        journal: Where finished blocks are kept, so that an interrupted collection continues.
        weights: For a model without weights: where those of one block at a time come from.
        device: To compute on; default: that of the model.
        progress: Shows how far it is.
        sides: Where the last of `encoded` are of other sources: their names; see `Context.side`.
        processes: See `collect`.
        keeping: Whether a journal keeps covariances, or they are let go and had again by `march`; without, it does.

    Raises:
        ModelError: DeepSpeed partitioned the model; or its targets do not lie in one list of blocks, with `weights` or
            where covariances are to be collected again.
        ResourceError: with a journal, the covariances of all rounds do not fit on its disk.
    """
    refuse_partitioned(model)
    sharded = is_sharded(model)
    processes = world() if sharded else processes
    batch_size = rows_a_pass(layers, batch_size, response_only)
    if two_sequences(model):
        _keeps(keeping, "an encoder with a decoder")
        return _of_two_sequences(model, as_rounds(encoded), layers, skip_unseen, len(sides))
    rounds = [
        share(part, processes, pad_token_id, batch_size, response_only=response_only, even=sharded)
        for part in as_rounds(encoded)
    ]
    if response_only:
        refuse_response_only(model, layers)
    device = device or device_of(model)
    route = _route(model, layers, rounds, processes, device, stream=stream)
    if route.blocks is None:
        _keeps(keeping, route.why or "the model is not run block by block")
        _refuse_offload(weights, route.why)
        found = _in_whole(model, rounds, layers, journal, progress, processes)
    else:
        with gathered_around(model, [block for _, block in route.blocks]):
            parts = streamed(
                model,
                route,
                layers,
                journal=journal,
                progress=progress,
                weights=weights,
                device=device,
                processes=processes,
                keeping=keeping,
            )
            found = list(parts)
    notes = [f"collected whole, not in blocks: {route.why}"] if route.why else []
    return _finish(found, layers, skip_unseen, notes, len(rounds) - len(sides), tuple(sides))


def _refuse_offload(weights: LazyWeights | None, why: str) -> None:
    if weights is not None:
        leave = "leave the layers outside of the blocks out of adapter.target_modules"
        raise ModelError(
            f"weights off-loaded or of a 4-bit base are read block by block, and {why or 'context.stream is false'}",
            where="context.offload, model.load_in_4bit",
            fix=leave if why else "set context.stream: true",
        )


def _route(
    model: PreTrainedModel,
    layers: Sequence[LayerSpec],
    rounds: list[list[Batch]],
    processes: Processes,
    device: torch.device,
    *,
    stream: bool,
) -> Route:
    """How the batches go through the model; FSDP, which sets itself up in a first pass, is given one."""
    sharded = is_sharded(model)
    images = any(processes.hear(any(batch.visual for parts in rounds for batch in parts)))
    if images and sharded:
        raise ModelError(
            "a sharded model of images and text cannot be collected on",
            fix="load it whole in every process, or spread it with model.device_map",
        )
    route = (
        find_route(model, layers, rounds, images, processes, device)
        if stream
        else Route(None, rounds, body_of(model, layers))
    )
    if sharded:
        with hooked(model, Capture([])):
            model(**feeder(model)(rounds[0][-1].to(device_of(model))))
    return route


def _in_whole(
    model: PreTrainedModel,
    rounds: Sequence[Sequence[Batch]],
    layers: Sequence[LayerSpec],
    journal: Journal | None,
    progress: Progress,
    processes: Processes,
) -> list[Captured]:
    """Every round through the whole body; after the first one, disk for all is asked for."""
    run, found = model if is_sharded(model) else body_of(model, layers), []
    for r, part in enumerate(rounds):
        found.append(_whole(model, run, progress(part, "collect", len(part)), layers, r, processes))
        if journal is not None and r == 0:
            artifact.need_disk(journal.folder, found[0].bytes * len(rounds), "lower context.rounds")
    return found


def _keeps(keeping: Keeping | None, why: str) -> None:
    """Where there are no blocks, covariances are kept."""
    if keeping is not None:
        keeping.settle(True, why)
        if keeping.kept is False:
            raise ModelError(
                f"covariances cannot be collected again block by block: {why}",
                where="context.covariances",
                got="recollect",
                fix="set it to disk",
            )


def collect_batches(
    model: PreTrainedModel, parts: Iterable[Batch], layers: Sequence[LayerSpec], *, skip_unseen: bool = False
) -> Context:
    """`collect` for batches made by the caller (parts), with these layers and skip_unseen, through the whole body."""
    return _finish([_whole(model, body_of(model, layers), parts, layers, 0)], layers, skip_unseen, [], 1)


def collect_running(model: nn.Module, run: Callable[[], object], layers: Sequence[LayerSpec]) -> Context:
    """`collect` for data that only the caller knows how to put through the model.

    Tokens are what the 2-D attention_mask of each forward pass says, or every input where there is none.

    Args:
        model: Any module that has the layers; left as it was, whatever happens.
        run: Runs it on the calibration data, in any number of forward passes.
        layers: Target layers.

    Raises:
        CalibrationError: a layer saw no token, activations are not finite, or a padded batch whose tokens cannot be
            told from pads.
    """
    capture = Capture(layers)
    with hooked(model, capture), followed(model, capture), capture.batch(None):
        run()
    capture.check_finite()
    if not capture.groups:
        raise CalibrationError(
            "no target layer was run",
            where="the callback that runs the model",
            fix="run the very model that is hooked, on at least one batch",
        )
    return _finish([capture.captured()], layers, False, [], 1)


def _whole(
    model: PreTrainedModel,
    body: nn.Module,
    parts: Iterable[Batch],
    layers: Sequence[LayerSpec],
    round_: int,
    processes: Processes = ALONE,
) -> Captured:
    device = device_of(model)
    feed = feeder(model)

    def run(cpu_batch: Batch) -> None:
        batch = cpu_batch.to(device)
        with capture.batch(batch.counts):
            body(**feed(batch))

    rest = iter(parts)
    with lanes(1 if is_spread(model) else lanes_for(layers, device)) as threads:
        capture = Lanes(layers, threads, device)
        with hooked(model, capture), patches_counted(model, capture):
            while some := list(itertools.islice(rest, threads.count)):
                threads.run(run, some)
    capture.merge()
    if processes.size == 1:
        capture.check_finite()
    return capture.captured(round_, processes)


def _of_two_sequences(
    model: PreTrainedModel,
    rounds: Sequence[Sequence[Encoded]],
    layers: Sequence[LayerSpec],
    skip_unseen: bool,
    sides: int,
) -> Context:
    """An encoder with a decoder, whole and record by record: in its cross-attention pads cannot be told from tokens."""
    if sides:
        raise CalibrationError(
            "two contexts of a model with an encoder and a decoder are not collected together",
            where="adapter.mode",
            fix="use mode kpm or ipm",
        )
    body, found = body_of(model, layers), []
    device, start = device_of(model), int(model.config.decoder_start_token_id or 0)
    for r, records in enumerate(rounds):
        capture = Capture(layers)
        with hooked(model, capture), capture.batch(None):
            for fed in fed_as_two(records, start):
                body(**{name: ids.to(device) for name, ids in fed.items()})
                capture.check_finite()
        found.append(capture.captured(r))
    notes = ["collected whole and record by record: an encoder with a decoder"]
    return _finish(found, layers, skip_unseen, notes, len(rounds))


def _finish(
    found: Sequence[Captured],
    layers: Sequence[LayerSpec],
    skip_unseen: bool,
    notes: Sequence[str],
    rounds: int,
    sides: tuple[str, ...] = (),
) -> Context:
    needed = [*range(rounds), *(rounds + i for i, side in enumerate(sides) if side != HELD_OUT)]
    tokens = {group: t for part in found for group, t in part.tokens.items()}
    groups = {layer: group for part in found for layer, group in part.groups.items()}
    groups |= {layer.name: layer.name for layer in layers if layer.pool is not None and layer.name not in groups}
    pools = pooled_tokens(layers, groups, tokens, needed)
    unseen = [
        layer.name
        for layer in layers
        if (layer.pool is not None and not pools[layer.pool])
        or layer.name not in groups
        or (layer.pool is None and any(candidate(groups[layer.name], r) not in tokens for r in needed))
    ]
    if unseen and not skip_unseen:
        raise CalibrationError(
            f"{len(unseen)} target layer{'s' if len(unseen) > 1 else ''} saw no token",
            where=", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else ""),
            fix="calibrate on data that reaches them, drop them from target_modules, "
            "or set context.skip_unseen: true to leave them out",
        )
    missed = set(unseen)
    seen = tuple(layer for layer in layers if layer.name not in missed)
    if not seen:
        raise CalibrationError("no target layer saw a token", fix="check the calibration data")
    warnings = [*notes, *(f"left out, no token seen: {name}" for name in unseen)]
    warnings += few_tokens_of_experts(seen, groups, tokens, needed)
    shared = [layer for layer in seen if layer.pool is None]
    widest = max(shared or seen, key=lambda layer: layer.d_in)
    widest_groups = {groups[layer.name] for layer in shared if layer.d_in == widest.d_in}
    fewest = min((tokens[candidate(group, r)] for group in widest_groups for r in needed), default=None)
    if fewest is not None and fewest < 2 * widest.d_in:
        warnings.append(
            f"few calibration tokens: {fewest} for {widest.name} with {widest.d_in} inputs, whose covariance has rank "
            f"{min(fewest, widest.d_in)} at most; {8 * widest.d_in} would do"
        )
    return Context(
        seen,
        {layer.name: groups[layer.name] for layer in seen},
        tokens,
        merged([part.packed for part in found]),
        tuple(warnings),
        rounds,
        sides,
    )
