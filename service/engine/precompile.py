"""Compile a model's steps in a process of its own: `python -m unperturb.service.engine.precompile CHECKPOINT CONFIG`.

What torch's compiler makes stays in its cache on disk, from which a worker that serves meanwhile takes it in seconds.
The process has the lowest priority, and ends with its parent.
"""

import json
import os
import sys

import torch

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
    """Make every step of a checkpoint once; raises what goes wrong."""
    torch.set_num_threads(config.threads)
    loaded = prepared(store.load(name, device=config.device), precision=config.precision)
    batch = ContinuousBatch(loaded, torch.device(config.device), execution=config.execution)
    parent = os.getppid()
    for _ in warmed(batch, config.slots):
        if os.getppid() != parent:
            return


if __name__ == "__main__":
    os.nice(19)
    _config = WorkerConfig(**json.loads(sys.argv[2]))
    logs.set_up(level=_config.log_level, style=_config.log_format)
    precompile(sys.argv[1], _config)
