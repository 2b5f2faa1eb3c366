"""Lists, base64 JSON, and the image itself."""

import asyncio
import base64
import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from tests.support.serving import photo
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.decoding.decode import Decoded
from unperturb.service.errors import UnprocessableError
from unperturb.service.http.inflate import inflated
from unperturb.service.http.tensors import read_infer
from unperturb.service.http.upload import from_base64

JSON = {"content-type": "application/json"}


def base64_of(payload: bytes) -> str:
    return base64.b64encode(payload).decode()


def first_loss(tiny_folder: Path, payload: bytes, seed: int) -> float:
    """The model's own loss before the step of `transfer`, which draws its views by the seed."""
    x = torch.from_numpy(np.array(Image.open(BytesIO(payload)))).permute(2, 0, 1)[None].float() / 255
    return float(defend(store.load(tiny_folder), PRESETS["transfer"]).purify(x, seed=seed).trace.loss_before)


def assert_seed_is(loss: float, seed: int, tiny_folder: Path, payload: bytes) -> None:
    own, default = (abs(loss - first_loss(tiny_folder, payload, one)) for one in (seed, 0))
    assert own < 1e-4 < 3e-4 < default


def test_list_is_answered_in_its_order_as_each_image_alone(client: TestClient, tiny_folder: Path) -> None:
    files = [("images", (f"{i}.png", photo(i), "image/png")) for i in range(5)]
    body = client.post("/classify?preset=transfer&seed=5", files=files).json()
    assert list(body) == ["request_id", "answers"]
    for i, found in enumerate(body["answers"]):
        alone = client.post("/classify?preset=transfer&seed=5", files={"image": photo(i)}).json()
        assert_seed_is(found["purification"]["loss_before"], 5, tiny_folder, photo(i))
        for one, other in zip(found["predictions"], alone["predictions"], strict=True):
            assert one["index"] == other["index"]
            assert abs(one["score"] - other["score"]) < 1e-4


def test_json_takes_one_image_or_a_list_and_parameters(client: TestClient, tiny_folder: Path) -> None:
    body = {"inputs": base64_of(photo()), "parameters": {"top_k": 1, "preset": "transfer"}}
    answer = client.post("/classify?seed=5", json=body).json()
    assert len(answer["predictions"]) == 1
    assert answer["purification"]["preset"] == "transfer"
    assert_seed_is(answer["purification"]["loss_before"], 5, tiny_folder, photo())
    twice = client.post("/classify?top_k=3", json=body)
    assert twice.status_code == 422
    assert "top_k: it stands in the query and in the body" in twice.json()["detail"]
    several = client.post("/classify", json={"inputs": [base64_of(photo(i)) for i in range(2)]}).json()
    assert len(several["answers"]) == 2


def test_fields_of_a_form_are_parameters(client: TestClient) -> None:
    by_query = client.post("/classify?purify=never&top_k=1", files={"image": photo()}).json()
    by_form = client.post("/classify", files={"image": photo()}, data={"purify": "never", "top_k": "1"}).json()
    assert by_form["predictions"] == by_query["predictions"]
    assert by_form["purification"]["applied"] is False
    seen = client.post("/inspect", files={"image": photo()}, data={"preset": "transfer", "attack": "true"}).json()
    assert (seen["preset"], seen["attacked"] is None) == ("transfer", False)
    purified = client.post("/purify", files={"image": photo()}, data={"preset": "vote"})
    assert "changes no image" in purified.json()["detail"]


@pytest.mark.parametrize(
    ("fields", "query", "status", "message"),
    [
        ({"preset": "nonsense"}, "", 422, "preset"),
        ({"presett": "vote"}, "", 422, "presett"),
        ({"top_k": "many"}, "", 422, "top_k"),
        ({"top_k": "1"}, "?top_k=1", 422, "top_k: it stands in the query and in the body"),
        ({"top_k": ["1", "2"]}, "", 400, "field 'top_k' twice"),
    ],
    ids=["value", "name", "type", "both", "twice"],
)
def test_bad_field_of_a_form_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], query: str, status: int, message: str
) -> None:
    answer = client.post(f"/classify{query}", files={"image": photo()}, data=fields)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("route", ["/inspect", "/purify"])
def test_other_routes_refuse_a_field_that_they_do_not_know(client: TestClient, route: str) -> None:
    answer = client.post(route, files={"image": photo()}, data={"top_k": "1"})
    assert (answer.status_code, "top_k" in answer.json()["detail"]) == (422, True)


