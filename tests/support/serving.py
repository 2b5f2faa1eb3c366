"""A client of the service over a tiny model, and what it sends."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from tests.service.test_decode import encode
from tests.support.engines import ThreadHandle
from unperturb.service.engine.engine import Engine
from unperturb.service.http.app import create_app
from unperturb.service.keys import digest
from unperturb.service.settings import Settings


def settings(folder: Path, **changed: object) -> Settings:
    values = {"checkpoint": str(folder), "device": "cpu", "threads": torch.get_num_threads(), **changed}
    return Settings(**values)  # type: ignore[arg-type]


def wait_until_ready(client: TestClient) -> None:
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    assert engine.lifecycle.wait_until_ready(120.0)


@contextmanager
def serving(tiny_folder: Path) -> Iterator[TestClient]:
    """A client with a user's key and an administrator's."""
    admin = {"api_keys": {"ann": digest("user's")}, "admin_keys": {"root": digest("admin's")}}
    with TestClient(
        create_app(settings(tiny_folder, **admin), handle=ThreadHandle), raise_server_exceptions=False
    ) as opened:
        wait_until_ready(opened)
        yield opened


@contextmanager
def listening(tiny_folder: Path) -> Iterator[str]:
    """The address of a real server in a thread."""
    app = create_app(settings(tiny_folder), handle=ThreadHandle)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and app.state.engine.lifecycle.wait_until_ready(0.0)):
        assert thread.is_alive()
        time.sleep(0.02)
    yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def photo(seed: int = 0, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
