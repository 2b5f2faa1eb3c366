"""The common corruptions (Hendrycks & Dietterich, ICLR 2019), 15 kinds at 5 severities, and Gaussian noise in no ball.

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

from unperturb.benchmarks.robustness.code import PROJECT, code_digest, versions_behind
from unperturb.benchmarks.robustness.evaluation import SERVED_SEED, Evaluation
from unperturb.benchmarks.robustness.figures import CLEAN, Outcomes, summarise_corruptions
from unperturb.benchmarks.robustness.identity import describe
from unperturb.benchmarks.robustness.units import Unit
from unperturb.models import philox
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
SIGMAS = (4, 8, 16, 32, 64)  # of Gaussian noise in no ball, 255ths
NOISE_STREAM = 0x6A055


class CorruptionRun(Evaluation):
    """A defended classifier on corrupted images; no attack."""

    dataset: str = ""

    @property
    def kinds(self) -> list[str]:
        """Return the names of what is measured, clean images first."""
        return [CLEAN, *(f"{kind}-{severity}" for kind in KINDS for severity in SEVERITIES)]

    @property
    def source(self) -> str:
        """Return whether the corruptions are made here, from local images, or RobustBench's."""
        return "robustbench" if self.data.source == "robustbench" else "generated"

    def run(self) -> dict[str, Any]:
        """Measure accuracy per corruption and severity on the shard's images, their mean, and the gain over `bare`."""
        started = time.perf_counter()
        outcomes, bare = self.measured(), None if self.bare is None else self.bare.measured()  # type: ignore[attr-defined]
        chunks = self.plan.chunks(len(self.data.labels))
        return {
            "purifies": self.purifies,
            "purifier": describe(self.defended),
            **self.identity.of_record(),
            "indices": torch.cat(chunks).tolist(),
            "outcomes": outcomes,
            "bare_outcomes": bare,
            "figures": summarise_corruptions(outcomes, bare=bare),
            "corruptions": self.source,
            "timings": {"seconds": {"all": time.perf_counter() - started}},
        }

    def measured(self) -> Outcomes:
        """Return per kind which images are classified right."""
        chunks = self.plan.chunks(len(self.data.labels))
        own = {
            "code": code_digest([type(self).__module__, philox.__name__], without=(PROJECT,)),
            "corruption_versions": versions_behind([type(self).__module__], without=(PROJECT,)),
        }
        outcomes: Outcomes = {kind: [] for kind in self.kinds}
        for kind in tqdm(self.kinds, desc=self.title, unit="corruption"):
            images: list[Tensor] = []  # read or made only for chunks that are not done
            for indices in chunks:
                unit = self._get(
                    f"{self.source}-{kind}",
                    int(indices[0]) // self.plan.chunk,
                    self.scene(indices),
                    partial(self._right, kind, images, indices),
                    {"corruption": kind, **own},
                )
                outcomes[kind] += unit.right.int().tolist()
        return outcomes

    def headline(self, found: dict[str, Any]) -> str:
        """Return one line of the result."""
        figures = found["figures"]
        gain = "" if figures["gain"] is None else f", gain {figures['gain']['mean'] * 100:+.1f} points"
        return f"clean {figures['clean']['accuracy']:.1%}, mean over kinds {figures['corruptions_mean']:.1%}{gain}"

    def _right(self, kind: str, images: list[Tensor], indices: Tensor) -> Unit:
        if not images:
            images.append(self.data.images if kind == CLEAN else self.corrupted(kind))
        x, labels = images[0][indices].to(self.device), self.data.labels[indices].to(self.device)
        with torch.no_grad():
            logits = self.defended(x, seed=SERVED_SEED)
        right = logits.argmax(1).eq(labels)
        return Unit(torch.zeros(0), torch.ones_like(right), right, torch.zeros(0), 0, 0, 0.0)

    def corrupted(self, kind: str) -> Tensor:
        """Return all images under a kind of corruption at a severity."""
        name, _, severity = kind.rpartition("-")
        if self.source == "generated":
            pixels = (self.data.images * 255).round().to(torch.uint8)
            return generate(pixels, name, int(severity)).float() / 255
        return robustbench_corruption(
            self.dataset, name, int(severity), n=len(self.data.labels), folder=cache_folder("robustbench-data")
        )


class NoiseRun(CorruptionRun):
    """A defended classifier on images under Gaussian noise that no ball bounds."""

    source = "generated"

    @property
    def kinds(self) -> list[str]:
        """Return the names of what is measured, clean images first."""
        return [CLEAN, *(f"gaussian-{sigma}" for sigma in SIGMAS)]

    def corrupted(self, kind: str) -> Tensor:
        """Return all images under noise of a standard deviation in 255ths, rounded to 8 bits."""
        sigma = int(kind.rpartition("-")[2]) / 255
        seeds = (self.plan.seed << 24) + torch.arange(len(self.data.labels))
        noise = philox.gaussian(seeds, 0, NOISE_STREAM, self.data.images[0].numel()).view_as(self.data.images)
        return ((self.data.images + sigma * noise).clamp(0, 1) * 255).round() / 255


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
