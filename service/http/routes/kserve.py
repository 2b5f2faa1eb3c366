"""The KServe v2 (Open Inference) protocol under /v2."""

import asyncio
import difflib
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from starlette.convertors import StringConvertor, register_url_convertor

from unperturb.models.purifiers.reverse_attack import PRESETS
from unperturb.service.engine.messages import Outcome
from unperturb.service.engine.registry import Model
from unperturb.service.errors import MalformedRequestError, NotFoundError, UnprocessableError
from unperturb.service.http import json_body, problem
from unperturb.service.http.dependencies import FOR_USERS, GatewayOfApp, Key
from unperturb.service.http.gateway import Timeout
from unperturb.service.http.routes.parameters import PurifyOrNot
from unperturb.service.http.tensors import HEADER_LENGTH, INPUT, InferRequest, read_infer, write_infer
from unperturb.service.http.upload import Upload, read_within, too_many

DEFAULT_OUTPUTS = ("scores", "label")
BODY = {
    "required": True,
    "content": {
        "application/json": {"schema": json_body.inlined(InferRequest)},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    },
}


class InferParameters(PurifyOrNot):
    """The request's parameters: the purifier's, and the form of the outputs."""

    binary_data_output: bool = False


def _floats(values: list[Any]) -> NDArray[np.float32]:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float32)


OUTPUTS: dict[str, Callable[[list[Outcome]], NDArray[Any]]] = {
    "scores": lambda outcomes: np.stack([o.scores for o in outcomes]),
    "label": lambda outcomes: np.array([int(o.scores.argmax()) for o in outcomes], dtype=np.int64),
    "unpurified_scores": lambda outcomes: np.stack([o.unpurified_scores for o in outcomes]),
    "purified": lambda outcomes: np.stack([o.image for o in outcomes if o.image is not None]),
    "loss_before": lambda outcomes: _floats([o.loss_before for o in outcomes]),
    "loss_after": lambda outcomes: _floats([o.loss_after for o in outcomes]),
    "linf": lambda outcomes: _floats([o.linf for o in outcomes]),
}
EXTENSIONS = ["binary_tensor_data", "model_repository", "model_configuration", "statistics"]
OF_STEPS = ("loss_before", "loss_after")
OF_PURIFICATION = ("purified", "loss_before", "loss_after", "linf")


class OtherVersion(StringConvertor):
    """Versions that no model has; those of "1" are routes of their own, with their 404 and 405."""

    regex = "(?!1(?:/|$))[^/]+"


register_url_convertor("other_version", OtherVersion())
router = APIRouter(prefix="/v2", tags=["KServe v2"])
NOT_FOUND = problem.responses(404)


@router.get("")
@router.get("/", include_in_schema=False)
async def server(request: Request) -> dict[str, Any]:
    """Describe this server."""
    return {"name": "unperturb", "version": request.app.version, "extensions": EXTENSIONS}


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", responses=problem.responses(503))
async def live(gateway: GatewayOfApp) -> dict[str, bool]:
    """Say whether the process can still serve."""
    gateway.engine.lifecycle.require_alive()
    return {"live": True}


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", responses=problem.responses(503))
async def ready(gateway: GatewayOfApp) -> dict[str, bool]:
    """Say whether requests are served."""
    gateway.engine.lifecycle.require_ready()
    return {"ready": True}


@router.get("/models/stats", responses=problem.responses(401), dependencies=[FOR_USERS])
async def every_stats(gateway: GatewayOfApp) -> dict[str, Any]:
    """Return how many images each model has answered, as Triton's statistics extension has it."""
    return {"model_stats": [_statistics(model) for model in gateway.engine.models.by_id.values()]}


@router.get("/models/{id}", responses={**NOT_FOUND, **problem.responses(401)}, dependencies=[FOR_USERS])
@router.get("/models/{id}/versions/1", include_in_schema=False, dependencies=[FOR_USERS])
async def metadata(gateway: GatewayOfApp, id: str) -> dict[str, Any]:
    """Describe the model's inputs and outputs."""
    model = gateway.engine.models.get(id)
    side, classes = model.image_size, len(model.card.classes)
    shapes = {
        "scores": [-1, classes],
        "unpurified_scores": [-1, classes],
        "purified": [-1, 3, side, side],
    }
    return {
        "name": model.id,
        "versions": ["1"],
        "platform": "pytorch",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, 3, side, side]}],
        "outputs": [
            {"name": name, "datatype": "INT64" if name == "label" else "FP32", "shape": shapes.get(name, [-1])}
            for name in OUTPUTS
        ],
    }


@router.post("/repository/index", responses=problem.responses(401), dependencies=[FOR_USERS])
async def index(gateway: GatewayOfApp) -> list[dict[str, str]]:
    """List the models, as Triton's model repository extension has it."""
    state = "READY" if gateway.engine.lifecycle.not_ready is None else "UNAVAILABLE"
    return [{"name": id, "version": "1", "state": state, "reason": ""} for id in gateway.engine.models.by_id]


@router.get("/models/{id}/config", responses={**NOT_FOUND, **problem.responses(401)}, dependencies=[FOR_USERS])
@router.get("/models/{id}/versions/1/config", include_in_schema=False, dependencies=[FOR_USERS])
async def config(gateway: GatewayOfApp, id: str) -> dict[str, Any]:
    """Describe a model as Triton's model configuration extension has it."""
    described = await metadata(gateway, id)
    parts = {
        name: [{"name": one["name"], "data_type": f"TYPE_{one['datatype']}", "dims": one["shape"][1:]} for one in ones]
        for name, ones in (("input", described["inputs"]), ("output", described["outputs"]))
    }
    return {"name": id, "platform": "pytorch", "max_batch_size": gateway.settings.max_images, **parts}


