import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import make_checkpoint, write_image_folder
from unperturb.models.checkpoints.card import Card
from unperturb.models.errors import ConfigError, DataError
from unperturb.models.networks.classifier import Architecture
from unperturb.models.pixels import Preprocessing
from unperturb.training.augment import pad_crop_flip
from unperturb.training.data import at_once, load, load_for
from unperturb.training.held_out import hold_out, kept_back, training_images_for
from unperturb.training.purifier.restorer import RestorerConfig


def test_folder_loads_in_sorted_order_with_labels_of_sorted_classes(image_folder: Path, tmp_path: Path) -> None:
    found = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    assert found.classes == ("blue", "green", "red")
    assert found.train.images.shape == (72, 3, 32, 32)
    assert found.train.labels[:6].tolist() == [0, 1, 2, 0, 1, 2]  # by file name, then by class
    first = np.asarray(Image.open(image_folder / "train" / "green" / "00000.png")).transpose(2, 0, 1)
    assert np.array_equal(found.train.images[1].numpy(), first)


def test_second_load_maps_the_decoded_array_and_gives_the_same_digest(image_folder: Path, tmp_path: Path) -> None:
    first = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    arrays = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    second = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    assert second.digest == first.digest
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == arrays


def test_changed_file_changes_the_digest(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", train=2, test=1)
    first = load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")
    changed = root / "train" / "red" / "00001.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(changed)
    os.utime(changed, ns=(1, 1))
    assert load(str(root), Preprocessing(size=32), cache=tmp_path / "cache").digest != first.digest


def test_images_of_any_size_are_fitted(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", train=2, test=1, size=50)
    assert load(str(root), Preprocessing(size=24), cache=tmp_path / "cache").train.images.shape == (6, 3, 24, 24)


def test_broken_image_is_refused_by_name_before_training(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", train=2, test=1)
    broken = root / "train" / "red" / "00001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"train/red/00001\.png cannot be decoded"):
        load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-made is left behind


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no posix_fallocate")
def test_full_disk_is_one_error_that_names_the_file_before_an_image_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = write_image_folder(tmp_path / "images", train=2, test=1), tmp_path / "cache"

    def full(file: int, start: int, size: int) -> None:
        assert (start, size) == (0, os.fstat(file).st_size)
        assert size > 6 * 3 * 32 * 32
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("unperturb.training.data._decode", None)
    with pytest.raises(OSError, match="No space left on device") as refused:
        load(str(root), Preprocessing(size=32), cache=cache)
    assert Path(refused.value.filename).parent == cache
    assert Path(refused.value.filename).suffix == ".npy"
    assert not list(cache.iterdir())


def test_class_without_images_is_refused_by_name(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", train=2, test=1)
    for split in ("train", "test"):
        (root / split / "yellow").mkdir()
    with pytest.raises(DataError, match="train/yellow holds no image"):
        load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")


def test_missing_folder_and_differing_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere/train is not a folder"):
        load("nowhere", Preprocessing(size=32))
    root = write_image_folder(tmp_path / "images", train=2, test=1)
    (root / "test" / "yellow").mkdir()
    with pytest.raises(DataError, match="same class folders"):
        load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")


def test_what_is_taken_and_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_image_folder(tmp_path / "images", train=3, test=1)
    plain = load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")
    (root / "train" / "red" / "part_2").mkdir()
    (root / "train" / "red" / "00002.png").rename(root / "train" / "red" / "part_2" / "00002.png")
    for split in ("train", "test"):
        for hidden in (".ipynb_checkpoints", "__MACOSX"):
            (root / split / hidden).mkdir()
    (root / "train" / "red" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "red" / "notes.txt").write_text("x")
    (root / "train" / "red" / "loop").symlink_to(root / "train" / "red")
    (root / "train" / "blue" / ".DS_Store").write_text("x")
    (root / "train" / "blue" / "photo.heic").write_text("x")
    capsys.readouterr()
    found = load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")
    said = [line for line in capsys.readouterr().err.splitlines() if "images of" in line]
    assert found.classes == plain.classes
    assert sorted(found.train.labels.tolist()) == sorted(plain.train.labels.tolist())
    assert said[0].endswith(
        "train: 9 images of 3 classes; left out: 1 files of no image type (.heic), 1 files of no image type (.txt), "
        "1 hidden (.ipynb_checkpoints), 1 hidden files, 1 links to a folder that they lie in"
    )
    assert said[1].endswith("test: 3 images of 3 classes")


@pytest.mark.parametrize("kind", ["dangling link", "unreadable", "name of no text"])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    root = write_image_folder(tmp_path / "images", train=2, test=1)
    folder = root / "train" / "red"
    if kind == "dangling link":
        (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
        expected = r"red/gone\.png cannot be read"
    elif kind == "unreadable":
        (folder / "folder.png").mkdir()
        (folder / "folder.png" / "torn.jpg").write_bytes(b"\xff\xd8")
        expected = r"folder\.png/torn\.jpg cannot be decoded"
    else:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(b"x")
        expected = r"red/caf\\xe9\.png cannot be decoded"
    with pytest.raises(DataError, match=expected) as refused:
        load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")
    str(refused.value).encode()  # it can be printed


def test_class_folders_that_differ_are_named_with_their_near_misses(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", train=1, test=1)
    (root / "test" / "red").rename(root / "test" / "Red")
    (root / "train" / "blue").rename(root / "train" / "caf\u00e9")
    (root / "test" / "blue").rename(root / "test" / "cafe\u0301")
    with pytest.raises(DataError) as refused:
        load(str(root), Preprocessing(size=32), cache=tmp_path / "cache")
    said = str(refused.value)
    assert "train alone has 'café', 'red'" in said
    assert "test alone has 'Red', 'cafe\u0301'" in said
    assert "spelled differently: 'café' and 'cafe\u0301', 'red' and 'Red'" in said


def test_cifar10_without_a_network_says_what_to_place_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setenv("UNPERTURB_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=str(tmp_path)):
        load("cifar10", Preprocessing(size=32))


def test_held_out_images_are_not_trained_on(image_folder: Path, tmp_path: Path) -> None:
    split = load(str(image_folder), Preprocessing(size=32), cache=tmp_path).train
    kept, held = hold_out(split, 10, seed=3)
    assert (len(kept.labels), len(held.labels)) == (62, 10)
    seen = {image.numpy().tobytes() for image in kept.images}
    assert not any(image.numpy().tobytes() in seen for image in held.images)
    with pytest.raises(DataError, match="hold out 72 of 72"):
        hold_out(split, 72, seed=0)


@pytest.mark.parametrize(("side", "count"), [(32, 250), (64, 250), (224, 20), (2048, 1)])
def test_few_large_images_are_attacked_at_once(side: int, count: int) -> None:
    assert at_once(torch.zeros(2, 3, side, side, dtype=torch.uint8)) == count


def test_new_part_says_which_held_out_images_the_classifier_was_trained_on(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    card = make_checkpoint().card
    known = {"sha256": dataset.digest, "held_out_of_train": 10}
    own = dataclasses.replace(card, data=known, training={**card.training, "seed": 0})
    capsys.readouterr()
    unknown = dataclasses.replace(card, data={})
    elsewhere = dataclasses.replace(own, data={**known, "sha256": "of the same pictures at 40 pixels"})
    other = "not known: it was on other images, or on the same ones at another size or fit"
    for given, seed, says in (
        (own, 0, ""),
        (own, 1, "was trained on"),
        (unknown, 0, "not known\n"),
        (elsewhere, 0, other),
    ):
        config = RestorerConfig(checkpoint="x", data="x", out=tmp_path, held_out=10, seed=seed)
        kept, held = training_images_for(given, dataset, config)
        assert (len(kept.labels), len(held.labels)) == (62, 10)
        said = capsys.readouterr().err
        assert says in said
        assert bool(said) == bool(says)


@pytest.mark.parametrize(
    ("training", "says"),
    [
        ({"held_out": 10, "seed": 0}, ""),
        ({"held_out": 10, "seed": 1}, "new to it are those held back by held_out=10, seed=1"),
        ({"held_out": 10, "seed": 0, "data_sha256": "another"}, "not known: it was on other images"),
        ({"held_out": 10, "seed": 0, "start_sha256": "of another"}, "not known\n"),
        ({}, "not known\n"),
    ],
    ids=["same images", "other images", "other data", "a start of its own", "nothing"],
)
def test_purifier_that_a_run_begins_with_has_seen_images_too(
    training: dict[str, Any],
    says: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    start = dataclasses.replace(make_checkpoint().card, id="theirs", purifier_training=training)
    config = RestorerConfig(checkpoint="x", data="x", out=tmp_path, held_out=10)
    capsys.readouterr()
    training_images_for(None, dataset, config, start=start)
    said = capsys.readouterr().err
    assert says in said
    assert ("the purifier of 'theirs'" in said) == bool(says)


def test_images_that_an_earlier_training_saw_count_as_seen(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    known = {"sha256": dataset.digest, "held_out_of_train": 30}
    first = {"seed": 1}
    card = dataclasses.replace(
        make_checkpoint().card,
        data=known,
        training={"seed": 0, "classifier_training": first, "classifier_data": known},
        head_training={},
    )
    new = kept_back(dataset, card)
    both = [hold_out(dataset.train, 30, seed=seed)[1] for seed in (0, 1)]
    seen = [{image.numpy().tobytes() for image in split.images} for split in both]
    assert {image.numpy().tobytes() for image in new.images} == seen[0] & seen[1]
    assert 0 < len(new.labels) < 30
    capsys.readouterr()
    training_images_for(card, dataset, RestorerConfig(checkpoint="x", data="x", out=tmp_path, held_out=30, seed=0))
    assert "new to it are those held back by held_out=30, seed=0 and by held_out=30, seed=1" in capsys.readouterr().err
    training_images_for(None, dataset, RestorerConfig(checkpoint="x", data="x", out=tmp_path, held_out=30, seed=0))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "before", ["itself", "encoder", "encoder without data", "all of it"], ids=lambda before: before.replace(" ", "-")
)
def test_card_that_does_not_say_what_was_held_out_is_taken_at_no_word(
    before: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load(str(image_folder), Preprocessing(size=32), cache=tmp_path)
    silent = {"sha256": dataset.digest}
    said = {**silent, "held_out_of_train": 10}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "itself": (silent, {"seed": 0}),
        "encoder": (said, {"seed": 0, "encoder_training": {"seed": 0}, "encoder_data": silent}),
        "encoder without data": (said, {"seed": 0, "encoder_training": {"seed": 0}}),
        "all of it": ({**silent, "held_out_of_train": 0}, {"seed": 0}),
    }
    known, training = cases[before]
    head = {"held_out": 10, "seed": 0}  # which says nothing of what the classifier saw
    card = dataclasses.replace(make_checkpoint().card, data=known, training=training, head_training=head)
    capsys.readouterr()
    training_images_for(card, dataset, RestorerConfig(checkpoint="x", data="x", out=tmp_path, held_out=10))
    all_of_it = before == "all of it"
    says = "trained on 10 of these images; none of the training images is new" if all_of_it else "is not known"
    assert says in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no training image was held out" if all_of_it else "does not say"):
        kept_back(dataset, card)


def test_renamed_class_folder_keeps_its_own_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name, colour in (("a", (255, 0, 0)), ("b", (0, 255, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), colour).save(tmp_path / split / name / "0.bmp")
            os.utime(tmp_path / split / name / "0.bmp", (0, 0))  # as an archive may have it
    load(str(tmp_path), Preprocessing(size=8), cache=tmp_path / "cache")
    for split in ("train", "test"):
        (tmp_path / split / "a").rename(tmp_path / split / "c")
    again = load(str(tmp_path), Preprocessing(size=8), cache=tmp_path / "cache")
    assert again.classes == ("b", "c")
    red = [int(image[0].max()) == 255 for image in again.train.images]
    assert [again.classes[label] for label, is_red in zip(again.train.labels, red, strict=True) if is_red] == ["c"]


def test_pad_crop_flip_shifts_each_image_on_its_own() -> None:
    images = torch.arange(200 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(200, 3, 8, 8)
    out = pad_crop_flip(images, pad=2, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2)).float() / 255
    found = set()
    for i in range(200):
        for flip in (False, True):
            for top in range(5):
                for left in range(5):
                    crop = padded[i, :, top : top + 8, left : left + 8]
                    if torch.equal(out[i], crop.flip(2) if flip else crop):
                        found.add((flip, top, left))
    assert len(found) > 45  # of 50 shifts and flips, nearly every one is drawn by some of 200 images


def test_class_folders_are_matched_to_a_classifiers_classes_by_name(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", train=2, test=1)
    shutil.rmtree(root / "train" / "blue")  # a folder may lack classes, and the splits may differ
    shutil.rmtree(root / "test" / "red")
    classes = ("red", "violet", "green", "blue")
    architecture = Architecture(name="preact_resnet18", num_classes=4)
    card = Card(id="x", architecture=architecture, classes=classes, data={}, training={})
    found = load_for(card, str(root), cache=tmp_path / "cache")
    assert found.classes == classes
    assert found.train.labels.tolist() == [2, 0, 2, 0]
    assert found.test.labels.tolist() == [3, 2]
    (root / "test" / "gren").mkdir()
    with pytest.raises(
        DataError, match=r"test has a class 'gren' \(1 such\), which is none of the classifier's 4: 'green'"
    ):
        load_for(card, str(root), cache=tmp_path / "cache")
