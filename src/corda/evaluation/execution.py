"""Programs that a model writes, run against their tests in a process of their own with little to do harm with.

Not a prison: limits of time, memory, processes, files and (where the kernel lets an ordinary user have it) no network
keep accidents in, not an attacker out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from corda.data.formats import Record
from corda.evaluation.generation import Answer, generate
from corda.evaluation.scores import Score, mean
from corda.progress import Progress, silent

SECONDS, MEMORY, FILE_BYTES, PROCESSES = 5.0, 1 << 30, 1 << 20, 16
# What ends a function body of a completion without a chat.
STOP = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n```", "\n@", "\nassert ")
_RIGHT = "corda-passed"

# Runs in the child before the program: limits first, then a new network namespace without any interface in it.
_GUARD = """
import ctypes, os, resource, sys, types
seconds, memory, size, processes = (int(float(value)) for value in sys.argv[1:5])
token, told = sys.argv.pop(), int(sys.argv.pop())
try:
    user, network = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    libc.unshare(user | network) == 0 or libc.unshare(network)
except (OSError, AttributeError):
    pass
for limit, value in (
    (resource.RLIMIT_CPU, seconds + 1),
    (resource.RLIMIT_AS, memory),
    (resource.RLIMIT_FSIZE, size),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_NOFILE, 64),
    (getattr(resource, "RLIMIT_NPROC", resource.RLIMIT_CORE), processes),
):
    try:
        resource.setrlimit(limit, (value, value))
    except (ValueError, OSError):
        pass
source = sys.stdin.read()
module = sys.modules["program"] = types.ModuleType("program")  # where dataclasses look names up
exec(compile(source, "program", "exec"), module.__dict__)
os.write(told, token.encode())
"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end within the limits; an assertion that fails, or any other exit, is a no.

    Args:
        program: Python source, its tests included.
        seconds: Limit of wall-clock time.
    """
    token = f"{_RIGHT}-{os.urandom(8).hex()}"  # a program cannot say it passed by ending early
    command = [sys.executable, "-I", "-S", "-c", _GUARD]
    limits = [str(value) for value in (seconds, MEMORY, FILE_BYTES, PROCESSES)]
    ends = os.pipe()
    with (
        open(ends[0], "rb", buffering=0) as heard,
        open(ends[1], "wb", buffering=0) as told,
        tempfile.TemporaryDirectory(prefix="corda-run-") as folder,
    ):
        child = subprocess.Popen(
            [*command, *limits, str(ends[1]), token],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # a program may print without end
            stderr=subprocess.DEVNULL,
            pass_fds=(ends[1],),
            cwd=folder,
            env={"PATH": "", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        told.close()
        try:
            child.communicate(program.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
        os.set_blocking(ends[0], False)  # something that left the session may still hold the other end
        return child.returncode == 0 and heard.read(len(token) + 1) == token.encode()


def pass_at_1(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: Progress = silent,
) -> tuple[Score, list[Answer]]:
    """Share of records whose greedy completion of the prompt passes the record's tests (HumanEval).

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        records: Of the format code.
        max_new_tokens: Limit in tokens.
        batch_size: Rows; does not change the result.
        progress: Shows how far it is.
    """
    prompts = [record.prompt for record in records]
    texts = generate(model, tokenizer, prompts, STOP, max_new_tokens, batch_size, progress, strip=False)
    answers = []
    for record, text in progress(list(zip(records, texts, strict=True)), "run", len(records)):
        right = passes(record.prompt + text + record.program)
        answers.append(Answer(record.prompt, record.answers, text, right))
    return mean([float(answer.right) for answer in answers]), answers


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.wait()
