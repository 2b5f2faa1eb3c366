"""List the models that are served, for everybody, and change them, with an administrator's key."""

import asyncio
import dataclasses
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from unperturb.service.engine.registry import Model
from unperturb.service.http import json_body, problem
from unperturb.service.http.dependencies import FOR_ADMINS, FOR_USERS, GatewayOfApp
from unperturb.service.http.gateway import Gateway
from unperturb.service.http.upload import read_within
from unperturb.service.http.worth import PURPOSES, advice_of, worth_of

MAX_BYTES = 65_536


class Described(BaseModel):
    """One model that is served."""

    id: str
    digest: str = Field(description="SHA-256 of the weights")
    classes: int
    image_size: int
    presets: tuple[str, ...] = Field(description="that it has the parts for; each can be asked for in a request")
    execution: str = Field(description="how its steps run now: eager, captured or compiled")
    default: bool


class ToLoad(BaseModel):
    """A checkpoint on the server's own disk."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: str = Field(min_length=1, description="a shipped checkpoint's name, or a folder on the server")
    id: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = Field(
        None, description="to serve it under; the checkpoint's own where none is given. One in use is replaced"
    )
    digest: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = Field(
        None, description="SHA-256 that the weights must have"
    )
    default: bool = Field(False, description="serve it where a request names no model")


router = APIRouter(tags=["models"])


def describe(gateway: Gateway, model: Model) -> Described:
    """Return what the listing shows of a model."""
    return Described(
        id=model.id,
        digest=model.card.weights_sha256,
        classes=len(model.card.classes),
        image_size=model.image_size,
        presets=model.presets,
        execution=model.execution,
        default=model.id == gateway.engine.models.default_id,
    )


@router.get("/models", responses=problem.responses(401), dependencies=[FOR_USERS])
async def models(gateway: GatewayOfApp) -> list[Described]:
    """List every model that is served."""
    return [describe(gateway, model) for model in gateway.engine.models.by_id.values()]


@router.get("/models/{id}", responses=problem.responses(401, 404), dependencies=[FOR_USERS])
async def card(gateway: GatewayOfApp, id: str) -> JSONResponse:
    """Return a model's card: architecture, classes, data, training, figures; its presets, their purposes and worth."""
    return _card(gateway.engine.models.get(id))


@router.get("/model", responses=problem.responses(401), dependencies=[FOR_USERS])
async def default_card(gateway: GatewayOfApp) -> JSONResponse:
    """Return the default model's card, its presets, their purposes and worth."""
    return _card(gateway.engine.models.get(None))


def _card(model: Model) -> JSONResponse:
    judged = {name: found.model_dump() for name in model.presets if (found := worth_of(model.card, name))}
    purposes = {name: PURPOSES[name] for name in model.presets}
    shown = {"presets": model.presets, "purposes": purposes, "worth": judged, "advice": advice_of(model.card)}
    return JSONResponse({**dataclasses.asdict(model.card), **shown})


@router.post(
    "/models",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": json_body.inlined(ToLoad)}},
        }
    },
    responses=problem.responses(400, 401, 403, 408, 413, 422, 503),
    dependencies=[FOR_ADMINS],
)
async def load(request: Request, gateway: GatewayOfApp) -> Described:
    """Load a checkpoint and warm it up beside the others, then serve it.

    Requests that are in progress on a model of the same id end on the one they began with.
    """
    body = await read_within(request, max_bytes=MAX_BYTES, timeout_s=gateway.settings.upload_timeout_s)
    wanted = json_body.validate(ToLoad, json_body.parse(body))
    async with gateway.changing_models:
        model = await asyncio.to_thread(
            gateway.engine.add, wanted.checkpoint, wanted.id, digest=wanted.digest, default=wanted.default
        )
        return describe(gateway, model)


@router.delete(
    "/models/{id}", status_code=204, responses=problem.responses(401, 403, 404, 422), dependencies=[FOR_ADMINS]
)
async def unload(gateway: GatewayOfApp, id: str) -> Response:
    """Stop serving a model; requests that are in progress on it are finished."""
    async with gateway.changing_models:
        gateway.engine.models.remove(id)
    return Response(status_code=204)
