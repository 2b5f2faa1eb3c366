"""The class names of the data sets that published classifiers are for, in the order of their labels."""

import json
from importlib.util import find_spec
from pathlib import Path

from unperturb.models.errors import DataError

CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CIFAR10, CIFAR100 = tuple(CIFAR10_NAMES.split()), tuple(CIFAR100_NAMES.split())
IMAGENET_CLASSES = 1000


def class_names(dataset: str) -> tuple[str, ...]:
    """Return the names of `cifar10`, `cifar100` or `imagenet` (WordNet ids: they come with robustbench).

    Raises DataError for ImageNet where robustbench is not installed.
    """
    return {"cifar10": CIFAR10, "cifar100": CIFAR100}.get(dataset) or wordnet_ids()


def wordnet_ids() -> tuple[str, ...]:
    """Return ImageNet's 1,000 WordNet ids in the order of its classes."""
    package = find_spec("robustbench")  # found, not imported
    if package is None or package.origin is None:
        raise DataError("ImageNet's class order comes with robustbench, which is not installed")
    file = Path(package.origin).parent / "helper_files" / "imagenet_class_to_id_map.json"
    places: dict[str, int] = json.loads(file.read_text())
    assert len(places) == IMAGENET_CLASSES
    return tuple(sorted(places, key=lambda name: places[name]))
