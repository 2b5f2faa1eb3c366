"""The FastAPI app: `create_app(settings)`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from service import problem, tracing
from service.engine import Engine
from service.gateway import Gateway
from service.loaded import LoadedModel
from service.metrics import Metrics
from service.observe import Observe
from service.routes import classify, health, kserve, models, page
from service.settings import Settings
from service.threads import aside
from service.version import VERSION


def create_app(settings: Settings | None = None, *, on_failure: Callable[[str], None] | None = None) -> FastAPI:
    """The service; loads the checkpoint (CheckpointError says what is wrong with it), warms up after start.

    on_failure is called, from a thread, when the service can never serve again and its process should be restarted.
    """
    settings = settings or Settings()
    tracer = tracing.set_up()
    metrics = Metrics()
    engine = Engine(
        aside(lambda: LoadedModel(settings.checkpoint, id=None, devices=settings.devices)),
        devices=settings.devices,
        max_batch=settings.slots,
        max_queue=settings.max_queue,
        max_wait_s=settings.max_wait_s,
        stall_s=settings.stall_s,
        pad=settings.pads,
        threads=settings.threads or torch.get_num_threads(),
        metrics=metrics,
        on_failure=on_failure,
    )
    metrics.watch(
        queue_length=lambda: len(engine.queue), slots_in_use=lambda: engine.queue.in_slots, devices=engine.devices
    )
    gateway = Gateway(settings, engine, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(1)  # of this thread
        await gateway.decoders.start()
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, settings.grace_s)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="unperturb",
        summary="Purifies an image by a reverse attack, then classifies it.",
        version=VERSION,
        lifespan=lifespan,
    )
    app.state.engine, app.state.gateway = engine, gateway
    app.add_middleware(Observe, metrics=metrics, tracing=tracer)
    problem.install(app)
    for family in (classify, kserve, models, health):
        app.include_router(family.router(gateway))
    if settings.page:
        app.include_router(page.router(gateway))
    else:

        @app.get("/", include_in_schema=False)
        async def root() -> RedirectResponse:
            return RedirectResponse("/docs")

    return app
