"""One OpenMP pool for the worker alone.

OpenMP keeps a pool for every thread that has computed in parallel, and two pools on the same cores make each step of
either wait for the other's threads. So what is not a worker computes with one thread.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def aside(work: Callable[[], T]) -> T:
    """The result of `work`, done with one torch thread in a thread of its own; raises what it raises."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        torch.set_num_threads(1)
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="aside", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
