"""Pages of other origins: which may call the service from a browser, and what they can read of an answer."""

from pathlib import Path

from fastapi.testclient import TestClient

from tests.support.engines import ThreadHandle
from tests.support.serving import photo, settings, wait_until_ready
from unperturb.service.http.app import create_app
from unperturb.service.keys import digest


def test_browsers_of_other_origins_are_let_in_by_one_setting(tiny_folder: Path) -> None:
    asked = {"origin": "https://lab.example", "access-control-request-method": "POST"}
    for origins, allowed in (("", None), ("https://lab.example, https://b.example", "https://lab.example"), ("*", "*")):
        unstarted = TestClient(create_app(settings(tiny_folder, cors_origins=origins)))
        assert unstarted.options("/classify", headers=asked).headers.get("access-control-allow-origin") == allowed
        refused = unstarted.post("/classify?top_k=0", files={"image": photo()}, headers={"origin": asked["origin"]})
        assert refused.status_code == 422
        assert refused.headers.get("access-control-allow-origin") == allowed


SAFELISTED_BY_FETCH = {
    "cache-control",
    "content-language",
    "content-length",
    "content-type",
    "expires",
    "last-modified",
}


def test_page_of_another_origin_can_read_every_header_of_an_answer(tiny_folder: Path) -> None:
    changed = {"cors_origins": "https://lab.example", "authentication": "on", "api_keys": {"ann": digest("secret")}}
    origin, key = {"origin": "https://lab.example"}, {"x-api-key": "secret"}
    unstarted = TestClient(create_app(settings(tiny_folder, **changed), handle=ThreadHandle))
    tensor = {"name": "image", "shape": [1, 3, 32, 32], "datatype": "UINT8", "data": [7] * 3072}
    binary = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    with TestClient(create_app(settings(tiny_folder, **changed), handle=ThreadHandle), headers=origin | key) as started:
        wait_until_ready(started)
        answers = [
            started.post("/purify", files={"image": photo()}),
            started.post("/v2/models/tiny/infer", json=binary),
            started.get("/purify"),
            started.post("/purify", files={"image": photo()}, headers={"x-api-key": "wrong"}),
            unstarted.post("/purify", files={"image": photo()}, headers=origin | key),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 405, 401, 503]
    seen: set[str] = set()
    for answer in answers:
        exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
        names = {name for name in answer.headers if not name.startswith("access-control-")}
        assert names - SAFELISTED_BY_FETCH - {"vary"} <= exposed
        seen |= names
    assert exposed <= seen
