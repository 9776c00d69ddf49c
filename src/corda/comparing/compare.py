"""`corda compare`: run a study's cells in the order of its priority list, then say what they show."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from typing import Any

import torch

from corda import artifact
from corda.comparing import fairness
from corda.comparing.cell import finished, finite, run_cell
from corda.comparing.choosing import choose, further
from corda.comparing.conclusions import conclusions
from corda.comparing.fronts import error, pulls, retained
from corda.comparing.methods import method
from corda.comparing.study import Cell, Study, cells
from corda.errors import RecipeError
from corda.models import pick_device
from corda.progress import Progress, silent
from corda.report.comparison import write_comparison

_IN_A_ROW = 2  # processes of one device that may be killed before it is given up
COMPARISON, PAGE = "comparison.json", "comparison.html"


def compare(
    study: Study,
    *,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda _: None,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run what is not there yet, as far as the minutes reach, and write comparison.json and comparison.html.

    Args:
        study: What to compare; refused where the comparison would not be fair.
        progress: Shows how far each stage is, where cells run one after the other.
        announce: Told of every cell.
        prepare: Called first in every process of its own, where cells run side by side; a function of a module.

    Returns:
        The content of comparison.json.

    Raises:
        CordaError: the study is unfair or a recipe is wrong, before anything runs.
    """
    facts = fairness.check(study)
    _refuse_devices(study.devices)
    artifact.make_folder(study.output_dir)
    started = time.perf_counter()

    def in_time() -> bool:
        return study.minutes is None or time.perf_counter() - started < 60 * study.minutes

    reference = facts["trainable_parameters"]
    todo = cells(study)

    def run(some: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
        for cell, result in _run(study, some, reference, in_time, progress, announce, prepare):
            if result["status"] == "unavailable":
                announce(f"{cell.id} is unavailable: {result['reason']}")
            yield cell, result

    results = dict(run(todo))
    for _ in range(study.extensions):
        more = _extensions(study, results)
        if not more or not in_time():
            break
        todo += more
        results |= dict(run(more))
    return write(study, todo, results, facts)


def write(study: Study, todo: Sequence[Cell], results: dict[Cell, dict[str, Any]], facts: Any) -> dict[str, Any]:
    """comparison.json and the page, from the results that are there.

    Args:
        study: What was decided beforehand.
        todo: All cells.
        results: Cell -> its results.
        facts: What the checks found out.
    """
    runs = [results[cell] for cell in todo if cell in results]
    where = artifact.provenance(pick_device(study.devices[0]))
    comparison: dict[str, Any] = {
        "schema": artifact.SCHEMA,
        "study": study.model_dump(mode="json", exclude={"output_dir", "base", "overrides"}),
        "recipe": _without_places(fairness.shared_settings(study)),
        "labels": labels(study),
        "layers": facts["layers"],
        "trainable_parameters": facts["trainable_parameters"],
        "runs": [_published(study, run) for run in runs],
        "empty": [cell.id for cell in todo if cell not in results],
        "conclusions": conclusions(study, runs),
        "device": where["device"],
        "provenance": where,
    }
    comparison = finite(comparison)
    artifact.write_json(study.output_dir / COMPARISON, comparison)
    write_comparison(comparison, study.output_dir / PAGE)
    return comparison


def labels(study: Study) -> dict[str, str]:
    """What each method is called on pages: the method's label, with the study's own name where that is another one."""
    own = {name: method(entry.method).label for name, entry in study.methods.items()}
    return {n: own[n] if n == entry.method else f"{own[n]} ({n})" for n, entry in study.methods.items()}


def gathered(study: Study) -> dict[str, Any]:
    """What `compare` would write now, from the cells that are done; runs nothing."""
    facts = fairness.check(study)
    todo = cells(study)
    results = {cell: known for cell in todo if (known := finished(study, cell)) is not None}
    for _ in range(study.extensions):
        more = [cell for cell in _extensions(study, results) if cell not in results]
        results |= {cell: known for cell in more if (known := finished(study, cell)) is not None}
        todo += [cell for cell in more if cell in results]
    return write(study, todo, results, facts)


def _run(
    study: Study,
    todo: Sequence[Cell],
    reference: int,
    in_time: Callable[[], bool],
    progress: Progress,
    announce: Callable[[str], None],
    prepare: Callable[[], None] | None,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells with their results; those that the minutes do not reach are left out."""
    open_: list[Cell] = []
    for cell in todo:
        known = finished(study, cell)
        if known is None or known["status"] == "unavailable":  # what it lacked may be there now
            open_.append(cell)
        else:
            yield cell, known
    if len(study.devices) == 1:
        for number, cell in enumerate(open_, 1):
            if not in_time():
                announce(f"out of time: {len(open_) - number + 1} cells stay empty")
                return
            announce(f"[{number}/{len(open_)}] {cell.id}")
            yield cell, run_cell(study, cell, device=study.devices[0], reference=reference, progress=progress)
    else:
        yield from _side_by_side(study, open_, reference, in_time, announce, prepare)


def _side_by_side(
    study: Study,
    todo: Sequence[Cell],
    reference: int,
    in_time: Callable[[], bool],
    announce: Callable[[str], None],
    prepare: Callable[[], None] | None,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """One process a device, which sees no other GPU; each takes the next cell when it is free."""
    waiting = enumerate(todo, 1)
    running: dict[Future[dict[str, Any]], tuple[Cell, _Worker]] = {}
    with ExitStack() as stack:
        free = [_Worker(device, prepare, stack) for device in study.devices]
        while True:
            while free and in_time() and (numbered := next(waiting, None)) is not None:
                (number, cell), worker = numbered, free.pop()
                announce(f"[{number}/{len(todo)}] {cell.id} on {worker.device}")
                running[worker.run(study, cell, reference)] = (cell, worker)
            if not running:
                if left := len(list(waiting)):
                    announce(f"{'out of time' if free else 'no device is left'}: {left} cells stay empty")
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                cell, worker = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    announce(f"{cell.id} stays empty: its process was killed, perhaps for want of memory")
                    free += [worker] if worker.again() else []
                else:
                    worker.killed = 0
                    free.append(worker)
                    yield cell, result


class _Worker:
    """A process for one device's cells, begun anew where it was killed."""

    def __init__(self, device: str, prepare: Callable[[], None] | None, stack: ExitStack) -> None:
        self.device, self.killed = device, 0
        self._prepare, self._stack = prepare, stack
        self._pool = self._begun()

    def _begun(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(self._prepare,))
        return self._stack.enter_context(pool)

    def run(self, study: Study, cell: Cell, reference: int) -> Future[dict[str, Any]]:
        """Begin a cell. The process is made here, and told its GPU before any library can look for one."""
        device = self.device.partition(":")[0]
        with _visible(self.device):
            try:
                return self._pool.submit(run_cell, study, cell, device=device, reference=reference)
            except BrokenProcessPool:  # killed between two cells
                self._pool = self._begun()
                return self._pool.submit(run_cell, study, cell, device=device, reference=reference)

    def again(self) -> bool:
        """A new process after the old one was killed; not after two in a row."""
        self.killed += 1
        self._pool = self._begun()
        return self.killed < _IN_A_ROW


@contextmanager
def _visible(device: str) -> Iterator[None]:
    """Inside, new processes see that GPU alone."""
    name, (kind, _, number) = "CUDA_VISIBLE_DEVICES", device.partition(":")
    given = os.environ.get(name)
    if kind == "cuda" and number:
        os.environ[name] = given.split(",")[int(number)] if given else number
    try:
        yield
    finally:
        if given is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = given


def _refuse_devices(devices: Sequence[str]) -> None:
    """Refuse GPUs that are not there.

    Raises:
        RecipeError: names them.
    """
    count = torch.cuda.device_count()
    missing = [one for one in devices if one.startswith("cuda") and int(one.partition(":")[2] or 0) >= count]
    if missing:
        raise RecipeError("there is no such device", where="devices", got=", ".join(missing), expected=f"{count} GPUs")


def _begin(prepare: Callable[[], None] | None) -> None:
    end_with_parent()
    if prepare is not None:
        prepare()


def end_with_parent() -> None:
    """Make this process end when the one that started it is killed; it would wait for work for ever, model and all."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _extensions(study: Study, results: dict[Cell, dict[str, Any]]) -> list[Cell]:
    """One more rate for every method whose best rate is at an end of what was run."""
    more = []
    for name in study.methods:
        own = [cell for cell in results if cell.name == name and results[cell]["status"] != "unavailable"]
        if not {cell.learning_rate for cell in own if not cell.extension} >= set(study.rates(name)):
            continue  # the grid itself is not run yet
        best = choose([results[cell] for cell in own], study.development)
        if best is None or best.inside:
            continue
        rate = further([cell.learning_rate for cell in own], best.end)
        seeds = sorted({cell.seed for cell in own}, key=study.seeds.index)
        more += [Cell(name, rate, seed, best.variant, extension=True) for seed in seeds]
    return more


def _published(study: Study, run: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's results without what only conclusions need, with what is retained of each kept score."""
    kept = {k: v for k, v in run.items() if k not in {"influence", "influence_before", "fingerprint"}}
    after, before = run["scores"].get("after", {}), run["scores"].get("before", {})
    measured = [m for m in study.keep if m in after]
    share = {m: retained(m, before[m]["value"], after[m]["value"]) for m in measured}
    errors = {m: error(of_records) for m in measured if len(of_records := pulls(run, m)) > 1}
    return kept | {"retained": share, "rise_stderr": errors}


def _without_places(raw: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the folder of this machine's data."""
    data = {k: v for k, v in raw.get("data", {}).items() if k != "data_dir"}
    return raw | {"data": data}
