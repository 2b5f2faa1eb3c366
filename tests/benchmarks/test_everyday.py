from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("kornia")

from tests.conftest import make_checkpoint
from unperturb.benchmarks import evaluate
from unperturb.benchmarks.robustness.everyday import FewerBits, JpegMedian, Median

SEEDS = torch.zeros(8, dtype=torch.int64)


def test_median_and_bits_are_numpys(images: Tensor) -> None:
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    around = [padded[..., i : i + 32, j : j + 32] for i in range(3) for j in range(3)]
    assert np.allclose(Median().purify(images, SEEDS), np.median(around, axis=0), atol=1e-6)
    assert np.allclose(FewerBits(4).purify(images, SEEDS), np.round(images.numpy() * 15) / 15, atol=1e-6)


def test_jpeg_is_pillows_and_its_differentiable_form_near_it(images: Tensor) -> None:
    found = JpegMedian().purify(images, SEEDS)
    file = BytesIO()
    pixels = (images[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    expected = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None].float() / 255
    assert (found[:1] - Median().purify(expected, SEEDS)).abs().mean() < 1 / 255
    assert (found - JpegMedian().unrolled(images, SEEDS)).abs().mean() < 6 / 255


@pytest.mark.parametrize("purifier", [JpegMedian(), FewerBits(), Median()], ids=lambda one: type(one).__name__)
def test_full_gradient_and_bpda_attack_each(images: Tensor, purifier: object) -> None:
    checkpoint = make_checkpoint(head=False)
    labels = checkpoint.classifier(images).argmax(1)
    report = evaluate(
        checkpoint, images, labels, purifier=purifier, attacks="apgd-ce,bpda-apgd-ce,transfer", budget="fast"
    )
    assert {"apgd-ce", "bpda-apgd-ce", "transfer"} <= set(report.records[-1]["results"]["outcomes"])
    assert not report.records[-1]["results"]["notes"]
