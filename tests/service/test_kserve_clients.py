"""What other projects' clients put on the wire for KServe v2, and those clients themselves where they are installed.

The recorded requests were taken from a running service: kserve 0.21.0 (InferenceRESTClient), mlserver 1.7.1 (its types
and codecs), tritonclient 2.73.0 (HTTP). Neither kserve nor mlserver can stand among the pins of constraints.txt: kserve
wants pandas 2, psutil 5 and protobuf 6, mlserver a FastAPI before 0.116 and protobuf 6. To run them all the same, make
a virtual environment of this one's packages (a .pth file with their folder), install kserve into it, or mlserver
without its dependencies and those that are asked for, and run this file there.
"""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.support.serving import listening, photo

PIXELS = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
FILES = [photo(seed) for seed in range(2)]
TEXTS = [base64.b64encode(file).decode() for file in FILES]
FLOATS = PIXELS.astype(np.float32) / 255
ELEMENTS = b"".join(len(file).to_bytes(4, "little") + file for file in FILES)
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    with listening(tiny_folder) as opened:
        yield opened


def tensor(datatype: str = "FP32", **changed: Any) -> dict[str, Any]:
    """The input of two images, all members in the order of the clients."""
    values: Any = FLOATS.reshape(-1).tolist() if datatype == "FP32" else PIXELS.reshape(-1).tolist()
    return {"name": "image", "shape": [2, 3, 32, 32], "datatype": datatype, "data": values, **changed}


def behind(raw: bytes, datatype: str = "FP32", shape: tuple[int, ...] = (2, 3, 32, 32)) -> dict[str, Any]:
    """The input whose values stand behind the JSON."""
    parameters = {"binary_data_size": len(raw)}
    return {"name": "image", "shape": list(shape), "datatype": datatype, "parameters": parameters}


# name: (JSON, bytes behind it)
RECORDED: dict[str, tuple[dict[str, Any], bytes]] = {
    "kserve binary": (
        {"id": "d2c097db-b8a0-4237-809e-9626337110b6", "model_name": "tiny", "inputs": [behind(FLOATS.tobytes())]},
        FLOATS.tobytes(),
    ),
    "kserve outputs and parameters": (
        {
            "id": "a",
            "model_name": "tiny",
            "inputs": [behind(FLOATS.tobytes())],
            "outputs": [{"name": "scores"}, {"name": "label", "parameters": {"binary_data": False}}],
            "parameters": {"binary_data_output": True, "seed": 0},
        },
        FLOATS.tobytes(),
    ),
    "kserve JSON": ({"id": "6e2fa39d", "model_name": "tiny", "inputs": [tensor("UINT8")]}, b""),
    "kserve nested": ({"id": "cf7a45ec", "model_name": "tiny", "inputs": [tensor(data=FLOATS.tolist())]}, b""),
    "kserve to_dict": (
        {
            "id": None,
            "model_name": "tiny",
            "inputs": [tensor("UINT8", parameters=None)],
            "parameters": {},
            "outputs": [],
            "from_grpc": False,
        },
        b"",
    ),
    "mlserver NumpyRequestCodec": (
        {"parameters": {"content_type": "np"}, "inputs": [tensor(parameters={"content_type": "np"})]},
        b"",
    ),
    "mlserver headers": (
        {
            "parameters": {"content_type": "np", "headers": {"a": "b"}},
            "inputs": [tensor("UINT8", parameters={"content_type": "np"})],
        },
        b"",
    ),
    "mlserver with all that is null": (
        {
            "id": None,
            "parameters": None,
            "inputs": [tensor("UINT8", parameters={"content_type": "np", "headers": None})],
            "outputs": None,
        },
        b"",
    ),
    "tritonclient": (
        {"inputs": [behind(FLOATS.tobytes())], "parameters": {"binary_data_output": True}},
        FLOATS.tobytes(),
    ),
    "tritonclient sequence, priority, timeout": (
        {
            "inputs": [behind(PIXELS.tobytes(), "UINT8")],
            "parameters": {
                "sequence_id": 4,
                "sequence_start": True,
                "sequence_end": True,
                "priority": 1,
                "timeout": 1000000,
                "binary_data_output": True,
            },
        },
        PIXELS.tobytes(),
    ),
}
OF_FILES: dict[str, tuple[dict[str, Any], bytes]] = {
    "kserve binary": (
        {"id": "24c83893", "model_name": "tiny", "inputs": [behind(ELEMENTS, "BYTES", (2,))]},
        ELEMENTS,
    ),
    "kserve base64": (
        {
            "id": "71a097d3",
            "model_name": "tiny",
            "inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": TEXTS}],
        },
        b"",
    ),
    "mlserver Base64Codec": (
        {
            "inputs": [
                {
                    "name": "image",
                    "shape": [2, 1],
                    "datatype": "BYTES",
                    "parameters": {"content_type": "base64"},
                    "data": TEXTS,
                }
            ]
        },
        b"",
    ),
    "tritonclient base64": (
        {
            "inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": TEXTS}],
            "parameters": {"binary_data_output": True},
        },
        b"",
    ),
}


