"""Weights fetched from a hub: a small one on loopback, asked by the hub's own client."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models as zoo
from typer.testing import CliRunner, Result

from unperturb.models.checkpoints import store
from unperturb.service.cli import app

timm = pytest.importorskip("timm")
constants = pytest.importorskip("huggingface_hub").constants

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The files of FOLDER/OWNER/NAME at one commit: what the hub's client asks for."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = sorted((self.folder / parts[2] / parts[3]).glob("*"))
            tree = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name} for file in files
            ]
            siblings = [{"rfilename": file.name} for file in files]
            about = tree if "tree" in parts else {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
            return self._answer(200 if files else 404, json.dumps(about).encode(), "application/json")
        file = self.folder.joinpath(*parts[:2], parts[-1])
        body = file.read_bytes() if "resolve" in parts and file.is_file() else b""
        return self._answer(200 if body else 404, body, "application/octet-stream")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "resolve" in self.path else "RepoNotFound")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    handler = type("Here", (Hub,), {"folder": tmp_path / "hub"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.fixture(autouse=True)
def there(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real hubs none can be reached, and what was fetched is kept in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNPERTURB_CACHE", "own")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for name, value in (("ENDPOINT", hub), ("HF_HUB_CACHE", str(tmp_path / "cache")), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def imported(*given: str) -> Result:
    return CliRunner().invoke(app, ["import", *given, "--out", "model"])


def lost(done: Result, what: str) -> None:
    assert done.exit_code == 2, done.output
    assert what in done.output
    assert not Path("model").exists()


def test_classifier_is_fetched_from_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "her" / "pets"
    repository.mkdir(parents=True)
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), repository / "model.safetensors")
    described = {"architecture": "test_efficientnet", "num_classes": 3, "label_names": ["cat", "dog", "hamster"]}
    (repository / "config.json").write_text(json.dumps(described))
    lost(imported("hf-hub:her/cats"), "hf-hub:her/cats could not be fetched")
    done = imported("hf-hub:her/pets")
    assert done.exit_code == 0, done.output
    assert store.load("model").card.classes == ("cat", "dog", "hamster")
    assert has_weights(repository / "model.safetensors")


def test_timms_own_weights_are_fetched(tmp_path: Path) -> None:
    lost(imported("timm:test_efficientnet", "--pretrained"), "timm's weights of test_efficientnet could not be fetched")
    repository = tmp_path / "hub" / "timm" / "test_efficientnet.r160_in1k"
    repository.mkdir(parents=True)
    save_file(timm.create_model("test_efficientnet").state_dict(), repository / "model.safetensors")
    done = imported("timm:test_efficientnet", "--pretrained")
    assert done.exit_code == 0, done.output
    assert has_weights(repository / "model.safetensors")


def has_weights(file: Path) -> bool:
    wanted = load_file(file)["classifier.weight"]
    return any(torch.equal(value, wanted) for value in store.load("model").classifier.state_dict().values())


def test_torchvisions_weights_are_taken_from_where_they_were_placed() -> None:
    lost(imported("torchvision:mobilenet_v3_small", "--pretrained"), "without a network, place the file of https://")
    weights = zoo.get_model_weights("mobilenet_v3_small").DEFAULT
    placed = Path("own/torchvision/checkpoints") / Path(weights.url).name
    placed.parent.mkdir(parents=True, exist_ok=True)
    torch.save(zoo.mobilenet_v3_small().state_dict(), placed)
    done = imported("torchvision:mobilenet_v3_small", "--pretrained")
    assert done.exit_code == 0, done.output
    assert len(store.load("model").card.classes) == 1000
