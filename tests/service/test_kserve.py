"""The KServe v2 protocol, by its official client and by hand."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from tests.support.serving import listening, photo
from unperturb.models.checkpoints import store
from unperturb.models.purifiers.defended import defend
from unperturb.models.purifiers.reverse_attack import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    with listening(tiny_folder) as opened:
        yield opened


def batch(count: int = 2) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).random((count, 3, 32, 32), dtype=np.float32)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
def test_official_client_is_served(address: str, binary: bool, datatype: str, tiny_folder: Path) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    with InferenceServerClient(address) as official:
        assert official.is_server_live()
        assert official.is_server_ready()
        assert official.is_model_ready("tiny")
        metadata = official.get_model_metadata("tiny")
        assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
        images = batch() if datatype == "FP32" else (batch() * 255).astype(np.uint8)
        tensor = InferInput("image", list(images.shape), datatype)
        tensor.set_data_from_numpy(images, binary_data=binary)
        wanted = [
            InferRequestedOutput(name, binary_data=binary)
            for name in ("scores", "label", "unpurified_scores", "purified", "loss_before", "loss_after", "linf")
        ]
        result = official.infer(
            "tiny", [tensor], outputs=wanted, request_id="seven", parameters={"preset": "transfer", "seed": 5}
        )
        assert result.get_response()["id"] == "seven"
        scores, purified = result.as_numpy("scores"), result.as_numpy("purified")
        assert scores.shape == (2, 3)
        assert np.allclose(scores.sum(1), 1, atol=1e-5)
        assert result.as_numpy("label").tolist() == scores.argmax(1).tolist()
        received = images if datatype == "FP32" else images / np.float32(255)
        assert np.allclose(np.abs(purified - received).max((1, 2, 3)), result.as_numpy("linf"), atol=1e-5)
        assert 0 < result.as_numpy("linf").max() <= 8 / 255 + 1e-6
        defended = defend(store.load(tiny_folder), PRESETS["transfer"])
        own, other = (defended.classify(torch.from_numpy(received), seed=seed) for seed in (5, 6))
        from_own, from_other = (
            np.abs(result.as_numpy("loss_before") - one.trace.loss_before.numpy()) for one in (own, other)
        )
        assert from_own.max() < 1e-4 < 3e-4 < from_other.max()
        assert np.allclose(scores, own.logits.softmax(1), atol=2e-3)


def test_client_is_told_what_is_wrong(address: str) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(address) as official:
        tensor = InferInput("image", [1, 3, 8, 8], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 3, 8, 8), dtype=np.float32))
        with pytest.raises(InferenceServerException, match=r"takes \[batch, 3, 32, 32\]"):
            official.infer("tiny", [tensor])
        with pytest.raises(InferenceServerException, match="'other' is not loaded"):
            official.get_model_metadata("other")
        images = InferInput("image", [2, 3, 32, 32], "FP32")
        images.set_data_from_numpy(batch())
        with pytest.raises(InferenceServerException, match="classification is not offered"):
            official.infer("tiny", [images], outputs=[InferRequestedOutput("scores", class_count=3)])
        in_memory = InferRequestedOutput("scores")
        in_memory.set_shared_memory("region", 24)
        with pytest.raises(InferenceServerException, match="shared memory is not offered"):
            official.infer("tiny", [images], outputs=[in_memory])


def test_readiness_of_a_model_that_is_not_there_names_no_other(client: TestClient) -> None:
    answer = client.get("/v2/models/other/ready")
    assert answer.status_code == 404
    assert "tiny" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed", "message"),
    [
        ("GET", "1/infer", 405, "POST", "Method Not Allowed"),
        ("POST", "1", 405, "GET", "Method Not Allowed"),
        ("POST", "1/ready", 405, "GET", "Method Not Allowed"),
        ("GET", "1/nonsense", 404, None, "Not Found"),
        ("GET", "2", 404, None, "version '2' of model 'tiny' is not there; it has: 1"),
        ("POST", "10/infer", 404, None, "version '10' of model 'tiny' is not there; it has: 1"),
        ("GET", "1", 200, None, "tiny"),
    ],
)
def test_version_that_is_there_is_never_said_to_be_missing(
    client: TestClient, method: str, path: str, status: int, allowed: str | None, message: str
) -> None:
    answer = client.request(method, f"/v2/models/tiny/versions/{path}")
    assert (answer.status_code, answer.headers.get("allow")) == (status, allowed)
    assert message in answer.text
    assert answer.json().get("error") == (None if status == 200 else message)


def test_scores_are_those_of_classify(client: TestClient) -> None:
    from io import BytesIO

    from PIL import Image

    pixels = np.asarray(Image.open(BytesIO(photo()))).transpose(2, 0, 1)[None]
    body = {
        "inputs": [{"name": "image", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.tolist()}],
        "parameters": {"preset": "transfer", "seed": 5},
        "outputs": [{"name": "scores"}, {"name": "loss_before"}],
    }
    scores, (loss,) = (one["data"] for one in client.post("/v2/models/tiny/infer", json=body).json()["outputs"])
    own, other = (
        client.post(f"/classify?preset=transfer&seed={seed}", files={"image": photo()}).json() for seed in (5, 6)
    )
    for one in own["predictions"]:
        assert abs(scores[one["index"]] - one["score"]) < 1e-5
    assert loss == pytest.approx(own["purification"]["loss_before"], abs=1e-5)
    assert abs(loss - other["purification"]["loss_before"]) > 3e-4


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_image_files_are_taken_as_bytes(address: str, client: TestClient, binary: bool) -> None:
    expected = [client.post("/classify", files={"image": photo(i)}).json()["predictions"] for i in range(2)]
    files = [photo(i) for i in range(2)]
    if binary:
        from tritonclient.http import InferenceServerClient, InferInput

        tensor = InferInput("image", [2], "BYTES")
        tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
        with InferenceServerClient(address) as official:
            answer = official.infer("tiny", [tensor], request_compression_algorithm="gzip")
            labels = answer.as_numpy("label").tolist()
            ready = {"name": "tiny", "version": "1", "state": "READY", "reason": ""}
            assert official.get_model_repository_index() == [ready]
            assert official.get_model_config("tiny")["max_batch_size"] == 32
            assert official.get_inference_statistics("tiny")["model_stats"][0]["inference_count"] >= 2
            assert [one["name"] for one in official.get_inference_statistics()["model_stats"]] == ["tiny"]
            assert official.get_server_metadata()["name"] == "unperturb"
    else:
        data = [base64.b64encode(file).decode() for file in files]
        body = {"inputs": [{"name": "image", "shape": [2, 1], "datatype": "BYTES", "data": [[one] for one in data]}]}
        outputs = client.post("/v2/models/tiny/infer", json=body).json()["outputs"]
        labels = next(one for one in outputs if one["name"] == "label")["data"]
    assert labels == [one[0]["index"] for one in expected]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"shape": [1, 3], "data": ["aa=="]}, "neither [batch]"),
        ({"shape": [2], "data": ["aa=="]}, "1 elements for shape [2]"),
        ({"shape": [1], "data": ["?"]}, "element 0 of `data` is not base64"),
        ({"shape": [1], "data": [5]}, "element 0 of `data` is not base64"),
        ({"shape": [1]}, "either"),
        ({"shape": [1], "data": ["R0lGODlh"]}, "not an image"),
    ],
    ids=["shape", "count", "text", "number", "none", "gif"],
)
def test_bad_image_files_in_a_tensor_are_refused(client: TestClient, tensor: dict[str, Any], message: str) -> None:
    body = {"inputs": [{"name": "image", "datatype": "BYTES", **tensor}]}
    answer = client.post("/v2/models/tiny/infer", json=body)
    assert answer.status_code in (400, 415), answer.text
    assert message in answer.json()["error"]


def request(**changed: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": [0.5] * 3072, **changed}
    return {"inputs": [tensor]}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (request(data=[0.5] * 3071), 400, "3071 numbers"),
        (request(data=[float("nan")] * 3072), 422, "not numbers"),
        (request(data=[1.5] * 3072), 422, "outside [0, 1]"),
        (request(data=[-1] * 3072, datatype="UINT8"), 422, "outside [0, 255]"),
        (request(data=[[0.5], [0.5, 0.5]]), 400, "one shape"),
        (request(data=["x"] * 3072), 400, "numbers"),
        (request(data=["0.5"] * 3072), 400, "not numbers"),
        (request(data=[0.5] * 3071 + ["0.5"]), 400, "not numbers"),
        (request(data=[1] * 3071 + [True]), 400, "not numbers"),
        (request(data=[0.5] * 3071 + [None]), 400, "not numbers"),
        (request(data=[[[["0.5"] * 32] * 32] * 3]), 400, "not numbers"),
        (request(shape=[1, 3, -32, -32]), 400, "shape"),
        (request(shape=[1, 1, 96, 32]), 400, "shape"),
        (request(shape=[3072]), 400, "shape"),
        (request(name="pixels"), 400, "name"),
        (request(datatype="FP64"), 400, "datatype"),
        (request(data=None), 400, "either"),
        (request(data=None, parameters={"binary_data_size": 4}), 400, "binary_data_size=4"),
        ({**request(), "outputs": [{"name": "logits"}]}, 400, "'logits' is not one of"),
        ({**request(), "outputs": [{"name": "scores"}] * 2}, 400, "asked for twice"),
        ({**request(), "outputs": [{"name": "scores", "parameters": {"classification": 3}}]}, 400, "not offered"),
        ({**request(), "parameters": {"presett": "vote"}}, 422, "'presett' is not known; 'preset' is"),
        ({**request(), "parameters": {"preset": "nonsense"}}, 422, "parameters.preset"),
        ({**request(), "parameters": {"model": "other"}}, 422, "'other' is not the model of the path, 'tiny'"),
        (request(data=[[[[0.5] * 3] * 32] * 32]), 400, "nested as [1, 32, 32, 3] under shape [1, 3, 32, 32]"),
        (request(data=[[0.5] * 3072]), 400, "nested as [1, 3072]"),
        (request(data=[7.5] * 3072, datatype="UINT8"), 400, "UINT8 has fractions"),
        ({**request(), "parameters": {"preset": "vote"}, "outputs": [{"name": "loss_before"}]}, 400, "'loss_before'"),
        ({**request(), "parameters": {"purify": "never"}, "outputs": [{"name": "linf"}]}, 400, "'linf'"),
        ({"inputs": []}, 400, "inputs"),
        ({**request(), "parameters": {"p" * 201: 1}}, 400, "a name of more than 200 characters"),
        ({**request(), "parameters": {"model": "m" * 201}}, 422, "parameters.model"),
        ({**request(), "parameters": {"preset": "m" * 201}}, 422, "parameters.preset"),
        ({**request(), "outputs": [{"name": "m" * 201}]}, 400, "outputs.0.name"),
        ({**request(), "id": "m" * 201}, 400, "id: "),
        (request(shape=[40, 3, 32, 32], data=[0.5] * 3072 * 40), 413, "40 images; at most 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_tensor_is_refused_by_name(client: TestClient, body: dict[str, Any], status: int, message: str) -> None:
    answer = client.post("/v2/models/tiny/infer", content=json.dumps(body))
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    "more",
    [
        {"model_name": "tiny", "model_version": "1", "id": None, "parameters": None, "outputs": None},
        {"parameters": {"content_type": "np", "headers": {"a": "b"}, "sequence_id": 4, "timeout": 3}},
        {"trace": True},
    ],
    ids=["null and names", "other clients' parameters", "unknown member"],
)
def test_optional_and_unknown_members_are_taken_or_ignored(client: TestClient, more: dict[str, Any]) -> None:
    plain = client.post("/v2/models/tiny/infer", json=request()).json()
    tensor = {**request()["inputs"][0], "parameters": None, "content_type": "x"}
    answer = client.post("/v2/models/tiny/infer", json={**request(), "inputs": [tensor], **more})
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"] == plain["outputs"]


@pytest.mark.parametrize("length", ["x", "-1", "0", "99999999", "1e3", "9" * 5000])
def test_bad_header_length_is_refused(client: TestClient, length: str) -> None:
    answer = client.post("/v2/models/tiny/infer", content=b"{}", headers={"inference-header-content-length": length})
    assert answer.status_code == 400
    assert "inference-header-content-length" in answer.json()["error"]
