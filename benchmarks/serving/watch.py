"""A running service, seen from outside: its metrics, and its processes and their memory."""

import subprocess
from typing import NamedTuple
from urllib.request import urlopen

import psutil


class RunningServer(NamedTuple):
    """A running service."""

    port: int
    url: str
    process: subprocess.Popen[bytes]


def text_metrics(server: RunningServer) -> list[str]:
    """Return the lines of /metrics."""
    with urlopen(f"{server.url}/metrics", timeout=30) as answer:
        return str(answer.read().decode()).splitlines()


def metric(server: RunningServer, name: str) -> float:
    """Return a gauge's value."""
    return next(float(line.split()[1]) for line in text_metrics(server) if line.startswith(f"{name} "))


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all of its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def memory(pid: int) -> float:
    """Return MB of pages that no other process shares, over the process and its descendants."""
    return float(sum(one.memory_full_info().uss for one in tree(pid)) / 2**20)
