from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import CLASSES
from unperturb.benchmarks.robustness.data import is_own, load_images
from unperturb.models.errors import DataError
from unperturb.models.networks import robustbench as robustbench_adapter
from unperturb.models.networks.benchmark_classes import class_names
from unperturb.models.pixels import Preprocessing


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": np.zeros((3, 32, 32, 3), np.uint8)}, "labels"),
        ({"images": np.zeros((3, 3, 32, 32), np.uint8), "labels": np.zeros(3)}, "uint8"),
        ({"images": np.zeros((3, 32, 32, 3), np.float32), "labels": np.zeros(3)}, "uint8"),
        ({"images": np.zeros((3, 32, 32, 3), np.uint8), "labels": np.array([0, 1, 3])}, "3 classes"),
    ],
    ids=["no labels", "channels first", "floats", "class beyond the last"],
)
def test_npz_of_another_form_is_refused(arrays: dict[str, Any], says: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=says):
        load_images("cifar10", tmp_path / "data.npz", n=3, how=Preprocessing(size=32), classes=CLASSES)


def test_npz_is_read_in_its_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array([2, 1, 0, 1, 2]))
    found = load_images("cifar10", tmp_path / "data.npz", n=4, how=Preprocessing(size=32), classes=CLASSES)
    assert found.labels.tolist() == [2, 1, 0, 1]
    assert is_own("cifar10", found.source)  # nothing says that these are its images
    assert [is_own(name, "folder") for name in ("cifar10", "mine")] == [False, True]
    assert np.array_equal((found.images * 255).round().byte().permute(0, 2, 3, 1).numpy(), images[:4])


def test_folder_with_a_class_that_the_classifier_lacks_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="red"):
        load_images("colours", image_folder, n=2, how=Preprocessing(size=32), classes=("blue", "green"), cache=tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_images_of_other_classes_are_not_taken_for_a_published_data_set(
    dataset: str, image_folder: Path, tmp_path: Path
) -> None:
    for classes, says in ((class_names(dataset), "no class of"), (CLASSES, "classes are blue, green, red")):
        with pytest.raises(DataError, match=f"{says}.*; --dataset NAME"):
            load_images(dataset, image_folder, n=2, how=Preprocessing(size=32), classes=classes, cache=tmp_path)


@pytest.mark.parametrize(
    ("dataset", "classes", "says"),
    [
        ("cifar10", (*class_names("cifar10")[1:], "airplane"), "classes are automobile, bird"),
        ("cifar10", tuple(map(str, range(10))), "classes are 0, 1, 2"),
        ("cifar100", class_names("cifar10"), "100 apple"),
        ("imagenet", CLASSES, "3 classes, imagenet 1000"),
    ],
    ids=["another order", "numbers", "another data set", "too few"],
)
def test_a_classifier_of_other_classes_is_not_judged_on_a_published_data_set(
    dataset: str, classes: tuple[str, ...], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load_images(dataset, None, n=2, how=Preprocessing(size=32), classes=classes)


def test_classes_whose_names_are_numbers_are_matched_by_name_and_refused_where_they_differ(tmp_path: Path) -> None:
    for name, grey in (("10", 10), ("2", 2)):  # "10" sorts first, and is the last of the classifier's
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(tmp_path / "data" / name / "a.png")
    numbers = tuple(str(number) for number in range(11))
    found = load_images("own", tmp_path / "data", n=2, how=Preprocessing(size=32), classes=numbers, cache=tmp_path)
    assert [round(float(image.mean()) * 255) for image in found.images] == found.labels.tolist()
    with pytest.raises(DataError, match="'10', which is no class of the classifier"):
        load_images("own", tmp_path / "data", n=2, how=Preprocessing(size=32), classes=("cat", "2"), cache=tmp_path)


def test_images_of_ones_own_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        load_images("own", None, n=2, how=Preprocessing(size=32), classes=CLASSES, cache=tmp_path)


def test_published_classifiers_have_their_data_sets_class_names() -> None:
    assert class_names("cifar10")[3] == "cat"
    assert (len(class_names("cifar100")), class_names("cifar100")[0]) == (100, "apple")
    assert list(class_names("cifar100")) == sorted(class_names("cifar100"))


@pytest.mark.parametrize(
    ("without", "side", "own"),
    [((), 32, False), (("ship",), 32, True), ((), 48, True)],
    ids=["whole", "lacking", "size"],
)
def test_folder_is_a_published_data_set_where_it_has_its_classes_and_its_size(
    without: tuple[str, ...], side: int, own: bool, tmp_path: Path
) -> None:
    for name in class_names("cifar10"):
        if name not in without:
            (tmp_path / "data" / name).mkdir(parents=True)
            Image.new("RGB", (side, 32)).save(tmp_path / "data" / name / "a.png")
    how, classes = Preprocessing(size=32), class_names("cifar10")
    found = load_images("cifar10", tmp_path / "data", n=2, how=how, classes=classes, cache=tmp_path)
    assert is_own("cifar10", found.source) == own


def offline(*_: object) -> None:
    raise OSError("no network")


def test_robustbench_data_that_cannot_be_fetched_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robustbench_adapter.import_robustbench()
    import robustbench.data
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

    loaders = {BenchmarkDataset.cifar_10: {ThreatModel.corruptions: offline}}
    monkeypatch.setattr(robustbench.data, "load_clean_dataset", offline)
    monkeypatch.setattr(robustbench.data, "CORRUPTION_DATASET_LOADERS", loaders)
    with pytest.raises(DataError, match="--data"):
        load_images("cifar10", None, n=2, how=Preprocessing(size=32), classes=class_names("cifar10"))
    with pytest.raises(DataError, match="--data"):
        robustbench_adapter.robustbench_corruption("cifar10", "fog", 1, n=2, folder=tmp_path)


def test_robustbench_loader_is_given_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    robustbench_adapter.import_robustbench()
    import robustbench.data

    asked: list[Any] = []

    def load(dataset: Any, n: int, folder: str, preparation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        asked.extend((dataset.value, n, preparation))
        return torch.rand(n, 3, 32, 32), torch.zeros(n, dtype=torch.long)

    monkeypatch.setattr(robustbench.data, "load_clean_dataset", load)
    found = load_images("cifar10", None, n=4, how=Preprocessing(size=32), classes=class_names("cifar10"))
    assert asked == ["cifar10", 4, robustbench.data.PREPROCESSINGS[None]]
    assert (found.source, len(found.labels)) == ("robustbench", 4)
