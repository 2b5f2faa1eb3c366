"""Do with a batch what both peers do: the same model and purifier as the service, a preset at a time.

Both have a bound on what waits, and neither works on what has waited for longer than anybody wants its answer.
"""

import base64
import os
from collections.abc import Sequence
from typing import Any

import torch

from unperturb.models.checkpoints import store
from unperturb.models.purifiers.defended import DefendedClassifier, defend, presets_of
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.decoding.decode import decode

MAX_BATCH = int(os.environ.get("PEER_MAX_BATCH", "16"))
QUEUE = int(os.environ.get("PEER_QUEUE", "64"))  # requests that may wait; past it 503
WITHIN_S = float(os.environ.get("PEER_WITHIN_S", "5"))  # past it a request that has not begun gets 504
BATCH_WAIT_S = 0.01


class PeerModel:
    """The shipped checkpoint behind both presets."""

    def __init__(self) -> None:
        device = torch.device(os.environ.get("PEER_DEVICE", "cpu"))
        loaded = store.load(os.environ.get("PEER_CHECKPOINT", "default"), device=device)
        self.device, self.pictures = device, loaded.card.pictures
        self.defended: dict[str, DefendedClassifier] = {
            name: defend(loaded, PRESETS[name]) for name in presets_of(loaded.card)
        }

    def read(self, request: dict[str, Any]) -> tuple[torch.Tensor, str]:
        """Return the pixels and the preset of a request's JSON."""
        decoded = decode(base64.b64decode(request["inputs"]), self.pictures, max_pixels=50_000_000)
        return torch.from_numpy(decoded.pixels).float() / 255, request["parameters"]["preset"]

    def answer(self, batch: Sequence[tuple[torch.Tensor, str]]) -> list[dict[str, Any]]:
        """Return the scores of every image; the presets of a batch one after the other."""
        answers: list[dict[str, Any]] = [{}] * len(batch)
        for preset, defended in self.defended.items():
            places = [i for i, (_, wanted) in enumerate(batch) if wanted == preset]
            if not places:
                continue
            result = defended.classify(torch.stack([batch[i][0] for i in places]).to(self.device), seed=0)
            for i, scores in zip(places, result.logits.softmax(1).tolist(), strict=True):
                answers[i] = {"scores": scores}
        return answers