def sent(client: TestClient, body: Any, raw: bytes = b"") -> dict[str, list[float]]:
    """The numbers of every output."""
    head = json.dumps(body).encode()
    length = {"inference-header-content-length": str(len(head))} if raw else {}
    answer = client.post(INFER, content=head + raw, headers=length)
    assert answer.status_code == 200, answer.text
    size = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    shown, rest = json.loads(answer.content[:size]), answer.content[size:]
    assert shown.get("id") == body.get("id")
    outputs = {}
    for one in shown["outputs"]:
        if "data" not in one:
            count = one["parameters"]["binary_data_size"]
            kind = np.float32 if one["datatype"] == "FP32" else np.int64
            one["data"], rest = np.frombuffer(rest[:count], kind).tolist(), rest[count:]
        outputs[one["name"]] = one["data"]
    return outputs


def same(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.allclose(found[name], expected[name], atol=1e-5), name


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_request_of_a_client_is_answered_as_the_plain_one(client: TestClient, name: str) -> None:
    same(sent(client, *RECORDED[name]), sent(client, {"inputs": [tensor("UINT8")]}))


@pytest.mark.parametrize("name", OF_FILES)
def test_recorded_request_of_image_files_is_answered_as_classify(client: TestClient, name: str) -> None:
    expected = [client.post("/classify", files={"image": file}).json()["predictions"][0]["index"] for file in FILES]
    assert sent(client, *OF_FILES[name])["label"] == expected


OPTIONAL = [
    ("id",),
    ("parameters",),
    ("outputs",),
    ("inputs", 0, "parameters"),
    ("outputs", 0, "parameters"),
    *(("parameters", name) for name in ("binary_data_output", "preset", "seed", "purify", "model", "other")),
    ("inputs", 0, "parameters", "binary_data_size"),
    ("outputs", 0, "parameters", "binary_data"),
    ("outputs", 0, "parameters", "classification"),
    ("outputs", 0, "parameters", "shared_memory_region"),
]


@pytest.mark.parametrize("path", OPTIONAL, ids=lambda path: ".".join(map(str, path)))
def test_optional_member_that_is_null_is_as_one_that_is_absent(client: TestClient, path: tuple[Any, ...]) -> None:
    body: dict[str, Any] = {
        "id": None,
        "parameters": {},
        "inputs": [tensor("UINT8", parameters={})],
        "outputs": [{"name": "scores", "parameters": {}}, {"name": "label"}],
    }
    without = sent(client, body)
    within: Any = body
    for part in path[:-1]:
        within = within[part]
    within[path[-1]] = None
    same(sent(client, body), without)


def test_output_whose_binary_data_is_null_follows_the_request(client: TestClient) -> None:
    outputs = [{"name": "scores", "parameters": {"binary_data": None}}, {"name": "label", "parameters": None}]
    body = {"inputs": [tensor()], "outputs": outputs, "parameters": {"binary_data_output": True}}
    answer = client.post(INFER, json=body)
    assert int(answer.headers["inference-header-content-length"]) + 2 * 3 * 4 + 2 * 8 == len(answer.content)


# of the protocol's text and of the projects' own examples and tests, with an image of this model where one fits
FROM_THEIR_DOCS: list[Any] = [
    ({"inputs": [tensor("UINT32")]}, "inputs.0.datatype"),
    ({"inputs": [tensor(), tensor(name="input1")]}, "inputs"),
    ({"inputs": [tensor(name="input-0")]}, "inputs.0.name: Input should be 'image'"),
    ({"inputs": [{"name": "image", "shape": [1, 3], "datatype": "INT32", "data": [1, 2, 3]}]}, "inputs.0.datatype"),
    ({"inputs": [{"name": "image", "shape": -1, "datatype": "BYTES", "data": TEXTS[0]}]}, "inputs.0.shape"),
    ({"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": TEXTS[0]}]}, "inputs.0.data"),
    ({"inputs": [{"name": "image", "shape": [1, 28, 28], "datatype": "FP32", "data": [[[0.0] * 28] * 28]}]}, "shape"),
    ({"inputs": [tensor(shape=[1, 3, 224, 224], data=[0.485, 0.456, 0.406])]}, "3 numbers for shape"),
    ({"inputs": [tensor()], "outputs": [{"name": "output0"}]}, "'output0' is not one of scores, label"),
    (
        {"inputs": [tensor()], "outputs": [{"name": "scores", "parameters": {"classification": 2}}]},
        "classification is not offered",
    ),
    (
        {"inputs": [tensor(data=None, parameters={"shared_memory_region": "a", "shared_memory_byte_size": 4})]},
        "either `data` or the parameter `binary_data_size`",
    ),
    (
        {"inputs": [tensor()], "outputs": [{"name": "scores", "parameters": {"shared_memory_region": "a"}}]},
        "shared memory is not offered",
    ),
    ([{"id": "1", "inputs": [tensor()]}, {"id": "2", "inputs": [tensor()]}], "not a JSON object"),
    ({"instances": [[6.8, 2.8, 4.8, 1.4]]}, "inputs: Field required"),
]


