"""The FastAPI app: `create_app(settings)`."""

import asyncio
import dataclasses
import os
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models import checkpoint
from models.errors import ConfigError, NotReadyError
from models.reverse_attack import PRESETS
from service import problem
from service.answer import Answer, answer
from service.decode import decode
from service.engine import Engine
from service.settings import Settings
from service.upload import BODY_SCHEMA, read_image

MAX_SEED = 2**63 - 1


class RequestId:
    """Gives every request an id: in `scope["request_id"]` and the header `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["request_id"] = uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", scope["request_id"].encode())]
            await send(message)

        await self.app(scope, receive, send_with_id)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service; loads the checkpoint (CheckpointError says what is wrong with it), warms up after start."""
    settings = settings or Settings()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    loaded = checkpoint.load(settings.checkpoint, device=settings.torch_device)
    engine = Engine(
        loaded,
        device=settings.torch_device,
        max_batch=settings.max_batch,
        batch_wait_s=settings.batch_wait_ms / 1000,
        max_queue=settings.max_queue,
    )
    decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)
        decoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="unperturb",
        summary="Purifies an image by a reverse attack, then classifies it.",
        version=str(checkpoint.SCHEMA_VERSION),
        lifespan=lifespan,
    )
    app.state.engine = engine
    app.add_middleware(RequestId)
    problem.install(app)
    card = loaded.card
    classes = len(card.classes)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": problem.Problem, "content": {"application/problem+json": {}}}
        for status in (400, 413, 415, 422, 503)
    }

    @app.post("/classify", responses=errors, openapi_extra={"requestBody": BODY_SCHEMA})
    async def classify(
        request: Request,
        purify: Annotated[Literal["always", "never"], Query(description="run the reverse attack first")] = "always",
        preset: Annotated[str, Query(description=f"one of {', '.join(PRESETS)}")] = settings.preset,
        top_k: Annotated[int, Query(ge=1, le=classes, description="classes in the answer")] = min(5, classes),
        seed: Annotated[int, Query(ge=0, le=MAX_SEED, description="of the purifier's random views")] = 0,
        return_image: Annotated[bool, Query(description="put the purified image into the answer")] = False,
    ) -> Answer:
        """Purify an uploaded image, classify it, and say what the purifier changed."""
        started = time.perf_counter()
        if preset not in PRESETS:
            raise ConfigError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
        payload = await read_image(request, max_bytes=settings.max_body_bytes)
        read = time.perf_counter()
        work = partial(decode, payload, size=loaded.classifier.image_size, max_pixels=settings.max_pixels)
        decoded = await asyncio.get_running_loop().run_in_executor(decoders, work)
        decode_ms = (time.perf_counter() - read) * 1000
        used = preset if purify == "always" else None
        outcome = await engine.submit(decoded.pixels, preset=used, seed=seed)
        return answer(
            outcome, decoded, card, request_id=request.scope["request_id"], preset=used, top_k=top_k,
            return_image=return_image, decode_ms=decode_ms, total_ms=(time.perf_counter() - started) * 1000,
        )  # fmt: skip

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: errors[503]})
    async def readyz() -> dict[str, str]:
        """The model is loaded and warmed up; 503 before that."""
        if not engine.ready.is_set():
            raise NotReadyError(engine.failure or "the model is still warming up")
        return {"status": "ready"}

    @app.get("/model")
    async def model() -> JSONResponse:
        """The checkpoint's card: architecture, classes, data, training and measured figures."""
        return JSONResponse(dataclasses.asdict(card))

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    return app
