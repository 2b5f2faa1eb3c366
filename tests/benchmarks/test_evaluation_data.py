from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import CLASSES
from unperturb.benchmarks.robustness.data import load_images
from unperturb.models.errors import DataError
from unperturb.models.networks import robustbench as robustbench_adapter


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
        load_images("cifar10", tmp_path / "data.npz", n=3, image_size=32, classes=CLASSES)


def test_npz_is_read_in_its_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.array([2, 1, 0, 1, 2]))
    found = load_images("cifar10", tmp_path / "data.npz", n=4, image_size=32, classes=CLASSES)
    assert found.labels.tolist() == [2, 1, 0, 1]
    assert np.array_equal((found.images * 255).round().byte().permute(0, 2, 3, 1).numpy(), images[:4])


def test_folder_with_a_class_that_the_classifier_lacks_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="red"):
        load_images("cifar10", image_folder, n=2, image_size=32, classes=("blue", "green"), cache=tmp_path)


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
        load_images("cifar10", None, n=2, image_size=32, classes=CLASSES)
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
    found = load_images("cifar10", None, n=4, image_size=32, classes=CLASSES)
    assert asked == ["cifar10", 4, robustbench.data.PREPROCESSINGS[None]]
    assert (found.source, len(found.labels)) == ("robustbench", 4)