@pytest.mark.parametrize(("body", "message"), FROM_THEIR_DOCS, ids=[message for _, message in FROM_THEIR_DOCS])
def test_request_of_their_documentation_that_does_not_fit_is_refused_by_name(
    client: TestClient, body: Any, message: str
) -> None:
    answer = client.post(INFER, json=body)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", ["/v2", "/v2/"])
def test_server_metadata_is_at_both_spellings(client: TestClient, path: str) -> None:
    answer = client.get(path, follow_redirects=False)
    assert (answer.status_code, answer.json()["name"]) == (200, "unperturb")


def test_kserve_itself_is_served(address: str) -> None:
    kserve = pytest.importorskip("kserve", reason="kserve is not installed: see the head of this file")
    from kserve.protocol.infer_type import RequestedOutput

    base = f"http://{address}"

    async def ask() -> None:
        async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2")) as official:

            async def infer(image: Any, **more: Any) -> Any:
                return await official.infer(base, kserve.InferRequest("tiny", [image], **more), model_name="tiny")

            assert await official.is_server_ready(base)
            assert await official.is_server_live(base)
            assert await official.is_model_ready(base, "tiny")
            assert not await official.is_model_ready(base, "other")
            answers = []
            for binary in (True, False):
                image = kserve.InferInput("image", [2, 3, 32, 32], "UINT8")
                image.set_data_from_numpy(PIXELS, binary_data=binary)
                answers.append(await infer(image, request_id="seven"))
                answers.append(await infer(image, parameters={"binary_data_output": True}))
                answers.append(await infer(image, request_outputs=[RequestedOutput("scores")], model_version="1"))
            assert answers[0].id == "seven"
            for answer in answers:
                assert np.allclose(answer.outputs[0].as_numpy(), answers[0].outputs[0].as_numpy(), atol=1e-5)
            files = kserve.InferInput("image", [2], "BYTES")
            files.set_data_from_numpy(np.array(FILES, dtype=np.object_))
            assert (await infer(files)).outputs[1].as_numpy().shape == (2,)
            doubled = kserve.InferInput("image", [2, 3, 32, 32], "FP64")
            doubled.set_data_from_numpy(FLOATS.astype(np.float64))
            with pytest.raises(Exception, match=r"inputs\.0\.datatype: Input should be 'FP32'"):
                await infer(doubled)

    asyncio.run(ask())


# mlserver's gRPC half names a status that Starlette has renamed
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*is deprecated")
def test_codecs_of_mlserver_are_served(client: TestClient) -> None:
    pytest.importorskip("mlserver", reason="mlserver is not installed: see the head of this file")
    from mlserver.codecs import Base64Codec, NumpyCodec, NumpyRequestCodec
    from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, RequestOutput

    def ask(request: Any, *, with_nulls: bool = False) -> Any:
        body = request.model_dump_json(exclude_unset=not with_nulls, exclude_none=not with_nulls)
        answer = client.post(INFER, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        return InferenceResponse.model_validate_json(answer.content)

    wanted = [RequestOutput(name="scores")]
    whole = NumpyRequestCodec.encode_request(PIXELS)
    whole.inputs[0].name, whole.outputs = "image", wanted  # it is named input-1, in a request of one array
    found = NumpyRequestCodec.decode_response(ask(whole))
    for values in (PIXELS, FLOATS):
        request = InferenceRequest(id="q", inputs=[NumpyCodec.encode_input("image", values)], outputs=wanted)
        for with_nulls in (False, True):
            answer = ask(request, with_nulls=with_nulls)
            assert answer.id == "q"
            assert np.allclose(NumpyCodec.decode_output(answer.outputs[0]), found, atol=1e-5)
    labels = []
    for use_bytes in (False, True):
        files = InferenceRequest(inputs=[Base64Codec.encode_input("image", FILES, use_bytes=use_bytes)])
        labels.append(NumpyCodec.decode_output(ask(files).outputs[1]).tolist())
    assert labels[0] == labels[1]
    assert MetadataModelResponse.model_validate_json(client.get("/v2/models/tiny").content).name == "tiny"
