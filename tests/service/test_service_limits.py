"""Limits, deadlines, keys, and models that come and go."""

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from starlette.responses import PlainTextResponse

from tests.support.engines import ThreadHandle, other_checkpoint
from tests.support.serving import photo, settings, wait_until_ready
from unperturb.service.errors import NotReadyError
from unperturb.service.http.app import create_app
from unperturb.service.http.early import RefuseEarly
from unperturb.service.http.gateway import Gateway
from unperturb.service.http.observe import Observe
from unperturb.service.keys import digest
from unperturb.service.settings import Settings


def test_deadline_of_the_header_is_kept(client: TestClient) -> None:
    answer = client.post("/classify?preset=published", files={"image": photo()}, headers={"x-timeout-s": "0.02"})
    assert answer.status_code == 504
    assert "deadline" in answer.json()["detail"]
    for bad in ("0", "-1", "nan", "soon"):
        answer = client.post("/classify", files={"image": photo()}, headers={"x-timeout-s": bad})
        assert answer.status_code == 422
        assert "x-timeout-s" in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/classify", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize(
    ("deadline_s", "upload_s", "status", "reason"),
    [("0.05", 30.0, 504, "Deadline"), ("30", 0.05, 408, "UploadTimeout"), (None, 0.05, 408, "UploadTimeout")],
    ids=["deadline", "upload", "upload without a deadline"],
)
def test_slow_body_is_answered_by_the_limit_that_it_passed(
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    kind: str,
    deadline_s: str | None,
    upload_s: float,
    status: int,
    reason: str,
) -> None:
    app = client.app
    gateway: Gateway = app.state.gateway  # type: ignore[attr-defined]
    monkeypatch.setattr(gateway, "settings", gateway.settings.model_copy(update={"upload_timeout_s": upload_s}))

    async def slow() -> AsyncIterator[bytes]:
        yield b"--x\r\n"
        await asyncio.sleep(60)

    async def send() -> httpx.Response:
        headers = {"content-type": kind, **({"x-timeout-s": deadline_s} if deadline_s else {})}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as asynchronous:
            return await asynchronous.post(path, content=slow(), headers=headers)

    def refusals() -> float:
        counted = gateway.metrics.registry.collect()
        samples = (s for family in counted if family.name == "unperturb_rejected" for s in family.samples)
        return sum(s.value for s in samples if s.name.endswith("_total") and s.labels["reason"] == reason)

    before = refusals()
    answer = asyncio.run(send())
    assert answer.status_code == status, answer.text
    assert ("deadline" if status == 504 else "did not arrive") in answer.json()["detail"]
    assert refusals() == before + 1


def test_limits_count_a_list_as_its_images(tiny_folder: Path) -> None:
    app = create_app(
        settings(tiny_folder, max_per_client=4, max_images=8, max_queue=2, max_batch=1), handle=ThreadHandle
    )
    with TestClient(app) as small:
        wait_until_ready(small)
        answer = small.post("/classify", files=[("images", photo())] * 5)
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        assert "at most 4" in answer.json()["detail"]
        answer = small.post("/classify", files=[("images", photo())] * 4)  # one has a slot
        assert answer.status_code == 503
        assert "at most 2 may" in answer.json()["detail"]
        assert answer.headers["retry-after"]
        assert small.post("/classify", files=[("images", photo())] * 3).status_code == 200


def test_request_that_cannot_be_taken_is_refused_before_its_route_unless_it_has_another_fault(
    tiny_folder: Path,
) -> None:
    app = create_app(settings(tiny_folder), handle=ThreadHandle)  # not started, so that it is not ready
    gateway = app.state.gateway
    early = RefuseEarly(PlainTextResponse("its route"), gateway)
    client = TestClient(Observe(early, metrics=gateway.metrics, tracing=None, ending=lambda: False))
    for refused in (
        client.post("/classify?preset=vote&top_k=2", files={"image": photo()}, headers={"x-timeout-s": "3"}),
        client.post("/classify", json={"images": []}),
        TestClient(app).post("/purify", files={"image": photo()}),  # by its route
    ):
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["retry-after"]
        assert "warming up" in refused.json()["detail"]
        assert refused.json()["request_id"] == refused.headers["x-request-id"]
    counted = gateway.metrics.registry.get_sample_value
    labels = {"model": "tiny", "preset": "vote"}
    assert counted("unperturb_requests_total", {"route": "/classify", "status": "503", **labels}) == 1
    assert counted("unperturb_rejected_total", {"reason": "NotReady", **labels}) == 1
    for path, headers in (
        ("/classify?preset=none", {}),
        ("/classify?unknown=1", {}),
        ("/classify", {"x-timeout-s": "soon"}),
        ("/classify", {"x-api-key": "wrong"}),
        ("/purify", {}),
    ):
        assert client.post(path, files={"image": photo()}, headers=headers).text == "its route", path

    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:  # under overload the collector would look through thousands of them
        assert client.post("/classify", files={"image": photo()}).status_code == 503
        gc.collect()
        assert not [one for one in gc.garbage if isinstance(one, NotReadyError)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_strangers_need_a_key_where_one_is_required(tiny_folder: Path) -> None:
    app = create_app(settings(tiny_folder, host="0.0.0.0", api_keys={"ann": digest("secret")}), handle=ThreadHandle)
    with TestClient(app) as guarded:
        wait_until_ready(guarded)
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"authorization": "secret"}):
            for path in ("/classify", "/purify", "/inspect", "/v2/models/tiny/infer"):
                answer = guarded.post(path, files={"image": photo()}, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
        assert guarded.get("/metrics").status_code == 401
        assert guarded.get("/readyz").status_code == guarded.get("/").status_code == 200
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            assert guarded.post("/classify", files={"image": photo()}, headers=headers).status_code == 200


def test_openapi_document_declares_a_key_exactly_where_a_stranger_is_refused(tiny_folder: Path) -> None:
    app = create_app(settings(tiny_folder, host="0.0.0.0", api_keys={"ann": digest("secret")}), handle=ThreadHandle)
    stranger = TestClient(app)  # not started: a key is asked for first
    described = stranger.get("/openapi.json").json()
    schemes = described["components"]["securitySchemes"]
    assert schemes["bearer"]["scheme"] == "bearer"
    assert (schemes["header"]["in"], schemes["header"]["name"]) == ("header", "X-API-Key")
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            status = stranger.request(method, path.replace("{id}", "tiny")).status_code
            declared = operation.get("security", [])
            assert declared == ([{"bearer": []}, {"header": []}] if status in (401, 403) else []), (method, path)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "example.org", "::"])
