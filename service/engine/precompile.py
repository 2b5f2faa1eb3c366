"""Compile a model's steps in a process of its own: `python -m unperturb.service.engine.precompile CHECKPOINT CONFIG`.

What torch's compiler makes stays in its cache on disk, from which a worker that serves meanwhile takes it in seconds.
The process has the lowest priority, and ends with its parent.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from unperturb.models.cache import cache_folder
from unperturb.models.checkpoints import store
from unperturb.models.inference.folding import prepared
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.messages import WorkerConfig
from unperturb.service.engine.warm_up import warmed
from unperturb.service.telemetry import logs


def command(name: str, config: WorkerConfig) -> list[str]:
    """Return the command that compiles a checkpoint's steps as a worker would."""
    return [sys.executable, "-m", __name__, name, json.dumps(config._replace(execution="compiled")._asdict())]


def precompile(name: str, config: WorkerConfig) -> None:
    """Make every step of a checkpoint once; raises what goes wrong.

    Of several processes one makes them: the others wait, and find them in the cache.
    """
    torch.set_num_threads(config.threads)
    loaded = prepared(store.load(name, device=config.device), precision=config.precision)
    batch = ContinuousBatch(loaded, torch.device(config.device), execution=config.execution)
    parent = os.getppid()
    with _alone():
        for _ in warmed(batch, config.slots, threads=(config.threads,)):
            if os.getppid() != parent:
                return


def cache() -> Path:
    """Return where torch's compiler keeps what it makes.

    Not its own choice, a folder in /tmp that anybody may have made before.
    """
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled"))))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold what only one process that fills this cache can hold."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "precompile.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    os.nice(19)
    _config = WorkerConfig(**json.loads(sys.argv[2]))
    logs.set_up(level=_config.log_level, style=_config.log_format)
    precompile(sys.argv[1], _config)
