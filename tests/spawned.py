"""Several processes of torch.distributed for tests, all forked from one server that has imported everything once."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# Forking the test process itself would not do: its BLAS has run, and hangs in a child.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["conftest", "corda.pipeline", "trl", "datasets"])


def in_processes(work: Callable[..., Any], *arguments: Any, size: int = 2, seconds: int = 300) -> list[Any]:
    """work(*arguments) in `size` processes started as torchrun would; what each returned, as JSON.

    Args:
        work: A function at the top of a module.
        arguments: The same for all.
        size: How many processes.
        seconds: After which they are killed.

    Raises:
        AssertionError: one of them failed; with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(size)]
    children = [
        _SERVER.Process(target=_child, args=(work, arguments, rank, size, port, pipes[rank][1]), daemon=True)
        for rank in range(size)
    ]
    for child in children:
        child.start()
    results: list[Any] = []
    try:
        for rank, (reading, writing) in enumerate(pipes):
            writing.close()
            said = reading.recv_bytes().decode() if reading.poll(seconds) else ""
            results.append(json.loads(said) if said else {"failed": f"process {rank} took more than {seconds} s"})
            if "failed" in results[-1]:
                break
    finally:
        for child in children:
            child.join(5 if len(results) == size else 0)
            child.kill()
    failed = [one["failed"] for one in results if "failed" in one]
    assert not failed, "\n".join(failed)
    return [one["value"] for one in results]


def _child(
    work: Callable[..., Any], arguments: tuple[Any, ...], rank: int, size: int, port: int, writing: Connection
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        said = json.dumps({"value": work(*arguments)})
    except BaseException:
        said = json.dumps({"failed": f"process {rank}: {traceback.format_exc()}"})
    sys.stdout.flush()
    writing.send_bytes(said.encode())
    writing.close()
