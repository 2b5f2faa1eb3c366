"""A client of the service over a tiny model, and what it sends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from fastapi.testclient import TestClient
from PIL import Image

from tests.service.test_decode import encode
from tests.support.engines import ThreadHandle
from unperturb.service.engine.engine import Engine
from unperturb.service.http.app import create_app
from unperturb.service.keys import digest
from unperturb.service.settings import Settings

PLAIN = {"execution": "eager", "precision": "float32"}


def settings(folder: Path, **changed: object) -> Settings:
    values = {"checkpoint": str(folder), "device": "cpu", "threads": torch.get_num_threads(), **PLAIN, **changed}
    return Settings(**values)  # type: ignore[arg-type]


def wait_until_ready(client: TestClient) -> None:
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    assert engine.wait_until_ready(120.0)


@contextmanager
def serving(tiny_folder: Path) -> Iterator[TestClient]:
    """A client with a user's key and an administrator's."""
    admin = {"api_keys": {"ann": digest("user's")}, "admin_keys": {"root": digest("admin's")}}
    with TestClient(
        create_app(settings(tiny_folder, **admin), handle=ThreadHandle), raise_server_exceptions=False
    ) as opened:
        wait_until_ready(opened)
        yield opened


def photo(seed: int = 0, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