def test_serving_strangers_without_keys_is_refused_unless_switched_off_by_name(host: str, tiny_folder: Path) -> None:
    with pytest.raises(ValidationError, match="UNPERTURB_AUTHENTICATION=off"):
        settings(tiny_folder, host=host)
    assert not settings(tiny_folder, host=host, authentication="off").keys.required
    assert not settings(tiny_folder, host="127.0.0.1").keys.required


def test_keys_come_from_the_environment_and_a_key_in_their_place_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_API_KEYS", f"ann:{digest('a')}, bob:{digest('b')}")
    assert Settings().api_keys == {"ann": digest("a"), "bob": digest("b")}
    monkeypatch.setenv("UNPERTURB_API_KEYS", f"ann:{digest('a')},ann:{digest('b')}")
    with pytest.raises(ValidationError, match="'ann' is named twice"):
        Settings()
    monkeypatch.setenv("UNPERTURB_API_KEYS", "ann:plain-secret")
    with pytest.raises(ValidationError, match="unperturb key NAME"):
        Settings()


def test_models_are_loaded_replaced_and_removed_by_an_administrator(
    client: TestClient, tmp_path: Path, tiny_folder: Path
) -> None:
    new, admin = other_checkpoint(tmp_path), {"authorization": "Bearer admin's"}
    for headers, status in (({}, 401), ({"authorization": "Bearer user's"}, 403)):
        assert client.post("/models", json={"checkpoint": new}, headers=headers).status_code == status
        assert client.delete("/models/other", headers=headers).status_code == status
    for body, status, message in (
        ({"checkpoint": "no/such"}, 422, "no/such"),
        ({"checkpoint": new, "digest": "0" * 64}, 422, "not 000"),
        ({"checkpoint": new, "id": "a/b"}, 422, "id"),
        ({}, 422, "checkpoint"),
    ):
        answer = client.post("/models", json=body, headers=admin)
        assert answer.status_code == status
        assert message in answer.json()["detail"]
    answer = client.post("/models", json={"checkpoint": new, "id": "other"}, headers=admin)
    assert answer.status_code == 201, answer.text
    assert [m["id"] for m in client.get("/models").json()] == ["tiny", "other"]
    assert client.get("/models/other").json()["weights_sha256"] == answer.json()["digest"]
    first, second = (client.post(f"/classify?model={id}", files={"image": photo()}).json() for id in ("tiny", "other"))
    assert second["model"] == {"id": "other", "digest": answer.json()["digest"]}
    assert first["predictions"] != second["predictions"]
    assert client.delete("/models/tiny", headers=admin).status_code == 422
    assert client.delete("/models/other", headers=admin).status_code == 204
    assert client.post("/classify?model=other", files={"image": photo()}).status_code == 404


def test_body_of_a_model_is_not_read_before_the_key_and_is_bounded(client: TestClient) -> None:
    admin = {"authorization": "Bearer admin's"}
    assert client.post("/models", content=b"x" * 100_000).status_code == 401
    assert client.post("/models", content=b"x" * 100_000, headers=admin).status_code == 413
    assert client.post("/models", content=b"x", headers=admin).status_code == 400


def test_without_an_administrators_key_models_cannot_be_changed(tiny_folder: Path) -> None:
    app = create_app(settings(tiny_folder), handle=ThreadHandle)
    answer = TestClient(app).post("/models", json={"checkpoint": "default"})
    assert answer.status_code == 403
    assert "UNPERTURB_ADMIN_KEYS" in answer.json()["detail"]
