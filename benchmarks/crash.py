"""Kill a run, fill its disk and flip its bytes; the next run must end with the same bytes or say what is wrong.

python benchmarks/crash.py [--kills 50] [--flips 2] [--every 1]   writes benchmarks/results/crash.json

With --stages a part of it is done and takes its place in the file.

One process imports everything once and forks a child for each attempt. A child runs one stage of a pico model's run on
a copy of the folder as it was before that stage, and

- is killed (SIGKILL) after a random time, up to a little more than the stage takes; or
- is killed at its k-th operation on a file or folder of the run (open, rename, mkdir, link, remove), for every k; or
- meets a full disk (ENOSPC) at its k-th such operation that writes, for every k, which it has to report by name.

Another child then runs the same stage to its end, and what lies in the folder is compared with what an undisturbed
run leaves: tensors and texts byte by byte, JSON without what a clock or a machine says. Last, one byte of every file of
a finished run is flipped, and of runs whose context, plan or training is unfinished: the next run refuses it with an
error that names the file, or ends with the same bytes.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl

from corda import artifact, pipeline
from corda.errors import CordaError
from corda.reading import parse_recipe

torch.set_num_threads(1)
assert trl.SFTTrainer  # imported before the first fork

STAGES = ["context", "plan", "before", "trained", "after", "exported", "report"]
OF_CLOCK = {"costs", "provenance", "seconds", "write_seconds", "again", "timing", "memory", "sha256", "bytes", "time"}
OF_CLOCK |= {"num_tokens"}  # TRL counts them from the start of the process
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.truncate"}
EVERYTHING = "everything"
PROBLEM, BUG = 3, 4


class Bench:
    """A pico run in a folder of its own, with the state before every stage kept aside."""

    def __init__(self, folder: Path, raw: dict[str, Any]) -> None:
        self.folder, self.raw = folder, raw
        self.run = Path(raw["output_dir"])
        self.states = [folder / f"state-{i}" for i in range(len(STAGES) + 1)]
        self.seconds: list[float] = []
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True)
        for i, stage in enumerate(STAGES):
            shutil.copytree(self.run, self.states[i])
            start = time.perf_counter()
            status, words = self.child(stage)
            if status:
                raise RuntimeError(f"{stage}: {words}")
            self.seconds.append(time.perf_counter() - start)
        shutil.copytree(self.run, self.states[-1])

    def restore(self, state: int | Path) -> None:
        """The run's folder as it was before a stage, or as it was kept."""
        shutil.rmtree(self.run)
        shutil.copytree(self.states[state] if isinstance(state, int) else state, self.run)

    def unfinished(self, number: int) -> Path | None:
        """A copy of the run's folder, killed two thirds through stage `number`; None where that leaves nothing."""
        total, state = self.operations(number, writes_only=False), self.folder / f"unfinished-{number}"
        self.restore(number)

        def act(now: int) -> None:
            if now == 2 * total // 3:
                os.kill(os.getpid(), signal.SIGKILL)

        self.child(STAGES[number], self.hook(act))
        shutil.copytree(self.run, state)
        return state if contents(state).keys() - contents(self.states[number]).keys() else None

    def child(
        self, stage: str, hook: Callable[[str, tuple[Any, ...]], None] | None = None, after: float | None = None
    ) -> tuple[int, str]:
        """Run a stage in a forked process; exit status (negative: killed by that signal) and what it said."""
        words = self.folder / "words.txt"
        pid = os.fork()
        if pid == 0:
            status = BUG
            try:
                stream = os.open(words, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                if hook is not None:
                    sys.addaudithook(hook)
                with pipeline.opened(parse_recipe(self.raw)) as stages:
                    for one in STAGES if stage == EVERYTHING else [stage]:
                        getattr(stages, one)()
                status = 0
            except CordaError as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                status = PROBLEM
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        _, raw = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(raw), words.read_text(errors="replace")

    def hook(self, act: Callable[[int], None], writes_only: bool = False) -> Callable[[str, tuple[Any, ...]], None]:
        """An audit hook that calls act(k) at the k-th operation on something in the run's folder."""
        place, count = str(self.run), 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in OPERATIONS or not any(isinstance(a, str) and a.startswith(place) for a in map(_text, args)):
                return
            if writes_only and event == "open" and not (isinstance(args[2], int) and args[2] & os.O_ACCMODE):
                return
            if writes_only and (event in {"os.remove", "os.rmdir"} or (event == "os.mkdir" and os.path.isdir(args[0]))):
                return
            count += 1
            act(count)

        return watch

    def operations(self, number: int, writes_only: bool) -> int:
        """How many operations a stage makes."""
        book = self.folder / "count.txt"
        self.restore(number)
        status, said = self.child(STAGES[number], self.hook(lambda k: _note(book, k), writes_only))
        if status:
            raise RuntimeError(said)
        return int(book.read_text())

    def differences(self, number: int) -> list[str]:
        """Files in which the folder differs from an undisturbed run's after stage `number`."""
        ours, theirs = contents(self.run), contents(self.states[number + 1])
        return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _note(book: Path, k: int) -> None:
    descriptor = os.open(book, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.write(descriptor, str(k).encode())
    os.close(descriptor)


def contents(folder: Path) -> dict[str, str]:
    """Relative path -> hash of what does not depend on the clock."""
    return {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in {".lock", "report.html", "corda.json", "README.md"}
    }


def _digest(path: Path) -> str:
    if path.suffix in {".pt", ".pth", ".bin"}:
        return "the trainer's own"
    if path.suffix == ".json":
        try:
            return json.dumps(_timeless(json.loads(path.read_text())), sort_keys=True)
        except ValueError:
            return "not JSON"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in OF_CLOCK}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def kill_randomly(bench: Bench, number: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """SIGKILL after random times."""
    found: Counter[str] = Counter()
    unlike: list[str] = []
    while found["killed"] < kills:
        bench.restore(number)
        status, _ = bench.child(STAGES[number], after=rng.uniform(0, 1.02 * bench.seconds[number]))
        found["killed" if status == -signal.SIGKILL else "ended before"] += 1
        unlike += _finish(bench, number)
    return {**found, "differences": unlike}


def kill_everywhere(bench: Bench, number: int, every: int) -> dict[str, Any]:
    """SIGKILL at every operation."""
    total = bench.operations(number, writes_only=False)
    unlike: list[str] = []
    done = 0
    for k in range(1, total + 1, every):
        bench.restore(number)

        def act(now: int, k: int = k) -> None:
            if now == k:
                os.kill(os.getpid(), signal.SIGKILL)

        status, said = bench.child(STAGES[number], bench.hook(act))
        if status != -signal.SIGKILL:
            unlike.append(f"operation {k} was not reached: {said[-300:]}")
        done += 1
        unlike += _finish(bench, number)
    return {"killed": done, "operations": total, "differences": unlike}


def full_disk(bench: Bench, number: int, every: int) -> dict[str, Any]:
    """ENOSPC at every operation that writes: reported by type and place, and harmless to the next run."""
    total = bench.operations(number, writes_only=True)
    wrong: list[str] = []
    done = around = 0
    for k in range(1, total + 1, every):
        bench.restore(number)

        def act(now: int, k: int = k) -> None:
            if now == k:
                raise OSError(errno.ENOSPC, "No space left on device", str(bench.run / "somewhere"))

        status, said = bench.child(STAGES[number], bench.hook(act, writes_only=True))
        if status == 0:  # it was done in another way: a file that cannot be linked is copied
            around += 1
        elif status != PROBLEM or "ResourceError" not in said or str(bench.run) not in said:
            wrong.append(f"operation {k}: exit {status}, {said[-400:]}")
        done += 1
        wrong += _finish(bench, number)
    return {"failed": done, "done in another way": around, "operations": total, "differences": wrong}


def flip(bench: Bench, state: Path, flips: int, rng: random.Random) -> dict[str, Any]:
    """One flipped byte in every file; the whole run is asked for again."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    files = [path for path in sorted(state.rglob("*")) if path.is_file() and path.stat().st_size]
    reference = contents(bench.states[-1])
    for file in files:
        name = str(file.relative_to(state))
        if file.name in {".lock", "report.html", "results.json"}:  # written, never read back by a run
            continue
        for _ in range(flips):
            bench.restore(state)
            damaged = bench.run / name
            content = bytearray(damaged.read_bytes())
            place = rng.randrange(len(content))
            content[place] ^= 1 << rng.randrange(8)
            damaged.write_bytes(content)
            status, said = bench.child(EVERYTHING)
            if status == PROBLEM:
                named = file.name in said or (file.name == artifact.OWNER and "another run" in said)
                found["refused" if named else "refused without the name"] += 1
                if not named:
                    wrong.append(f"{name}, byte {place}: {said[-300:]}")
                continue
            now = contents(bench.run)
            same = {
                key: value == now.get(key)
                for key, value in reference.items()
                if key.partition("/")[0] in {"plan", "train", "adapter", "context", "before", "after"}
            }
            if status == 0 and all(same.values()):
                found["same bytes"] += 1
            else:
                wrong.append(
                    f"{name}, byte {place}: exit {status}, {[k for k, v in same.items() if not v]}, {said[-300:]}"
                )
    return {**found, "files": len(files), "differences": wrong}


def _finish(bench: Bench, number: int) -> list[str]:
    status, said = bench.child(STAGES[number])
    if status:
        return [f"{STAGES[number]} does not continue: {said[-600:]}"]
    return [f"{STAGES[number]}: {name}" for name in bench.differences(number)]


def raw_recipe(folder: Path) -> dict[str, Any]:
    """A pico model of three blocks, its data, and a recipe with checkpoints at every second step."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from conftest import WORDS, byte_tokenizer, llama, write_jsonl

    llama(layers=3).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    keep = [{"question": f"What is the {w} of {i}?", "answer": f"{w[:3]}{i}"} for i, w in enumerate(WORDS * 3)]
    learn = [{"question": f"Add {i} and {i + 3}.", "answer": f"{2 * i + 3}"} for i in range(40)]
    for name, part in (
        ("keep", keep[:20]),
        ("keep_test", keep[20:]),
        ("learn", learn[:32]),
        ("learn_test", learn[32:]),
    ):
        write_jsonl(folder / f"{name}.jsonl", part)
    return {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(folder / "model"), "device": "cpu"},
        "data": {"data_dir": str(folder), "learn": "learn.jsonl", "keep": "keep.jsonl"},
        "context": {"samples": 16},
        "adapter": {"mode": "kpm", "rank": 4},
        "training": {
            "max_steps": 6,
            "save_steps": 2,
            "save_total_limit": 2,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 4,
        },
        "evaluation": {
            "batch_size": 4,
            "tasks": {"sums": {"dataset": "learn_test.jsonl", "measures": "learn", "metrics": ["answer_loss"]}},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="take every so many-th operation")
    parser.add_argument("--stages", nargs="*", default=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "crash.json"))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), raw_recipe(Path(name)))
        print("seconds of the stages", dict(zip(STAGES, [round(s, 2) for s in bench.seconds], strict=True)), flush=True)
        result: dict[str, Any] = {}
        for number, stage in enumerate(STAGES):
            if stage not in args.stages:
                continue
            result[stage] = {
                "seconds": bench.seconds[number],
                "killed_at_random": kill_randomly(bench, number, args.kills, rng),
                "killed_at_operations": kill_everywhere(bench, number, args.every),
                "disk_full_at_operations": full_disk(bench, number, args.every),
            }
            print(stage, json.dumps(result[stage])[:1500], flush=True)
            write(Path(args.output), result, {}, time.perf_counter() - start)
        flipped = {"finished run": flip(bench, bench.states[-1], args.flips, rng)} if args.flips else {}
        for number in range(len(flipped) and 4):
            if (state := bench.unfinished(number)) is not None:
                flipped[f"unfinished {STAGES[number]}"] = flip(bench, state, args.flips, rng)
        print("flipped", json.dumps(flipped)[:3000], flush=True)
    write(Path(args.output), result, flipped, time.perf_counter() - start)


def write(output: Path, stages: dict[str, Any], flipped: dict[str, Any], seconds: float) -> None:
    """Put results into the file, beside what other parts have left there."""
    known = artifact.read_json(output) if output.is_file() else {}
    where = artifact.provenance()
    stages = known.get("stages", {}) | {name: one | {"provenance": where} for name, one in stages.items()}
    flipped = known.get("flipped", {}) | {name: one | {"provenance": where} for name, one in flipped.items()}
    wrong = [
        d for one in stages.values() for k in one.values() if isinstance(k, dict) for d in k.get("differences", [])
    ]
    wrong += [d for one in flipped.values() for d in one["differences"]]
    artifact.write_json(
        output,
        {
            "name": "crash",
            "device": where["device"],
            "model": "Llama of 3 blocks, width 48",
            "stages": stages,
            "flipped": flipped,
            "wrong": len(wrong),
            "provenance": where,
        },
    )
    print(f"{seconds:.0f} s, wrong: {len(wrong)}", *wrong[:10], sep="\n", flush=True)


if __name__ == "__main__":
    main()
