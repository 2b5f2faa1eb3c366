import dataclasses
import json
import resource
import tracemalloc
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor, resize

from tests.conftest import make_checkpoint
from unperturb.benchmarks.robustness.data import load_images
from unperturb.models.checkpoints import store
from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.models.pixels import Preprocessing, opened, to_rgb, to_size
from unperturb.service.decoding.decode import decode
from unperturb.training.data import read_folder


def picture(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(width * height)
    coarse = draw.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (57, 90), (224, 224), (64, 40)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
def test_crop_is_torchvisions_resize_and_centre_crop(size: tuple[int, int], interpolation: str) -> None:
    image = picture(*size)
    expected = Compose([Resize(64, InterpolationMode(interpolation)), CenterCrop(56)])(image)
    found = to_size(image, Preprocessing(size=56, fit="crop", resize=64, interpolation=interpolation))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_stretch_ignores_the_sides_and_square_is_the_largest_centred_one() -> None:
    image = picture(90, 60)
    stretched = to_size(image, Preprocessing(size=32, fit="stretch", interpolation="bilinear"))
    assert np.array_equal(np.asarray(stretched), np.asarray(Resize((32, 32))(image)))
    square = to_size(image, Preprocessing(size=32))
    cut = image.crop((15, 0, 75, 60)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(square).astype(int) - np.asarray(cut)).max() <= 4


@pytest.mark.parametrize("fit", ["crop", "square"])
def test_without_antialiasing_pixels_are_those_of_torchs(fit: str) -> None:
    image = picture(96, 96)
    found = to_size(image, Preprocessing(size=40, fit=fit, interpolation="bilinear", antialias=False))
    plain = resize(pil_to_tensor(image), [40, 40], InterpolationMode.BILINEAR, antialias=False)
    smooth = resize(pil_to_tensor(image), [40, 40], InterpolationMode.BILINEAR, antialias=True)
    difference = (pil_to_tensor(found).int() - plain.int()).abs()
    assert difference.max() <= 1
    assert (smooth.int() - plain.int()).abs().max() > 3


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 0},
        {"fit": "letterbox"},
        {"fit": "crop", "resize": 16},
        {"resize": 40},
        {"interpolation": "area"},
        {"interpolation": "lanczos", "antialias": False},
    ],
    ids=str,
)
def test_preprocessing_out_of_range_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=str(list(bad.values())[-1])):
        Preprocessing(**{"size": 32, **bad})  # type: ignore[arg-type]


def test_tiffs_orientation_is_applied_once(tmp_path: Path) -> None:
    image, tags = picture(40, 20), Image.Exif()
    tags[0x0112] = 6
    image.save(tmp_path / "turned.tif", exif=tags)
    with opened((tmp_path / "turned.tif").read_bytes()) as (read, orientation):
        turned = image.transpose(Image.Transpose.ROTATE_270)
        assert np.array_equal(np.asarray(to_rgb(read, orientation)), np.asarray(turned))


def test_picture_of_one_column_takes_no_more_memory_than_its_square() -> None:
    how = Preprocessing(size=224, fit="crop", resize=256)
    tracemalloc.start()
    made = [to_size(picture(*size), how) for size in ((3000, 1), (1, 3000))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made += [to_size(Image.new("RGB", size), how) for size in ((20_000, 1), (1, 20_000))]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; the whole would be 4 GB
    assert {one.size for one in made} == {(224, 224)}
    assert peak < 50 << 20


def test_cards_preprocessing_is_that_of_training_service_and_harness(tmp_path: Path) -> None:
    how = Preprocessing(size=32, fit="crop", resize=40, interpolation="bilinear")
    made = make_checkpoint()
    store.save(tmp_path / "model", dataclasses.replace(made, card=dataclasses.replace(made.card, preprocessing=how)))
    card = store.load(tmp_path / "model").card
    assert card.pictures == how
    image, file = picture(90, 70), BytesIO()
    for name in ("red", "blue"):
        (tmp_path / "test" / name).mkdir(parents=True)
        image.save(tmp_path / "test" / name / "one.png")
    image.save(file, "PNG")
    expected = pil_to_tensor(Compose([Resize(40), CenterCrop(32)])(to_rgb(image)))
    trained = read_folder(tmp_path / "test", ("blue", "red"), card.pictures, cache=tmp_path / "cache")
    judged = load_images("own", tmp_path, n=1, how=card.pictures, classes=("blue", "red"), cache=tmp_path / "cache")
    assert torch.equal(trained.images[0], expected)
    assert torch.equal(torch.from_numpy(decode(file.getvalue(), card.pictures, max_pixels=10**6).pixels), expected)
    assert torch.equal((judged.images[0] * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize(
    ("raw", "says"),
    [({"size": 24}, "24 pixels"), ({"size": 32, "fit": "x"}, "fit="), ({"size": 32, "blur": 1}, "blur")],
    ids=str,
)
def test_card_with_bad_preprocessing_is_refused(tmp_path: Path, raw: dict[str, object], says: str) -> None:
    store.save(tmp_path, make_checkpoint())

    card = json.loads((tmp_path / store.CARD).read_text())
    (tmp_path / store.CARD).write_text(json.dumps({**card, "preprocessing": raw}))
    with pytest.raises(CheckpointError, match=says):
        store.load(tmp_path)