@router.get("/models/{id}/stats", responses={**NOT_FOUND, **problem.responses(401)}, dependencies=[FOR_USERS])
@router.get("/models/{id}/versions/1/stats", include_in_schema=False, dependencies=[FOR_USERS])
async def stats(gateway: GatewayOfApp, id: str) -> dict[str, Any]:
    """Return how many images a model has answered, as Triton's statistics extension has it."""
    return {"model_stats": [_statistics(gateway.engine.models.get(id))]}


def _statistics(model: Model) -> dict[str, Any]:
    return {"name": model.id, "version": "1", "inference_count": model.answered}


@router.get("/models/{id}/ready", responses={**NOT_FOUND, **problem.responses(503)})
@router.get("/models/{id}/versions/1/ready", include_in_schema=False)
async def model_ready(gateway: GatewayOfApp, id: str) -> dict[str, Any]:
    """Say whether requests to this model are served."""
    if id not in gateway.engine.models.by_id:  # the models' names are for who has a key
        raise NotFoundError(f"model {id!r} is not loaded")
    gateway.engine.lifecycle.require_ready()
    return {"name": id, "ready": True}


@router.post(
    "/models/{id}/infer",
    response_class=Response,
    openapi_extra={"requestBody": BODY},
    responses={
        200: {"content": {"application/json": {}, "application/octet-stream": {}}, "description": "The outputs"},
        **problem.responses(400, 401, 404, 408, 413, 422, 429, 503, 504),
    },
)
@router.post("/models/{id}/versions/1/infer", include_in_schema=False)
async def infer(request: Request, gateway: GatewayOfApp, key: Key, id: str, timeout_s: Timeout = None) -> Response:
    """Purify and classify a tensor of images."""
    settings = gateway.settings
    with (
        gateway.admit(request, key, timeout_s, None) as ticket,
        gateway.engine.models.use(id) as model,
    ):
        with gateway.uploading(ticket) as upload_s:
            body = await read_within(request, max_bytes=settings.max_body_bytes, timeout_s=upload_s)
        numbers = settings.max_images * 3 * model.image_size**2
        header_length = request.headers.get(HEADER_LENGTH)
        asked, given = await asyncio.to_thread(read_infer, body, header_length, max_numbers=numbers)
        wanted = json_body.validate(InferParameters, _own(asked.parameters), within=("body", "parameters"))
        if wanted.model not in (None, id):
            raise UnprocessableError(f"parameters.model: {wanted.model!r} is not the model of the path, {id!r}")
        preset = ticket.context.preset = wanted.stage(settings.preset)
        model.require(preset)
        _check(asked, given, model, preset=preset, max_images=settings.max_images)
        with gateway.count(ticket, len(given)):
            images = list(given)
            if isinstance(given, list):
                images = [one.pixels for one in await gateway.decode(ticket, Upload(given, True, {}), model)]
            outcomes = await gateway.run(
                ticket,
                model,
                images,
                stage=preset,
                seed=wanted.seed,
                wants_image=any(output.name == "purified" for output in asked.outputs),
                gate=wanted.gate(model, settings.preset),
            )
    names = [output.name for output in asked.outputs] or DEFAULT_OUTPUTS
    outputs = {name: OUTPUTS[name](outcomes) for name in names}
    payload, head = await asyncio.to_thread(write_infer, asked, model.id, outputs, DEFAULT_OUTPUTS)
    if head is None:
        return Response(payload, media_type="application/json")
    return Response(payload, media_type="application/octet-stream", headers={HEADER_LENGTH: str(head)})


@router.api_route(
    "/models/{id}/versions/{version:other_version}",
    methods=["GET", "POST"],
    include_in_schema=False,
    dependencies=[FOR_USERS],
)
@router.api_route(
    "/models/{id}/versions/{version:other_version}/{rest:path}",
    methods=["GET", "POST"],
    include_in_schema=False,
    dependencies=[FOR_USERS],
)
async def no_such_version(gateway: GatewayOfApp, id: str, version: str) -> None:
    """Refuse a version that is not there."""
    raise NotFoundError(f"version {version!r} of model {gateway.engine.models.get(id).id!r} is not there; it has: 1")


def _own(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that are this service's, those that are null as if absent.

    Another client's own are ignored, but a slip of the pen is not.
    """
    known = InferParameters.model_fields
    for name in parameters.keys() - known.keys():
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            raise UnprocessableError(f"parameters: {name!r} is not known; {near[0]!r} is")
    return {name: value for name, value in parameters.items() if name in known and value is not None}


def _check(
    asked: InferRequest, images: NDArray[Any] | list[bytes], model: Model, *, preset: str | None, max_images: int
) -> None:
    side = model.image_size
    if not isinstance(images, list) and images.shape[2:] != (side, side):
        raise MalformedRequestError(f"shape {list(images.shape)}: model {model.id!r} takes [batch, 3, {side}, {side}]")
    if len(images) > max_images:
        raise too_many(len(images), max_images)
    lacks = OF_PURIFICATION if preset is None else () if PRESETS[preset].loop.steps else OF_STEPS
    known = [name for name in OUTPUTS if name not in lacks]
    for output in asked.outputs:
        if output.name not in known:
            raise MalformedRequestError(f"output {output.name!r} is not one of {', '.join(known)}")
        if output.parameters.get("classification"):
            raise MalformedRequestError(f"output {output.name!r}: classification is not offered; ask for the scores")
        if output.parameters.get("shared_memory_region") is not None:
            raise MalformedRequestError(f"output {output.name!r}: shared memory is not offered; it comes in the answer")
