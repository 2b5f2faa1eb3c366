"""Every route of the OpenAPI document, each member of its query, headers, form and JSON absent, null and empty."""

import base64
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest
from fastapi.testclient import TestClient

from tests.support.serving import photo, serving
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.registry import Model
from unperturb.service.settings import PREFIX

ADMIN = {"authorization": "Bearer admin's"}
EMPTY: tuple[Any, ...] = ("", [], {}, 0, False)
OF_TEXT = ("", "null", " ")  # what a query, a header or a form can say of nothing
VOLATILE = ("request_id", "timings_ms", "inference_count", "users")
MISSING = object()
OPERATIONS = [
    "post /classify",
    "post /purify",
    "get /v2",
    "get /v2/health/live",
    "get /v2/health/ready",
    "get /v2/models/stats",
    "get /v2/models/{id}",
    "post /v2/repository/index",
    "get /v2/models/{id}/config",
    "get /v2/models/{id}/stats",
    "get /v2/models/{id}/ready",
    "post /v2/models/{id}/infer",
    "get /models",
    "post /models",
    "get /models/{id}",
    "delete /models/{id}",
    "get /model",
    "get /healthz",
    "get /readyz",
    "get /metrics",
    "post /inspect",
]
TENSOR = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {}}


class Member(NamedTuple):
    """A member of a JSON body: where it is, and whether its schema lets it be null."""

    path: tuple[str | int, ...]
    nullable: bool
    required: bool


@pytest.fixture(scope="module")
def client(tiny_folder: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            patch.delenv(name)  # the developer's own would be walked
        patch.setenv(f"{PREFIX}EXECUTION", "eager")
        with serving(tiny_folder) as opened:
            opened.headers.update(ADMIN)
            yield opened


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    return dict(client.app.openapi())  # type: ignore[attr-defined]


def bodies(path: str, folder: Path) -> dict[str, Any]:
    """A JSON body that is served, with every part that has members of its own."""
    text = base64.b64encode(photo()).decode()
    known: dict[str, dict[str, Any]] = {
        "/classify": {"inputs": text, "parameters": {}},
        "/v2/models/{id}/infer": {
            "id": "a",
            "parameters": {},
            "inputs": [{**TENSOR, "data": [text]}],
            "outputs": [{"name": "scores", "parameters": {}}],
        },
        "/models": {"checkpoint": str(folder), "id": "other"},
    }
    return known[path]


def members(schema: dict[str, Any], path: tuple[str | int, ...] = ()) -> Iterator[Member]:
    branches = schema.get("anyOf", [schema])
    for branch in branches:
        for name, inner in branch.get("properties", {}).items():
            nullable = {"type": "null"} in inner.get("anyOf", [])
            yield Member((*path, name), nullable, name in branch.get("required", []))
            yield from members(inner, (*path, name))
        if isinstance(branch.get("items"), dict):
            yield from members(branch["items"], (*path, 0))


def changed(body: Any, path: tuple[str | int, ...], value: Any) -> Any | None:
    """The body with another value there (MISSING: none); None where it has no such place."""
    body = copy.deepcopy(body)
    within = body
    for part in path[:-1]:
        if not isinstance(within, dict | list):
            return None
        within = within[part]  # type: ignore[index]
    if not isinstance(within, dict):
        return None
    within.pop(path[-1], None)
    if value is not MISSING:
        within[path[-1]] = value
    return body


def gist(answer: httpx2.Response) -> Any:
    """The status, and what of the answer depends on the request."""

    def kept(part: Any) -> Any:
        match part:
            case dict():
                return {name: kept(value) for name, value in part.items() if name not in VOLATILE}
            case list():
                return [kept(value) for value in part]
            case float():
                return round(part, 3)
        return part

    if "json" in answer.headers.get("content-type", ""):
        return answer.status_code, kept(answer.json())
    return answer.status_code, answer.headers.get("content-type")


class Walk:
    """The requests of one operation; each is checked as it is answered."""

    def __init__(self, client: TestClient, document: dict[str, Any], method: str, path: str, folder: Path) -> None:
        self.client, self.method, self.path, self.folder = client, method, path, folder
        self.operation = document["paths"][path][method]
        self.declared = {int(status) for status in self.operation["responses"]}
        self.sent = 0

    def send(self, what: str, **request: Any) -> httpx2.Response:
        id = "absent" if self.method == "delete" else "tiny"
        answer = self.client.request(self.method, self.path.replace("{id}", id), **request)
        self.sent += 1
        assert answer.status_code < 500, f"{self.method} {self.path}, {what}: {answer.status_code} {answer.text}"
        assert answer.status_code in self.declared, f"{what}: {answer.status_code} is not declared; {answer.text}"
        return answer

    def plain(self) -> dict[str, Any]:
        """A request that is served, in the first form of body that the document has."""
        kinds = list(self.operation.get("requestBody", {}).get("content", {}))
        if not kinds:
            return {}
        if kinds[0] == "multipart/form-data":
            return {"files": {"image": photo()}}
        return {"json": bodies(self.path, self.folder)}

    def parameters(self) -> None:
        plain = gist(self.send("plain", **self.plain()))
        assert plain[0] < 300 or self.method == "delete", plain
        for one in self.operation.get("parameters", []):
            place = {"query": "params", "header": "headers"}.get(one["in"])
            if place is None:
                assert one["required"]
                continue
            assert not one["required"], one
            for text in OF_TEXT:
                self.send(f"{one['name']}={text!r}", **self.plain(), **{place: {one["name"]: text}})

    def form(self, schema: dict[str, Any]) -> None:
        for name in schema["properties"]:
            for text in OF_TEXT:
                files = [("image", ("", photo()))] if name not in ("image", "images") else []
                self.send(f"field {name}={text!r}", files=[*files, (name, (None, text))])
        self.send("no field", content=b"--x--\r\n", headers={"content-type": "multipart/form-data; boundary=x"})

    def json(self, schema: dict[str, Any]) -> None:
        whole = bodies(self.path, self.folder)
        for member in members(schema):
            absent_body = changed(whole, member.path, MISSING)
            if absent_body is None:
                continue  # of another form of the same member
            name = ".".join(map(str, member.path))
            absent = self.send(f"{name} absent", json=absent_body)
            assert (absent.status_code >= 400) or not member.required, name
            null = self.send(f"{name} null", json=changed(whole, member.path, None))
            if member.nullable and not member.required:
                assert gist(null) == gist(absent), name
            for value in EMPTY:
                self.send(f"{name}={value!r}", json=changed(whole, member.path, value))

    def bodies(self, kind: str) -> None:
        for content in (b"", b"null", b"{}", b"[]", b'""', b"0"):
            answer = self.send(f"{kind} {content!r}", content=content, headers={"content-type": kind})
            assert answer.status_code >= 400, (kind, content)


def checked(client: TestClient) -> Callable[..., Model]:
    """What stands for the engine's `add`, without the loading."""
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]

    def add(name: str, id: str | None, *, digest: str | None = None, default: bool = False) -> Model:
        return engine.models.check(name, id, digest=digest)

    return add


