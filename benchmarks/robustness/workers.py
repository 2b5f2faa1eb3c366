"""Share a run's work between processes: a small network is faster in many of one thread than in one of many threads."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from unperturb.models.errors import UnperturbError

Config = TypeVar("Config")


def share(work: Callable[[Config, int], None], config: Config, workers: int) -> None:
    """Call work(config, number) in that many new processes, each with its share of torch's threads; wait for them.

    Raises UnperturbError as soon as one of them has failed, and ends the others.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(work, config, number, workers)) for number in range(workers)]
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                ended = running.pop(sentinel)  # type: ignore[arg-type]
                ended.join()
                if ended.exitcode:
                    raise UnperturbError(
                        f"a worker ended with status {ended.exitcode}, see above; the same command goes on where it was"
                    )
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(work: Callable[[Config, int], None], config: Config, number: int, workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    work(config, number)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
