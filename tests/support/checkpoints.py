"""Checkpoints with other readouts, and programs that somebody exported."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, export

from tests.conftest import make_checkpoint
from unperturb.models.checkpoints.importing.imported import ImportConfig, import_classifier
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.networks.readout import ReadoutCard, SoftNeighbours, attach, blank_readout

CARDS = {
    "knn": ReadoutCard(kind="knn", neighbours=4, bank_size=12),
    "dense": ReadoutCard(kind="dense", hidden=7),
    "none": ReadoutCard(kind="none"),
}
SIDE = 16  # of the images that exported programs take
BATCH = ({0: Dim("batch")},)


def with_readout(card: ReadoutCard) -> Checkpoint:
    made = make_checkpoint()
    readout = blank_readout(card, feature_dim=made.classifier.feature_dim, num_classes=3)
    assert readout is not None
    if isinstance(readout, SoftNeighbours):
        readout.bank.copy_(torch.nn.functional.normalize(torch.rand_like(readout.bank), dim=1))
        readout.labels.copy_(torch.arange(len(readout.labels)) % 3)
    attach(made.classifier, readout.requires_grad_(False))
    return Checkpoint(dataclasses.replace(made.card, readout=card), made.classifier, made.head, made.bank)


def convolutions(*, end: nn.Module | None = None, bias: bool = True) -> nn.Module:
    torch.manual_seed(3)
    parts = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Hardswish()]
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 5, bias=bias))
    network(2 * torch.rand(8, 3, SIDE, SIDE) - 1)  # running statistics that are their own
    if end is not None:
        network.append(end)
    return network.eval()


def saved(file: Path, network: nn.Module, *, shape: tuple[int, ...] = (2, 3, SIDE, SIDE), **options: Any) -> Path:
    program = export(network, (torch.rand(shape),), **{"dynamic_shapes": BATCH, **options})
    torch.export.save(program, file)
    return file


def imported(file: Path, **settings: Any) -> Checkpoint:
    return import_classifier(ImportConfig(source=f"export:{file}", **settings))
