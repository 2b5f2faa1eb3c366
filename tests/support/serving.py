"""A client of the service over a tiny model, and what it sends."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from tests.support.engines import READY_S, ThreadHandle, wait_until
from tests.support.pictures import encode
from unperturb.benchmarks.serving import open_loop
from unperturb.benchmarks.serving.watch import RunningServer
from unperturb.service.engine.engine import Engine
from unperturb.service.http.app import create_app
from unperturb.service.keys import digest
from unperturb.service.settings import Settings


def settings(folder: Path, **changed: object) -> Settings:
    values = {"checkpoint": str(folder), "device": "cpu", "threads": torch.get_num_threads(), **changed}
    return Settings(**values)  # type: ignore[arg-type]


def wait_until_ready(client: TestClient) -> None:
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    assert engine.lifecycle.wait_until_ready(READY_S)


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
def in_thread(app: Callable[..., Any], *, timeout_s: float = 120.0, **options: Any) -> Iterator[int]:
    """The port of a real server of any app, in a thread; of the service, once it is ready."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_config=None, access_log=False, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), timeout_s)
        assert thread.is_alive()
        if isinstance(app, FastAPI):
            assert app.state.engine.lifecycle.wait_until_ready(timeout_s)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@contextmanager
def in_process(
    checkpoint: Path | str,
    log: Path,
    environment: Mapping[str, str],
    *,
    python: Path | str = sys.executable,
    folder: Path = open_loop.ROOT,
) -> Iterator[RunningServer]:
    """The service as a process of its own, once it is ready, its log in a file; everybody may wait."""
    port = open_loop.free_port()
    _, *command = open_loop.service(port)
    usual = {
        "UNPERTURB_CHECKPOINT": str(checkpoint),
        "UNPERTURB_DEVICE": "cpu",
        "UNPERTURB_THREADS": "1",
        "UNPERTURB_PATIENCE": "1000",
    }
    with open_loop.running(
        [str(python), *command],
        port=port,
        ready="/readyz",
        log=log,
        environment={**usual, **environment},
        folder=folder,
    ) as process:
        yield RunningServer(port, f"http://127.0.0.1:{port}", process)


@contextmanager
def listening(tiny_folder: Path) -> Iterator[str]:
    """The address of the service over a tiny model, in a thread."""
    with in_thread(create_app(settings(tiny_folder), handle=ThreadHandle)) as port:
        yield f"127.0.0.1:{port}"


def photo(seed: int = 0, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
