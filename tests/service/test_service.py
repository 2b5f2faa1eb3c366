"""The HTTP service, over its ASGI app: POST /classify, health."""

import asyncio
import base64
import dataclasses
import json
import re
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

from tests.conftest import make_checkpoint
from tests.support.checkpoints import CARDS, with_readout
from tests.support.engines import ThreadHandle, wait_until
from tests.support.pictures import png_of_claimed_size
from tests.support.serving import photo, serving, settings
from unperturb.models.checkpoints import store
from unperturb.models.errors import CheckpointError
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.models.purifiers.vote import Vote
from unperturb.service.http.answer import Answer, Answers
from unperturb.service.http.answer import answer as make_answer
from unperturb.service.http.app import create_app
from unperturb.service.http.routes import classify
from unperturb.service.http.worth import PURPOSES
from unperturb.service.settings import Settings


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
    defended = defend(store.load(tiny_folder), PRESETS["published"])
    pixels = torch.from_numpy(np.array(Image.open(BytesIO(photo())))).permute(2, 0, 1)
    expected = defended.classify(pixels[None].float() / 255, seed=9)
    body = client.post("/classify?preset=published&seed=9", files={"image": photo()}).json()
    by_index = {p["index"]: p["score"] for p in body["predictions"]}
    for index, score in enumerate(expected.logits[0].softmax(0).tolist()):
        assert abs(by_index[index] - score) < 1e-4
    assert abs(body["purification"]["loss_after"] - expected.trace.loss_after.item()) < 1e-2


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"])
def test_head_is_answered_as_get(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]


def test_docs_need_no_other_host(client: TestClient) -> None:
    page = client.get("/docs").text
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert len(links) >= 3
    for link in links:
        assert link.startswith("/")
        assert client.get(link).status_code == 200
    assert "https://" not in page


def test_version_that_is_not_there_is_said_with_those_that_are(client: TestClient) -> None:
    for path in ("/v2/models/tiny/versions/2", "/v2/models/tiny/versions/7/ready"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/json"  # as KServe's protocol has it
        assert "is not there; it has: 1" in answer.json()["error"]
        by_problem = client.get(path, headers={"accept": "application/problem+json"})
        assert by_problem.headers["content-type"] == "application/problem+json"
        assert by_problem.json()["detail"] == answer.json()["error"]
    assert client.post("/v2/models/tiny/versions/2/infer", json={}).status_code == 404
    assert client.get("/v2/models/tiny/versions/1").status_code == 200


def test_vote_answers_with_its_views_and_without_losses(client: TestClient) -> None:
    body = client.post("/classify?preset=vote&return_image=true", files={"image": photo()}).json()
    purification = body["purification"]
    assert (purification["applied"], purification["preset"], purification["vote"]) == (True, "vote", 4)
    assert (purification["steps"], purification["views"], purification["linf"]) == (0, None, 0.0)
    assert purification["loss_before"] is purification["loss_after"] is None
    assert body["predictions"] != body["unpurified"]["predictions"]
    seen = client.post("/inspect?preset=vote", files={"image": photo()}).json()
    assert (seen["vote"], seen["losses"], seen["loss_before"], seen["loss_after"]) == (4, [], None, None)
    assert seen["purified"]["predictions"] == body["predictions"]
    unchanged = client.post("/purify?preset=vote", files={"image": photo()})
    assert (unchanged.status_code, "changes no image" in unchanged.json()["detail"]) == (422, True)


def test_answer_tells_the_cards_own_vote(tmp_path: Path) -> None:
    made, vote = make_checkpoint(), Vote(shifts=((0, 0), (1, 1), (2, 0)), mirrored=False)
    store.save(tmp_path, dataclasses.replace(made, card=dataclasses.replace(made.card, vote=vote)))
    with serving(tmp_path) as client:
        body = client.post("/classify?preset=vote", files={"image": photo()}).json()
        assert body["purification"]["vote"] == 3
        assert client.post("/inspect?preset=vote", files={"image": photo()}).json()["vote"] == 3


def test_model_without_a_head_is_served_by_what_needs_none(tmp_path: Path) -> None:
    store.save(tmp_path, make_checkpoint(head=False))
    with serving(tmp_path) as client:
        for query in ("purify=never", "preset=vote"):
            assert client.post(f"/classify?{query}", files={"image": photo()}).status_code == 200
        for route in ("/classify", "/inspect", "/purify"):
            refused = client.post(route, files={"image": photo()})
            assert refused.status_code == 422
            assert "unperturb train head" in refused.json()["detail"]
        assert client.get("/model").json()["presets"] == ["vote"]
        assert client.get("/models").json()[0]["presets"] == ["vote"]


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
    assert 0 < np.abs(purified - received).max() <= 255 * PRESETS["default"].loop.epsilon + 1e-3


def test_answers_of_many_classes_are_made_off_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "INLINE", 5)
    apart: list[bool] = []

    def noted(*given: Any, **options: Any) -> Answer:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            apart.append(True)
        else:
            apart.append(False)
        return make_answer(*given, **options)

    monkeypatch.setattr(classify, "answer", noted)
    one = client.post("/classify?top_k=3", files={"images": photo()})
    two = client.post("/classify?top_k=3", files=[("images", photo()), ("images", photo(1))])
    assert apart == [False, True, True]
    for body, count in ((one, 1), (two, 2)):
        assert body.headers["content-type"] == "application/json"
        answers = Answers.model_validate_json(body.text)
        assert answers.request_id == body.headers["x-request-id"]
        assert [len(answer.predictions) for answer in answers.answers] == [3] * count