@pytest.mark.parametrize("operation", OPERATIONS)
def test_members_that_are_absent_null_or_empty_never_break_the_service(
    client: TestClient,
    document: dict[str, Any],
    tiny_folder: Path,
    operation: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, path = operation.split()
    walk = Walk(client, document, method, path, tiny_folder)
    walk.parameters()
    if path == "/models":  # the plain one was loaded and warmed up: those that follow are no more than checked
        monkeypatch.setattr(client.app.state.engine, "add", checked(client))  # type: ignore[attr-defined]
    for kind, described in walk.operation.get("requestBody", {}).get("content", {}).items():
        schema = described["schema"]
        if kind == "application/json":
            walk.json(schema)
        elif kind == "multipart/form-data":
            walk.form(schema)
        walk.bodies(kind)
    assert walk.sent < 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_walk_sees_every_route_and_the_members_of_each_body(document: dict[str, Any]) -> None:
    described = {f"{method} {path}" for path, operations in document["paths"].items() for method in operations}
    assert set(OPERATIONS) == described
    schemas = {
        path: document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ("/classify", "/v2/models/{id}/infer", "/models")
    }
    seen = {path: {".".join(map(str, one.path)) for one in members(schema)} for path, schema in schemas.items()}
    assert seen["/classify"] >= {"inputs", "parameters", "parameters.top_k", "parameters.preset", "parameters.seed"}
    assert seen["/v2/models/{id}/infer"] >= {"id", "outputs.0.parameters", "inputs.0.parameters", "inputs.0.data"}
    assert seen["/models"] == {"checkpoint", "id", "digest", "default"}
    optional = {one.path for one in members(schemas["/v2/models/{id}/infer"]) if one.nullable}
    assert optional == {
        ("id",),
        ("parameters",),
        ("outputs",),
        ("outputs", 0, "parameters"),
        ("inputs", 0, "parameters"),
        ("inputs", 0, "data"),
    }
