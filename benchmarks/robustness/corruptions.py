"""The common corruptions (Hendrycks & Dietterich, ICLR 2019): 15 kinds at 5 severities, and the accuracy on each.

RobustBench's arrays where the data are RobustBench's; from local images they are generated, with the parameters that
the corruptions' authors chose for ImageNet, and the record says `generated`: on small images that is not CIFAR-10-C.
"""

import hashlib
import json
import time
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unperturb.benchmarks.robustness.evaluation import SERVED_SEED, Evaluation
from unperturb.benchmarks.robustness.figures import CLEAN, summarise_corruptions
from unperturb.benchmarks.robustness.units import Unit
from unperturb.models.cache import cache_folder
from unperturb.models.errors import ConfigError
from unperturb.models.networks.robustbench import robustbench_corruption
from unperturb.models.shapes import UInt8

KINDS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)


class CorruptionRun(Evaluation):
    """A defended classifier on corrupted images; no attack."""

    @property
    def generated(self) -> bool:
        """Return whether the corruptions are made here, from local images."""
        return self.data.source != "robustbench"

    def run(self) -> dict[str, Any]:
        """Measure accuracy per corruption and severity on the shard's images, and their mean."""
        chunks = self.plan.chunks(len(self.data.labels))
        kinds = [CLEAN, *(f"{kind}-{severity}" for kind in KINDS for severity in SEVERITIES)]
        outcomes: dict[str, list[int]] = {kind: [] for kind in kinds}
        started = time.perf_counter()
        for kind in tqdm(kinds, desc=self.title, unit="corruption"):
            images: list[Tensor] = []  # read or made only for chunks that are not done
            for indices in chunks:
                number = int(indices[0]) // self.plan.chunk
                unit = self.units.get(kind, number, partial(self._right, kind, images, indices))
                outcomes[kind] += unit.right.int().tolist()
        return {
            "purifies": self.purifies,
            "indices": torch.cat(chunks).tolist(),
            "outcomes": outcomes,
            "figures": summarise_corruptions(outcomes),
            "corruptions": "generated" if self.generated else "robustbench",
            "timings": {"seconds": {"all": time.perf_counter() - started}},
        }

    def headline(self, found: dict[str, Any]) -> str:
        """Return one line of the result."""
        clean = found["figures"]["attacks"][CLEAN]["accuracy"]
        return f"clean {clean:.1%}, mean over corruptions {found['figures']['corruptions_mean']:.1%}"

    def _right(self, kind: str, images: list[Tensor], indices: Tensor) -> Unit:
        if not images:
            images.append(self._corrupted(kind))
        x, labels = images[0][indices].to(self.device), self.data.labels[indices].to(self.device)
        with torch.no_grad():
            logits = self.defended(x, seed=SERVED_SEED)
        right = logits.argmax(1).eq(labels)
        nothing = torch.zeros(0)
        return Unit(nothing, right, nothing, [], 0, 0, 0.0)

    def _corrupted(self, kind: str) -> Tensor:
        if kind == CLEAN:
            return self.data.images
        name, _, severity = kind.rpartition("-")
        if self.generated:
            pixels = (self.data.images * 255).round().to(torch.uint8)
            return generate(pixels, name, int(severity)).float() / 255
        return robustbench_corruption(
            self.plan.dataset, name, int(severity), n=len(self.data.labels), folder=cache_folder("robustbench-data")
        )


def generate(images: UInt8[Tensor, "n 3 h w"], kind: str, severity: int) -> UInt8[Tensor, "n 3 h w"]:
    """Return the corrupted images, by imagecorruptions; the same for the same images, kind and severity."""
    try:
        from imagecorruptions import corrupt
        from numba import njit
    except ImportError as error:
        raise ConfigError(
            f"generated corruptions need imagecorruptions-imaug ({error}); pip install 'unperturb[corruptions]', "
            "and libGL for OpenCV"
        ) from error

    seed_of = int.from_bytes(hashlib.sha256(json.dumps([kind, severity]).encode()).digest()[:4], "big")

    seed_compiled = cast(Any, njit)(_seed)  # compiled code has a generator of its own
    made = []
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        np.random.seed((seed_of + index) % 2**32)
        seed_compiled((seed_of + index) % 2**32)
        own = {"seed": (seed_of + index) % 2**32} if kind in ("impulse_noise", "glass_blur") else {}
        made.append(corrupt(np.ascontiguousarray(image), corruption_name=kind, severity=severity, **own))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def _seed(number: int) -> None:
    np.random.seed(number)