def test_top_k_and_seed_are_heeded(client: TestClient) -> None:
    assert len(client.post("/classify?top_k=1", files={"image": photo()}).json()["predictions"]) == 1
    one, two = (client.post(f"/classify?preset=transfer&seed={s}", files={"image": photo()}).json() for s in (1, 2))
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
        patch.setattr(client.app.state.engine.dispatcher, "submit", fail)  # type: ignore[attr-defined]
        answer = client.post("/classify", files={"image": photo()})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["request_id"]
    assert client.post("/classify", files={"image": photo()}).status_code == 200


def test_health_readiness_card_and_docs(client: TestClient, tiny_folder: Path) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    card = json.loads((tiny_folder / store.CARD).read_text())
    assert client.get("/model").json() == {
        **card,
        "presets": ["default", "vote", "transfer", "published"],
        "purposes": {name: PURPOSES[name] for name in ("default", "vote", "transfer", "published")},
        "worth": {},
        "advice": None,
    }
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


def test_missing_checkpoint_is_refused_before_serving() -> None:
    with pytest.raises(CheckpointError, match="no/such"):
        create_app(Settings(checkpoint="no/such", device="cpu"))


def test_every_reference_of_the_openapi_description_leads_somewhere(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    references: list[str] = []

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            references.extend(value for key, value in part.items() if key == "$ref" and isinstance(value, str))
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            collect(inner)

    collect(described)
    assert references
    for reference in references:
        found = described
        for name in reference.removeprefix("#/").split("/"):
            assert name in found, reference
            found = found[name]
    body = described["paths"]["/v2/models/{id}/infer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "datatype" in body["properties"]["inputs"]["items"]["properties"]


def test_nearest_neighbour_checkpoint_is_served_like_any_other(tmp_path: Path) -> None:
    store.save(tmp_path / "knn", with_readout(CARDS["knn"]))
    with serving(tmp_path / "knn") as opened:
        answer = opened.post("/classify", files={"image": photo()})
    assert answer.status_code == 200
    defended = defend(store.load(tmp_path / "knn"), PRESETS["default"])
    pixels = torch.from_numpy(np.array(Image.open(BytesIO(photo())))).permute(2, 0, 1)[None].float() / 255
    scores = defended.classify(pixels).logits.softmax(1)[0]
    for one in answer.json()["predictions"]:
        assert abs(one["score"] - float(scores[one["index"]])) < 1e-4


def test_encoder_without_a_classifier_is_not_served(tmp_path: Path) -> None:
    store.save(tmp_path / "encoder", with_readout(CARDS["none"]))
    with pytest.raises(CheckpointError, match="unperturb train linear --encoder"):
        create_app(settings(tmp_path / "encoder"))
