"""Pad, crop and flip on the device: the classifier's training augmentation (He et al. 2016, section 4.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from unperturb.models.shapes import Float, UInt8


def pad_crop_flip(
    images: UInt8[Tensor, "batch 3 h w"], *, pad: int, generator: torch.Generator
) -> Float[Tensor, "batch 3 h w"]:
    """Shift and flip uint8 images, each by its own offset in the zero-padded frame; return floats in [0, 1].

    `generator` lives on the CPU, so that a run draws the same on every device.
    """
    batch, _, height, width = images.shape
    draws = torch.rand(3, batch, generator=generator).to(images.device)
    top = (draws[0] * (2 * pad + 1)).long()[:, None] + torch.arange(height, device=images.device)  # batch h
    left = (draws[1] * (2 * pad + 1)).long()[:, None] + torch.arange(width, device=images.device)  # batch w
    left = torch.where(draws[2][:, None] < 0.5, left, left.flip(1))
    padded = F.pad(images, (pad, pad, pad, pad))
    each = torch.arange(batch, device=images.device)[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[each, top[:, :, None], left[:, None, :]]  # batch h w 3
    return cropped.permute(0, 3, 1, 2).float() / 255
