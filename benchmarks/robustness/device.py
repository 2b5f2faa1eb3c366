"""Open the device that is measured on."""

import os

import torch

from unperturb.models.errors import ConfigError
from unperturb.models.memory import keep_freed_memory


def open_device(name: str) -> torch.device:
    """Return the device, ready and set to give the same answer twice; under torchrun each process has its own GPU.

    On a CPU freed memory is kept for the rest of the process. Raises ConfigError for a device that is not there.
    """
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} is not on this machine ({reason}); --device cpu always is") from error
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device