def test_files_in_other_fields_and_parts_without_a_file_name(client: TestClient) -> None:
    other = client.post("/classify", files={"image": photo(), "mask": photo()})
    assert (other.status_code, "field 'mask'" in other.json()["detail"]) == (400, True)
    part = b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + photo() + b"\r\n--x--\r\n"
    bare = client.post("/classify", content=part, headers={"content-type": "multipart/form-data; boundary=x"})
    assert bare.status_code == 200, bare.text
    assert bare.json()["predictions"] == client.post("/classify", files={"image": photo()}).json()["predictions"]


def packed(body: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(body)
    if how == "gzip of two members":
        return gzip.compress(body[:100]) + gzip.compress(body[100:])
    bare = zlib.compressobj(wbits=-15)
    return zlib.compress(body) if how == "deflate" else bare.compress(body) + bare.flush()


PACKED = {"gzip": "gzip", "gzip of two members": "gzip", "deflate": "deflate", "bare deflate": "deflate"}


@pytest.mark.parametrize("how", PACKED)
def test_packed_bodies_of_every_route_are_unpacked(client: TestClient, how: str) -> None:
    plain = client.post("/classify", content=photo(), headers={"content-type": "image/png"}).json()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64_of(photo())]}
    bodies = {
        ("/classify", "image/png"): photo(),
        ("/classify", "application/json"): json.dumps({"inputs": base64_of(photo())}).encode(),
        ("/v2/models/tiny/infer", "application/json"): json.dumps({"inputs": [tensor]}).encode(),
        ("/classify", "multipart/form-data; boundary=x"): b'--x\r\nContent-Disposition: form-data; name="image"\r\n\r\n'
        + photo()
        + b"\r\n--x--\r\n",
    }
    for (route, kind), body in bodies.items():
        headers = {"content-type": kind, "content-encoding": PACKED[how]}
        answer = client.post(route, content=packed(body, how), headers=headers)
        assert answer.status_code == 200, (kind, answer.text)
        if route == "/classify":
            assert answer.json()["predictions"] == plain["predictions"]


@pytest.mark.parametrize("size", [*range(65_530, 65_560), 131_072, 200_000])
def test_bare_deflate_of_every_size_comes_out_whole(size: int) -> None:
    body = np.random.default_rng(size).integers(0, 4, size, dtype=np.uint8).tobytes()

    async def unpacked() -> bytes:
        async def chunks() -> AsyncIterator[bytes]:
            yield packed(body, "bare deflate")

        return b"".join([piece async for piece in inflated(chunks(), "deflate")])

    assert asyncio.run(unpacked()) == body


@pytest.mark.parametrize(
    ("body", "pieces"),
    [(gzip.compress(b"") * 20_000, 0), (gzip.compress(bytes(8_000_000)), 100)],
    ids=["empty", "large"],
)
def test_others_go_on_while_a_small_body_of_much_is_unpacked(body: bytes, pieces: int) -> None:
    async def turns() -> int:
        taken = 0

        async def chunks() -> AsyncIterator[bytes]:
            yield body

        async def count() -> None:
            nonlocal taken
            while True:
                taken += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(count())
        assert len([piece async for piece in inflated(chunks(), "gzip")]) >= pieces
        others.cancel()
        return taken

    assert asyncio.run(turns()) > 50


def test_list_with_a_bad_image_is_not_decoded_to_its_end(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bytes] = []

    async def decode(payload: bytes, *_: object, **__: object) -> Decoded:
        if payload == b"bad":
            raise UnprocessableError("it is damaged")
        try:
            await asyncio.sleep(60)
        finally:
            left.append(payload)
        raise AssertionError

    monkeypatch.setattr(client.app.state.gateway.decoders, "decode", decode)  # type: ignore[attr-defined]
    payloads = (b"bad", b"one", b"two")
    answer = client.post("/classify", files=[("images", (str(i), one, "image/png")) for i, one in enumerate(payloads)])
    assert answer.status_code == 422
    assert answer.json()["detail"] == "image 0: it is damaged"
    assert sorted(left) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("body", "encoding", "status", "message"),
    [
        (gzip.compress(b"") * 600_000, "gzip", 413, "more than"),
        (b"not packed", "gzip", 400, "not gzip"),
        (b"\xff\xff\xff", "deflate", 400, "not deflate"),
        (gzip.compress(b"x" * 1000)[:-9], "gzip", 400, "breaks off"),
        (gzip.compress(b"x") + b"more", "gzip", 400, "not gzip"),
        (zlib.compress(b"x") + b"more", "deflate", 400, "goes on"),
        (b"x", "br", 415, "'br' is not gzip"),
        (gzip.compress(b"\0" * (64 << 20)), "gzip", 413, "more than"),
    ],
    ids=["empty members", "gzip", "deflate", "short", "garbage", "garbage deflate", "brotli", "bomb"],
)
@pytest.mark.parametrize("kind", ["image/png", "application/json"])
def test_badly_packed_body_is_refused(
    client: TestClient, kind: str, body: bytes, encoding: str, status: int, message: str
) -> None:
    answer = client.post("/classify", content=body, headers={"content-type": kind, "content-encoding": encoding})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


