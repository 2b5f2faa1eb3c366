"""Open a device: check that it is there, and have its float32 be float32."""

import torch

from unperturb.models.errors import ConfigError


def opened_device(name: str) -> torch.device:
    """Return the device of a name (cpu, cuda, cuda:N), on which convolutions in float32 are exact from then on.

    A GPU would round their inputs to TF32 otherwise, so that a loss near a gate or a label near a boundary depended on
    the algorithm that is chosen for the batch's size. It holds for the whole process. Raises ConfigError for a device
    that is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device={name!r} is not on this machine ({reason}); --device cpu always is") from error
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device
