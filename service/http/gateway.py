"""Guard every route that computes: authentication, limits, deadlines, and an end when the client has gone."""

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from unperturb.models.checkpoints.card import GATE_SEED, clean_loss_of
from unperturb.service.decoding.decode import Decoded
from unperturb.service.decoding.decoders import Decoders
from unperturb.service.engine.engine import Engine
from unperturb.service.engine.messages import Outcome
from unperturb.service.engine.registry import Model
from unperturb.service.errors import DeadlineError, MalformedRequestError, RequestError, UploadTimeoutError
from unperturb.service.http.context import RequestContext
from unperturb.service.http.limits import Limits
from unperturb.service.http.upload import Upload, is_json, read_images
from unperturb.service.settings import Settings, cores
from unperturb.service.telemetry.metrics import Metrics
from unperturb.service.telemetry.tracing import Part

T = TypeVar("T")
Timeout = Annotated[
    float | None,
    Header(alias="x-timeout-s", gt=0, allow_inf_nan=False, description="seconds after which nobody waits; past it 504"),
]


@dataclass(frozen=True)
class Ticket:
    """One admitted request: its client, its deadline on time.monotonic's clock, and when it came.

    patient: the deadline is the client's own
    """

    request: Request
    context: RequestContext
    client: str
    deadline: float
    patient: bool
    started: float

    @property
    def spent_ms(self) -> float:
        """Return the milliseconds since the request's head."""
        return (time.perf_counter() - self.started) * 1000


class Gateway:
    """The gate between the routes and the engine."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings, self.engine, self.metrics = settings, engine, metrics
        self.keys = settings.keys
        self.decoders = Decoders(count=settings.decoders or cores(), timeout_s=settings.decode_timeout_s)
        self.limits = Limits(per_client=settings.max_per_client, total=settings.max_in_progress)
        self.changing_models = asyncio.Lock()

    @contextmanager
    def admit(
        self, request: Request, key: str | None, timeout_s: float | None, target: tuple[str | None, str | None] | None
    ) -> Iterator[Ticket]:
        """Admit one request, counted as one image until its number is known (`count`).

        target: the model's id and the images' stage, where the request's head says which

        Raises UnauthorizedError, TooManyRequestsError, and NotReadyError where the engine could not take it now: better
        before its body is read and decoded than after.
        """
        started = time.perf_counter()
        user = self.keys.user(key)
        client = f"key {user}" if user is not None else (request.client.host if request.client else "unknown")
        context = RequestContext.of(request.scope)
        context.client = client
        left_s, patient = min(timeout_s or math.inf, self.settings.timeout_s), timeout_s is not None
        deadline = time.monotonic() + left_s
        id, stage = target or (None, self.settings.preset)
        models = self.engine.models
        model = models.by_id.get(id or models.default_id) if target else None
        context.model, context.preset = (None, None) if model is None else (model.id, stage)
        self.engine.dispatcher.refuse_if_full(model, stage, client, left_s=left_s, patient=patient)
        with self.limits.hold(client, 1):
            yield Ticket(request, context, client, deadline, patient, started)

    def count(self, ticket: Ticket, images: int) -> AbstractContextManager[None]:
        """Count a request as its number of images; raise TooManyRequestsError or NotReadyError past a limit."""
        return self.limits.hold(ticket.client, images - 1)

    async def read(self, ticket: Ticket) -> Upload:
        """Return the files of the request."""
        limits = self.settings
        with self.uploading(ticket) as upload_s:
            return await read_images(
                ticket.request, max_bytes=limits.max_body_bytes, max_images=limits.max_images, timeout_s=upload_s
            )

    @contextmanager
    def uploading(self, ticket: Ticket) -> Iterator[float]:
        """Give the seconds that the body may take; DeadlineError where it is the deadline that has ended them."""
        left_s, limit_s = max(0.0, ticket.deadline - time.monotonic()), self.settings.upload_timeout_s
        try:
            yield min(left_s, limit_s)
        except UploadTimeoutError as error:
            if left_s < limit_s:
                raise DeadlineError("the deadline passed before the body was there") from error
            raise

    async def read_one(self, ticket: Ticket) -> Upload:
        """Return the one file of a request that takes no list; raise MalformedRequestError for a list."""
        upload = await self.read(ticket)
        if upload.many or is_json(ticket.request):
            raise MalformedRequestError("this route takes one image, as a field `image` or as the body itself")
        return upload

    async def decode(self, ticket: Ticket, upload: Upload, model: Model) -> list[Decoded]:
        """Return the pixels of every file, at the model's size; an error names which of several files it is."""
        ticket.context.model = model.id

        async def one(i: int, payload: bytes) -> Decoded:
            try:
                return await self.decoders.decode(
                    payload, model.card.pictures, max_pixels=self.settings.max_pixels, client=ticket.client
                )
            except RequestError as error:
                raise (type(error)(f"image {i}: {error}") if upload.many else error) from error

        tasks = [asyncio.create_task(one(i, payload)) for i, payload in enumerate(upload.files)]
        try:
            return await self._while_waited_for(ticket, "decode", asyncio.gather(*tasks))
        finally:  # where one is refused, those that still wait for a process are decoded for nobody
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def run(
        self,
        ticket: Ticket,
        model: Model,
        images: Sequence[NDArray[Any]],
        *,
        stage: str | None,
        seed: int,
        wants_image: bool = False,
        begun: bool = False,
        gate: float | None = None,
        counted: bool = True,
    ) -> list[Outcome]:
        """Run images through the engine, each with the seed; `begun` and `gate` are those of Dispatcher.submit.

        counted: in the metrics of answered images; not what the page attacks itself
        """
        ticket.context.model = model.id
        work = self.engine.dispatcher.submit(
            model,
            images,
            stage=stage,
            seeds=[seed] * len(images),
            deadline=ticket.deadline,
            wants_image=wants_image,
            begun=begun,
            gate=gate,
            client=ticket.client,
            patient=ticket.patient,
        )
        outcomes = await self._while_waited_for(ticket, stage or "classify", work)
        if not counted:
            return outcomes
        model.answered += len(outcomes)
        for outcome in outcomes:
            self.metrics.answered(outcome, model=model.id, preset=stage)
            clean = clean_loss_of(model.card, stage) if seed == GATE_SEED else None
            if stage is not None and clean is not None and outcome.losses:
                self.metrics.drift.observe((model.id, model.number), stage, outcome.losses[0], clean)
        return outcomes

    async def _while_waited_for(
        self, ticket: Ticket, name: str, work: "Coroutine[Any, Any, T] | asyncio.Future[T]"
    ) -> T:
        """Return the result of `work`, and cancel it when its client goes (ClientDisconnect) or the deadline passes."""
        began_at = time.time_ns()
        task = asyncio.ensure_future(work)
        watcher = asyncio.create_task(_gone(ticket.request))
        try:
            left_s = max(0.0, ticket.deadline - time.monotonic())
            await asyncio.wait({task, watcher}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise (
                ClientDisconnect if watcher.done() else DeadlineError("the deadline passed before the answer was there")
            )
        finally:
            ticket.context.parts.append(Part(name, began_at, time.time_ns()))
            for pending in (task, watcher):
                pending.cancel()
            await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
