"""The FastAPI app: `create_app(settings)`."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata

import torch
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline

from unperturb.service.engine.admission import Admission
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.handle import WorkerHandle
from unperturb.service.engine.lifecycle import EngineState
from unperturb.service.engine.messages import WorkerConfig
from unperturb.service.http import problem
from unperturb.service.http.early import RefuseEarly
from unperturb.service.http.gateway import Gateway
from unperturb.service.http.observe import Observe
from unperturb.service.http.routes import classify, health, kserve, models, page
from unperturb.service.http.tensors import HEADER_LENGTH
from unperturb.service.settings import Settings, unknown
from unperturb.service.telemetry import tracing
from unperturb.service.telemetry.metrics import Metrics

log = logging.getLogger("unperturb.service")
FEW_DIGITS = 640  # the fewest that Python sets; at its 4,300 a body of such integers takes 0.3 s to parse
EXPOSED = (  # to pages of other origins, beside those that a browser shows anyway
    "x-request-id",
    "x-model-id",
    "x-purification-linf",
    "x-loss-before",
    "x-loss-after",
    HEADER_LENGTH,
    "retry-after",
    "allow",
    "www-authenticate",
)


def make_engine(
    settings: Settings,
    metrics: Metrics,
    *,
    on_failure: Callable[[str], None] | None = None,
    handle: Callable[..., WorkerHandle] = WorkerHandle,
) -> Engine:
    """Return the engine that the settings describe, not started."""
    return Engine(
        settings.checkpoint,
        workers=[
            WorkerConfig(
                device=str(device),
                slots=settings.slots,
                threads=settings.threads_each,
                execution=settings.first_execution,
                precision=settings.precision,
                log_level=settings.log_level,
                log_format=settings.log_format,
                upgrade=settings.upgrade(device),
                alone=settings.threads_alone if device.type == "cpu" else None,
            )
            for device in settings.devices
        ],
        admission=Admission(settings.max_queue, settings.patience, settings.preset),
        stall_s=settings.stall_s,
        metrics=metrics,
        on_failure=on_failure,
        handle=handle,
    )


def create_app(
    settings: Settings | None = None,
    *,
    on_failure: Callable[[str], None] | None = None,
    handle: Callable[..., WorkerHandle] = WorkerHandle,
    warm_first: bool = False,
) -> FastAPI:
    """Return the service, its checkpoint loaded; raise CheckpointError where that fails. It warms up after its start.

    on_failure is called, from a thread, when the service can never serve again and its process should be restarted;
    handle hosts a worker; warm_first ends the app's start-up only after the warm-up, for a router that asks no /readyz.
    """
    settings = settings or Settings()
    sys.set_int_max_str_digits(FEW_DIGITS)
    if strange := unknown(os.environ):
        log.warning("no such setting, and not heeded: %s", ", ".join(strange))
    tracer = tracing.set_up()
    metrics = Metrics(served=lambda: {(id, model.number) for id, model in engine.models.by_id.items()})
    engine = make_engine(settings, metrics, on_failure=on_failure, handle=handle)
    metrics.describe(
        version=metadata.version("unperturb"),
        torch=torch.__version__,
        devices=",".join(str(device) for device in settings.devices),
        execution=settings.execution,
        precision=settings.precision,
    )
    metrics.watch(
        slots=settings.slots_in_all,
        ready=lambda: engine.lifecycle.not_ready is None,
        queue_length=lambda: engine.waiting,
        slots_in_use=lambda: engine.in_slots,
        memory=lambda: engine.gpu_memory,
        executions=lambda: {id: model.execution for id, model in engine.models.by_id.items()},
        workers=lambda: engine.worker_processes,
    )
    gateway = Gateway(settings, engine, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.decoders.start()
        engine.start()
        while warm_first and engine.lifecycle.state is EngineState.WARMING_UP:
            await asyncio.sleep(0.1)
        yield
        await asyncio.to_thread(engine.stop, settings.grace_s)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPIOffline(
        title="unperturb",
        summary="Purifies an image by a reverse attack, then classifies it.",
        version=metadata.version("unperturb"),
        lifespan=lifespan,
    )
    app.state.engine, app.state.gateway = engine, gateway
    app.add_middleware(RefuseEarly, gateway=gateway)
    app.add_middleware(Observe, metrics=metrics, tracing=tracer, ending=lambda: engine.lifecycle.ending)
    if origins := [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED
        )
    problem.install(app)
    for family in (classify, kserve, models, health):
        app.include_router(family.router)
    if settings.metrics_port is None:
        app.include_router(health.metrics_router)
    if settings.page:
        app.include_router(page.router)
    else:

        @app.get("/", include_in_schema=False)
        async def root() -> RedirectResponse:
            return RedirectResponse("/docs")

    return app
