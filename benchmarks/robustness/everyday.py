"""What people put in front of their models, as purifiers of the harness: JPEG and a median, fewer bits, a median alone.

    --purifier unperturb.benchmarks.robustness.everyday:JpegMedian    and FewerBits:bits=4, Median

An attacker gets what he would write for them: JPEG's differentiable form (Shin and Song 2017, in kornia), and the
identity as the rounding's gradient (BPDA). `pip install kornia` brings what they need.
"""

from io import BytesIO

import kornia
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class Median:
    """A median over squares of 3 pixels: its gradient is its own."""

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return the images [n, 3, h, w] smoothed."""
        return _median(x)


class JpegMedian:
    """JPEG, then the median."""

    def __init__(self, quality: int = 75) -> None:
        self.quality = quality

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return the images [n, 3, h, w], compressed and smoothed."""
        pixels = (x.detach() * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
        decoded = torch.from_numpy(np.stack([self._through_file(image) for image in pixels])).permute(0, 3, 1, 2)
        return _median(decoded.to(x.device, x.dtype) / 255)

    def _through_file(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        file = BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file))

    def unrolled(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return nearly the same, with a gradient."""
        quality = torch.tensor([float(self.quality)], device=x.device)
        return _median(kornia.enhance.jpeg_codec_differentiable(x, quality))


class FewerBits:
    """Feature squeezing (Xu et al. 2018): channels of a few bits."""

    def __init__(self, bits: int = 4) -> None:
        self.levels: int = 2**bits - 1

    def purify(self, x: Tensor, seeds: Tensor) -> Tensor:
        """Return the images [n, 3, h, w] with fewer levels; the backward is the identity."""
        return x + ((x * self.levels).round() / self.levels - x).detach()


def _median(x: Tensor) -> Tensor:
    return kornia.filters.median_blur(x, (3, 3))
