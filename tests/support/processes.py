"""Several processes of one function, forked: they need no import of their own, so that a test takes seconds."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_processes(function: Callable[..., Any], count: int, folder: Path, *args: Any, **environment: str) -> list[Any]:
    """Run ``function(*args)`` in ``count`` processes, as a launcher starts them; return what each returned.

    Args:
        function: called in every process.
        count: number of processes; 1 runs without a process group.
        folder: for the results.
        *args: of the function.
        **environment: further variables of the processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), **environment}
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(count):
        own = (
            {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
        )
        target = (function, args, {**environment, **own}, folder / f"{rank}.pt")
        processes.append(context.Process(target=_run, args=target))
        processes[-1].start()
    for process in processes:
        process.join(timeout=240)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    results = [
        torch.load(folder / f"{rank}.pt", weights_only=False)
        for rank in range(count)
        if (folder / f"{rank}.pt").exists()
    ]
    failed = [result for kind, result in results if kind == "error"]
    assert not failed, failed[0]
    assert not late, "a process did not end"
    assert len(results) == count, [process.exitcode for process in processes]
    return [result for _, result in results]


def _run(function: Callable[..., Any], args: tuple[Any, ...], environment: dict[str, str], file: Path) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        result = ("result", function(*args))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, file)
    if torch.distributed.is_initialized() and result[0] == "result":
        torch.distributed.barrier()
    os._exit(0)  # without the exit handlers of the forked process
