"""The HTTP service, over its ASGI app."""

import base64
import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from pydantic import ValidationError

from models import checkpoint
from models.errors import CheckpointError
from models.reverse_attack import PRESETS
from service.app import create_app
from service.engine import Engine
from service.keys import digest
from service.settings import Settings
from tests.test_decode import encode, png_of_claimed_size
from tests.test_engine import ThreadHandle, other_checkpoint, wait_until


def settings(folder: Path, **changed: object) -> Settings:
    return Settings(**{"checkpoint": str(folder), "device": "cpu", **changed})  # type: ignore[arg-type]


def wait_until_ready(client: TestClient) -> None:
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    assert engine.warm.wait(60)


@pytest.fixture(scope="module")
def client(tiny_folder: Path) -> Iterator[TestClient]:
    admin = {"api_keys": {"ann": digest("user's")}, "admin_keys": {"root": digest("admin's")}}
    with TestClient(
        create_app(settings(tiny_folder, **admin), handle=ThreadHandle), raise_server_exceptions=False
    ) as opened:
        wait_until_ready(opened)
        yield opened


def photo(seed: int = 0, size: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def test_multipart_upload_is_answered_in_the_documented_form(client: TestClient) -> None:
    answer = client.post("/classify", files={"image": ("a.png", photo(size=64), "image/png")})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert list(body) == ["request_id", "model", "predictions", "unpurified", "purification", "input", "timings_ms"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["model"]["id"] == "tiny"
    assert len(body["model"]["digest"]) == 64
    scores = [p["score"] for p in body["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert abs(sum(scores) - 1) < 1e-5
    assert {p["label"] for p in body["predictions"]} == {"red", "green", "blue"}
    assert len(body["unpurified"]["predictions"]) == 3
    loop = PRESETS["default"].loop
    purification = body["purification"]
    assert purification["applied"] is True
    assert purification["preset"] == "default"
    assert (purification["steps"], purification["views"]) == (loop.steps, PRESETS["default"].views)
    assert purification["epsilon"] == loop.epsilon
    assert 0 < purification["linf"] <= loop.epsilon + 1e-6
    assert purification["image"] is None
    assert body["input"] == {"width": 64, "height": 64, "mode": "RGB", "resized_to": {"width": 32, "height": 32}}
    assert list(body["timings_ms"]) == ["decode", "queue", "purify", "classify", "total"]
    assert body["timings_ms"]["total"] >= body["timings_ms"]["purify"] > 0


def test_raw_body_gives_the_same_answer(client: TestClient) -> None:
    form = client.post("/classify", files={"image": photo()}).json()
    raw = client.post("/classify", content=photo(), headers={"content-type": "image/png"}).json()
    assert raw["predictions"] == form["predictions"]
    assert raw["input"]["resized_to"] is None


def test_answer_is_the_models_own(client: TestClient, tiny_folder: Path) -> None:
    from models.defended import defend

    defended = defend(checkpoint.load(tiny_folder), PRESETS["published"])
    pixels = torch.from_numpy(np.array(Image.open(BytesIO(photo())))).permute(2, 0, 1)
    expected = defended.classify(pixels[None].float() / 255, seed=9)
    body = client.post("/classify?preset=published&seed=9", files={"image": photo()}).json()
    by_index = {p["index"]: p["score"] for p in body["predictions"]}
    for index, score in enumerate(expected.logits[0].softmax(0).tolist()):
        assert abs(by_index[index] - score) < 1e-4
    assert abs(body["purification"]["loss_after"] - expected.trace.loss_after.item()) < 1e-2


def test_purify_never_returns_the_plain_classification(client: TestClient) -> None:
    body = client.post("/classify?purify=never", files={"image": photo()}).json()
    assert body["purification"]["applied"] is False
    assert body["purification"]["loss_before"] is None
    assert body["predictions"] == body["unpurified"]["predictions"]


def test_purified_image_comes_back_within_epsilon(client: TestClient) -> None:
    body = client.post("/classify?return_image=true", files={"image": photo()}).json()
    purified = np.asarray(Image.open(BytesIO(base64.b64decode(body["purification"]["image"])))).astype(int)
    received = np.asarray(Image.open(BytesIO(photo()))).astype(int)
    assert purified.shape == (32, 32, 3)
    assert 0 < np.abs(purified - received).max() <= 8


def test_top_k_and_seed_are_heeded(client: TestClient) -> None:
    assert len(client.post("/classify?top_k=1", files={"image": photo()}).json()["predictions"]) == 1
    one, two = (client.post(f"/classify?seed={s}", files={"image": photo()}).json() for s in (1, 2))
    assert one["purification"]["loss_before"] != two["purification"]["loss_before"]


@pytest.mark.parametrize(
    ("path", "files", "status", "message"),
    [
        ("/classify?top_k=0", {"image": photo()}, 422, "top_k"),
        ("/classify?top_k=4", {"image": photo()}, 422, "top_k"),
        ("/classify?seed=-1", {"image": photo()}, 422, "seed"),
        ("/classify?seed=9223372036854775808", {"image": photo()}, 422, "seed"),
        ("/classify?preset=best", {"image": photo()}, 422, "best"),
        ("/classify?purify=maybe", {"image": photo()}, 422, "purify"),
        ("/classify?return_image=7", {"image": photo()}, 422, "return_image"),
        ("/classify", {"picture": photo()}, 400, "`image`"),
        ("/classify?model=other", {"image": photo()}, 404, "'other' is not loaded; tiny is"),
        ("/classify?surprise=1", {"image": photo()}, 422, "surprise"),
        ("/purify?bits=12", {"image": photo()}, 422, "bits"),
        ("/purify", {"images": photo()}, 400, "takes one image"),
        ("/classify", {"image": b""}, 400, "empty"),
        ("/classify", {"image": b"GIF89a" + bytes(50)}, 415, "JPEG, PNG, WEBP"),
        ("/classify", {"image": photo()[:100]}, 422, "damaged"),
        ("/classify", {"image": png_of_claimed_size(8000, 8000)}, 413, "50,000,000"),
        ("/classify", {"image": bytes(10_000_001)}, 413, "10,000,000"),
        ("/nowhere", {"image": photo()}, 404, "Not Found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_gets_a_problem_and_the_server_goes_on(
    client: TestClient, path: str, files: dict[str, bytes], status: int, message: str
) -> None:
    answer = client.post(path, files=files)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert message in body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    assert client.post("/classify", files={"image": photo()}).status_code == 200


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("text/plain", b"{}", 415),
        ("", photo(), 415),
        ("multipart/form-data", b"no boundary", 400),
        ("multipart/form-data; boundary=x", b"not a form", 400),
        ("image/png", b"", 400),
    ],
)
def test_body_of_another_form_is_refused(client: TestClient, kind: str, content: bytes, status: int) -> None:
    answer = client.post("/classify", content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_body_without_a_length_is_limited_as_it_comes(client: TestClient) -> None:
    def endless(kind: str) -> Iterator[bytes]:
        if kind.startswith("multipart"):
            yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(400):
            yield bytes(100_000)

    for kind in ("image/png", "multipart/form-data; boundary=x"):
        answer = client.post("/classify", content=endless(kind), headers={"content-type": kind})
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"


def test_unexpected_error_shows_no_exception_text(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /etc/passwd")

    with monkeypatch.context() as patch:
        patch.setattr(client.app.state.engine, "submit", fail)  # type: ignore[attr-defined]
        answer = client.post("/classify", files={"image": photo()})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["request_id"]
    assert client.post("/classify", files={"image": photo()}).status_code == 200


def test_health_readiness_card_and_docs(client: TestClient, tiny_folder: Path) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    card = json.loads((tiny_folder / checkpoint.CARD).read_text())
    assert client.get("/model").json() == card
    assert client.get("/docs").status_code == 200
    operation = client.get("/openapi.json").json()["paths"]["/classify"]["post"]
    kinds = {"multipart/form-data", "application/json", "image/png", "image/jpeg", "image/webp"}
    assert set(operation["requestBody"]["content"]) == kinds
    assert {"400", "408", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])
    assert "application/problem+json" in operation["responses"]["422"]["content"]


def test_before_warm_up_it_is_alive_but_not_ready(tiny_folder: Path) -> None:
    app = create_app(settings(tiny_folder), handle=ThreadHandle)  # without its lifespan the engine has not started
    asleep = TestClient(app)
    assert asleep.get("/healthz").status_code == 200
    for answer in (asleep.get("/readyz"), asleep.post("/classify", files={"image": photo()})):
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert "warming up" in answer.json()["detail"]


def test_failed_warm_up_never_becomes_ready(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    reasons: list[str] = []
    shutil.copytree(tiny_folder, folder)
    app = create_app(settings(folder), on_failure=reasons.append, handle=ThreadHandle)
    shutil.rmtree(folder)  # gone before the worker reads it
    with TestClient(app) as broken:
        wait_until(lambda: bool(reasons))
        answers = [broken.get(path) for path in ("/readyz", "/healthz", "/v2/health/live", "/v2/health/ready")]
    assert [answer.status_code for answer in answers] == [503] * 4
    assert "must be restarted" in answers[0].json()["detail"]
    assert "warm-up" in reasons[0]


@pytest.mark.parametrize(
    "bad",
    [{"preset": "best"}, {"device": "tpu:zero"}, {"device": "cpu,cuda:99"}, {"max_queue": 0}, {"surprise": 1}],
    ids=str,
)
def test_setting_out_of_range_is_refused_by_name(bad: dict[str, object], tiny_folder: Path) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        settings(tiny_folder, **bad)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNPERTURB_MAX_BODY_BYTES", "123")
    assert Settings().max_body_bytes == 123


def test_missing_checkpoint_is_refused_before_serving() -> None:
    with pytest.raises(CheckpointError, match="no/such"):
        create_app(Settings(checkpoint="no/such", device="cpu"))


# -- lists, base64 JSON, and the image itself --------------------------------------------------------------------------


def base64_of(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


def test_list_is_answered_in_its_order_as_each_image_alone(client: TestClient) -> None:
    files = [("images", (f"{i}.png", photo(i), "image/png")) for i in range(5)]
    body = client.post("/classify?seed=4", files=files).json()
    assert list(body) == ["request_id", "answers"]
    for i, found in enumerate(body["answers"]):
        alone = client.post("/classify?seed=4", files={"image": photo(i)}).json()
        for one, other in zip(found["predictions"], alone["predictions"], strict=True):
            assert one["index"] == other["index"]
            assert abs(one["score"] - other["score"]) < 1e-4


def test_json_takes_one_image_or_a_list_and_its_parameters_stand_above_the_query(client: TestClient) -> None:
    body = {"inputs": base64_of(photo()), "parameters": {"top_k": 1, "preset": "default"}}
    answer = client.post("/classify?top_k=3&preset=published", json=body).json()
    assert len(answer["predictions"]) == 1
    assert answer["purification"]["preset"] == "default"
    several = client.post("/classify", json={"inputs": [base64_of(photo(i)) for i in range(2)]}).json()
    assert len(several["answers"]) == 2


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "not JSON"),
        ({"inputs": "https://example.org/a.png"}, 400, "not base64 (addresses are not fetched)"),
        ({"inputs": [base64_of(photo()), "?"]}, 400, "inputs[1]"),
        ({"inputs": []}, 400, "empty"),
        ({"inputs": [base64_of(photo()), base64_of(b"GIF89a")]}, 415, "image 1: the bytes"),
        ({"inputs": base64_of(photo()), "parameters": {"top_k": 9}}, 422, "top_k"),
        ({"inputs": base64_of(photo()), "parameters": {"colour": 9}}, 422, "parameters.colour"),
        ({"inputs": base64_of(photo()), "url": "x"}, 422, "url"),
        ({}, 422, "inputs"),
        ({"inputs": [base64_of(photo())] * 33}, 413, "33 images; at most 32"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 60 else "",
)
def test_bad_json_is_refused_by_name(client: TestClient, body: Any, status: int, message: str) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post("/classify", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("path", ["/classify", "/v2/models/tiny/infer"])
@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [1] * 2000},
        {"inputs": "", "parameters": {str(i): 1 for i in range(2000)}},
        {"inputs": [], "outputs": [{"name": "scores"}] * 1000},
        [[[]] * 1001],
    ],
    ids=["list", "parameters", "outputs", "no object"],
)
def test_json_of_too_many_members_is_refused_before_each_costs_an_error(
    client: TestClient, path: str, body: Any
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert len(answer.text) < 1000
    assert "more than 1,000 members" in answer.text or "not a JSON object" in answer.text


def test_too_many_files_are_refused(client: TestClient) -> None:
    answer = client.post("/classify", files=[("images", photo())] * 33)
    assert answer.status_code == 413
    assert "at most 32" in answer.json()["detail"]


@pytest.mark.parametrize("bits", [8, 16])
def test_purified_image_itself_is_within_epsilon(client: TestClient, bits: int) -> None:
    answer = client.post(f"/purify?bits={bits}&seed=2", files={"image": photo()})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.content[24] == bits  # IHDR: the bit depth
    full = 2**bits - 1
    purified = read_png(answer.content).astype(float) / full
    received = np.asarray(Image.open(BytesIO(photo()))) / 255
    assert purified.shape == (32, 32, 3)
    assert 0 < np.abs(purified - received).max() <= PRESETS["default"].loop.epsilon + 0.5 / full
    assert float(answer.headers["x-purification-linf"]) == pytest.approx(np.abs(purified - received).max(), abs=0.003)


def read_png(payload: bytes) -> np.ndarray[Any, np.dtype[Any]]:
    """By OpenCV, which reads 16 bits a channel."""
    import cv2

    pixels = cv2.imdecode(np.frombuffer(payload, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    return pixels[:, :, ::-1]


def test_inspection_shows_every_step_of_the_way(client: TestClient) -> None:
    body = client.post("/inspect?attack=true", files={"image": photo()}).json()
    original, attacked, purified = (
        np.asarray(Image.open(BytesIO(base64.b64decode(body[name]["image"])))).astype(int)
        for name in ("original", "attacked", "purified")
    )
    assert np.array_equal(original, np.asarray(Image.open(BytesIO(photo()))))
    assert 0 < np.abs(attacked - original).max() <= 8
    assert 0 < np.abs(purified - attacked).max() <= 8
    assert len(body["losses"]) == PRESETS["default"].loop.steps
    top = body["original"]["predictions"][0]
    after = {p["index"]: p["score"] for p in body["attacked"]["predictions"]}
    assert after[top["index"]] < top["score"]
    plain = client.post("/inspect", files={"image": photo()}).json()
    assert plain["attacked"] is None
    assert plain["original"]["predictions"] == body["original"]["predictions"]


# -- limits, deadlines, clients that go --------------------------------------------------------------------------------


def test_deadline_of_the_header_is_kept(client: TestClient) -> None:
    answer = client.post("/classify?preset=published", files={"image": photo()}, headers={"x-timeout-s": "0.02"})
    assert answer.status_code == 504
    assert "deadline" in answer.json()["detail"]
    for bad in ("0", "-1", "nan", "soon"):
        answer = client.post("/classify", files={"image": photo()}, headers={"x-timeout-s": bad})
        assert answer.status_code == 422
        assert "x-timeout-s" in answer.json()["detail"]


def test_limits_count_a_list_as_its_images(tiny_folder: Path) -> None:
    app = create_app(settings(tiny_folder, max_per_client=4, max_images=8, max_queue=2), handle=ThreadHandle)
    with TestClient(app) as small:
        wait_until_ready(small)
        answer = small.post("/classify", files=[("images", photo())] * 5)
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        assert "at most 4" in answer.json()["detail"]
        answer = small.post("/classify", files=[("images", photo())] * 3)
        assert answer.status_code == 503
        assert "at most 2 may" in answer.json()["detail"]
        assert answer.headers["retry-after"]
        assert small.post("/classify", files=[("images", photo())] * 2).status_code == 200


# -- keys and models ---------------------------------------------------------------------------------------------------


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
