"""Open the device that is measured on."""

import os

import torch

from unperturb.models.devices import opened_device
from unperturb.models.memory import keep_freed_memory


def open_device(name: str) -> torch.device:
    """Return the device, ready and set to give the same answer twice; under torchrun each process has its own GPU.

    On a CPU freed memory is kept for the rest of the process. Raises ConfigError for a device that is not there.
    """
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = opened_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    return device
