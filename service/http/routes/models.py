"""Which models are served: listed for everybody, changed with an administrator's key."""

import asyncio
import dataclasses
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unperturb.service.engine.registry import Model
from unperturb.service.http import json_body, problem
from unperturb.service.http.gateway import Gateway
from unperturb.service.http.schemas import inlined
from unperturb.service.http.upload import read_within

MAX_BYTES = 65_536


class Described(BaseModel):
    """One model that is served."""

    id: str
    digest: str = Field(description="SHA-256 of the weights")
    classes: int
    image_size: int
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


def router(gateway: Gateway) -> APIRouter:
    """The models' routes."""
    routes = APIRouter(tags=["models"])
    engine, changing = gateway.engine, asyncio.Lock()

    def described(model: Model) -> Described:
        return Described(
            id=model.id,
            digest=model.card.weights_sha256,
            classes=len(model.card.classes),
            image_size=model.image_size,
            default=model.id == engine.models.default_id,
        )

    @routes.get("/models", responses=problem.responses(401))
    async def models(request: Request) -> list[Described]:
        """Every model that is served."""
        gateway.keys.user(request)
        return [described(model) for model in engine.models.by_id.values()]

    @routes.get("/models/{id}", responses=problem.responses(401, 404))
    async def card(request: Request, id: str) -> JSONResponse:
        """A model's card: architecture, classes, data, training and measured figures."""
        gateway.keys.user(request)
        return JSONResponse(dataclasses.asdict(engine.models.get(id).card))

    @routes.get("/model", responses=problem.responses(401))
    async def default_card(request: Request) -> JSONResponse:
        """The default model's card."""
        gateway.keys.user(request)
        return JSONResponse(dataclasses.asdict(engine.models.get(None).card))

    @routes.post(
        "/models",
        status_code=201,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": inlined(ToLoad)}},
            }
        },
        responses=problem.responses(400, 401, 403, 408, 413, 422, 503),
    )
    async def load(request: Request) -> Described:
        """Load a checkpoint and warm it up beside the others, then serve it.

        Requests that are in progress on a model of the same id end on the one they began with.
        """
        gateway.keys.admin(request)
        body = await read_within(request, max_bytes=MAX_BYTES, timeout_s=gateway.settings.upload_timeout_s)
        try:
            wanted = ToLoad.model_validate(json_body.parse(body))
        except ValidationError as error:
            raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from error
        async with changing:
            model = await asyncio.to_thread(
                engine.add, wanted.checkpoint, wanted.id, digest=wanted.digest, default=wanted.default
            )
            return described(model)

    @routes.delete("/models/{id}", status_code=204, responses=problem.responses(401, 403, 404, 422))
    async def unload(request: Request, id: str) -> Response:
        """Serve a model no more; requests that are in progress on it are finished."""
        gateway.keys.admin(request)
        async with changing:
            engine.models.remove(id)
        return Response(status_code=204)

    return routes
