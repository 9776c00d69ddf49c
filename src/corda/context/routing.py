"""What is known of experts, which see only the tokens routed to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from corda.context.capture import candidate
from corda.errors import CalibrationError
from corda.targets import LayerSpec


def pooled_tokens(
    layers: Sequence[LayerSpec], groups: Mapping[str, str], tokens: Mapping[str, int], rounds: Sequence[int]
) -> dict[str, int]:
    """Pool -> the fewest tokens that any round brought to all of its experts together.

    Args:
        layers: Target layers.
        groups: Layer name -> name of its distinct input.
        tokens: Distinct input and round -> tokens.
        rounds: Numbers of the rounds.
    """
    sums: dict[str, list[int]] = {}
    for layer in layers:
        if layer.pool is not None:
            counts = sums.setdefault(layer.pool, [0] * len(rounds))
            for i, r in enumerate(rounds):
                counts[i] += tokens.get(candidate(groups[layer.name], r), 0)
    return {pool: min(counts) for pool, counts in sums.items()}


def few_tokens_of_experts(
    layers: Sequence[LayerSpec], groups: Mapping[str, str], tokens: Mapping[str, int], rounds: Sequence[int]
) -> list[str]:
    """A warning if experts saw fewer tokens than they have inputs, in any round.

    Args:
        layers: Target layers.
        groups: Layer name -> name of its distinct input.
        tokens: Distinct input and round -> tokens.
        rounds: Numbers of the rounds.
    """
    experts = [layer for layer in layers if layer.pool is not None]
    fewest = {e.name: min(tokens.get(candidate(groups[e.name], r), 0) for r in rounds) for e in experts}
    few = [e.name for e in experts if fewest[e.name] < e.d_in]
    if not few:
        return []
    none = sum(not fewest[name] for name in few)
    return [
        f"{len(few)} of {len(experts)} experts saw fewer tokens than they have inputs ({none} saw none), such as "
        f"{few[0]} with {fewest[few[0]]}: their covariances lean on their layer's pooled one, see adapter.expert_prior"
    ]


def rows_a_pass(layers: Sequence[LayerSpec], batch_size: int, response_only: bool) -> int:
    """The batch size, or 1 with experts that are layers: those are handed rows without their places, so no pads then.

    Args:
        layers: Target layers.
        batch_size: Rows asked for.
        response_only: Only response tokens count.

    Raises:
        CalibrationError: only responses are to count, which such an expert cannot tell.
    """
    if all(layer.pool is None or layer.stored[1] is not None for layer in layers):
        return batch_size
    if response_only:
        raise CalibrationError(
            "experts that are layers of their own do not say which of their inputs are responses",
            where="context.positions",
            got="response",
            fix="set context.positions: all, or leave the experts out of target_modules",
        )
    return 1