@pytest.mark.parametrize("form", ["plain", "data URL", "URL-safe", "in lines", "without padding"])
def test_base64_is_taken_in_every_form_that_clients_send(client: TestClient, form: str) -> None:
    payload = photo(size=43)
    plain = base64.b64encode(payload).decode()
    text = {
        "plain": plain,
        "data URL": f"data:image/png;base64,{plain}",
        "URL-safe": base64.urlsafe_b64encode(payload).decode(),
        "in lines": base64.encodebytes(payload).decode(),
        "without padding": plain.rstrip("="),
    }[form]
    answer = client.post("/classify", json={"inputs": text})
    assert answer.status_code == 200, answer.text
    assert answer.json()["input"]["width"] == 43


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 400, "not JSON"),
        ({"inputs": "data:image/png,raw"}, 400, "not base64"),
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


MANY = {
    "lists": b"[],",
    "lists in lists": b"[[[[]]]],",
    "numbers": b"1,",
    "texts": b'"",',
    "objects": b'{"a":1},',
    "members": b'"a":1,',
}


@pytest.mark.parametrize("path", ["/classify", "/v2/models/tiny/infer"])
@pytest.mark.parametrize("piece", MANY.values(), ids=MANY)
def test_json_that_would_keep_everybody_waiting_is_refused_before_it_is_parsed(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, piece: bytes
) -> None:
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("it is parsed"))
    begin, end = (b"{", b"}") if piece == MANY["members"] else (b"[", b"]")
    inner = begin + piece * (9_000_000 // len(piece)) + piece[:-1] + end
    body = b'{"inputs": [{"name": "image", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": ' + inner + b"}]}"
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code == 413, answer.text
    assert "commas, colons and brackets" in answer.text


def test_json_of_as_many_numbers_as_a_request_may_have_is_parsed_also_for_large_images() -> None:
    for images, side in ((32, 32), (4, 220)):
        values = np.random.default_rng(0).random((images, 3, side, side))
        tensor = {"name": "image", "shape": values.shape, "datatype": "FP32", "data": values.tolist()}
        body = json.dumps({"inputs": [tensor]}).encode()
        _, read = read_infer(body, None, max_numbers=32 * 3 * side**2)
        assert np.array_equal(read, values.astype(np.float32))


def test_integer_of_more_digits_than_any_needs_is_no_json(client: TestClient) -> None:
    answer = client.post("/classify", content=b'{"inputs": %s}' % (b"9" * 641), headers=JSON)
    assert (answer.status_code, answer.json()["detail"]) == (400, "the body is not JSON")


def test_base64_in_pieces_costs_little_more_than_in_one() -> None:
    def cost_s(text: str) -> float:
        began_at = time.thread_time()
        assert len(from_base64(text)) > 4_000_000
        return time.thread_time() - began_at

    whole, pieces = (min(cost_s(text) for _ in range(3)) for text in ("AAAA" * 2_000_000, "AA " * 3_000_000))
    assert pieces < 3 * whole


def test_large_files_of_a_form_open_none(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpooledTemporaryFile, "rollover", lambda _: pytest.fail("a file is opened"))
    answer = client.post("/classify", files=[("images", bytes(1_100_000))] * 8)
    assert answer.status_code == 415, answer.text


def test_too_many_files_are_refused(client: TestClient) -> None:
    answer = client.post("/classify", files=[("images", photo())] * 33)
    assert answer.status_code == 413
    assert "at most 32" in answer.json()["detail"]


@pytest.mark.parametrize("bits", [8, 16])
def test_purified_image_itself_is_within_epsilon(client: TestClient, bits: int, tiny_folder: Path) -> None:
    answer = client.post(f"/purify?bits={bits}&preset=transfer&seed=2", files={"image": photo()})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/png"
    assert answer.content[24] == bits  # IHDR: the bit depth
    full = 2**bits - 1
    purified = read_png(answer.content).astype(float) / full
    received = np.asarray(Image.open(BytesIO(photo()))) / 255
    assert purified.shape == (32, 32, 3)
    assert 0 < np.abs(purified - received).max() <= PRESETS["transfer"].loop.epsilon + 0.5 / full
    assert float(answer.headers["x-purification-linf"]) == pytest.approx(np.abs(purified - received).max(), abs=0.003)
    assert_seed_is(float(answer.headers["x-loss-before"]), 2, tiny_folder, photo())


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
