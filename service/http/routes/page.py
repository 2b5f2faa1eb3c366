"""The web page at /, and POST /inspect behind it: attack an image, purify it, and see what happened."""

import asyncio
import base64
import contextlib
from pathlib import Path
from typing import Annotated

import torch
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.routing import Mount
from torch import Tensor

from unperturb.models.purifiers.reverse_attack import to_uint8
from unperturb.models.shapes import UInt8
from unperturb.service.decoding.decode import Decoded
from unperturb.service.engine.messages import Outcome
from unperturb.service.engine.registry import Model
from unperturb.service.engine.stages import ATTACK, ATTACK_LOOP
from unperturb.service.http import problem
from unperturb.service.http.answer import ModelName, Prediction, pixels, png, to_png, top
from unperturb.service.http.context import RequestContext
from unperturb.service.http.dependencies import GatewayOfApp, Key
from unperturb.service.http.gateway import Timeout
from unperturb.service.http.routes.parameters import Purify
from unperturb.service.http.upload import body_schema

PAGE = Path(__file__).resolve().parents[2] / "assets" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Inspect(Purify):
    """The purifier's options, and whether the image is attacked first."""

    attack: bool = Field(False, description="PGD-10 at 8/255 on the bare classifier, away from its own prediction")


class Seen(BaseModel):
    """An image at one point of its way: a PNG in base64, and what the classifier says of it."""

    image: str
    predictions: list[Prediction]


class Inspection(BaseModel):
    """An image before and after an attack and its purification; distances in units of [0, 1]."""

    request_id: str
    model: ModelName
    preset: str
    original: Seen
    attacked: Seen | None
    purified: Seen
    epsilon_attack: float
    epsilon: float
    linf: float
    losses: list[float] = Field(description="InfoNCE before each step, each on views of its own")
    loss_before: float | None = Field(
        description="InfoNCE before purification, on new views where the preset draws them; null without steps"
    )
    loss_after: float | None = Field(description="and after it, on the same views")
    vote: int | None = Field(description="views whose scores are averaged; null: the image alone is classified")
    timings_ms: dict[str, float]


router = APIRouter()


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def page() -> Response:
    """Return the page, which may load nothing from elsewhere."""
    return FileResponse(
        PAGE / "index.html", headers={"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
    )


@router.post(
    "/inspect",
    openapi_extra={"requestBody": body_schema(Inspect, many=False)},
    responses=problem.responses(400, 401, 404, 408, 413, 415, 422, 429, 503, 504),
)
async def inspect(
    request: Request,
    gateway: GatewayOfApp,
    key: Key,
    query: Annotated[Inspect, Query()],
    timeout_s: Timeout = None,
) -> Inspection:
    """Attack an image (where asked to), purify it, and show every image, score and loss on the way."""
    default = gateway.settings.preset
    with contextlib.ExitStack() as held:
        ticket = held.enter_context(gateway.admit(request, key, timeout_s, (query.model, query.preset or default)))
        upload = await gateway.read_one(ticket)
        query = query.updated(upload)
        preset = RequestContext.of(request.scope).preset = query.preset or default
        model = held.enter_context(gateway.engine.models.use(query.model))
        model.require(preset)
        (decoded,) = await gateway.decode(ticket, upload, model)
        decode_ms = ticket.spent_ms
        image, attack = torch.from_numpy(decoded.pixels), None
        if query.attack:
            (attack,) = await gateway.run(
                ticket, model, [decoded.pixels], stage=ATTACK, seed=query.seed, wants_image=True, counted=False
            )
            assert attack.image is not None
            attacked, received = torch.from_numpy(attack.image), pixels(decoded)
            image = to_uint8(attacked[None], received[None], epsilon=ATTACK_LOOP.epsilon)[0]
        (outcome,) = await gateway.run(
            ticket,
            model,
            [image.numpy()],
            stage=preset,
            seed=query.seed,
            wants_image=True,
            begun=attack is not None,
            counted=attack is None,
        )
        return await asyncio.to_thread(
            _inspection,
            model,
            preset,
            decoded,
            attack,
            image,
            outcome,
            request_id=ticket.context.request_id,
            timings_ms={
                "decode": decode_ms,
                **({"attack": _total_ms(attack)} if attack is not None else {}),
                "queue": outcome.queue_ms,
                "purify": outcome.purify_ms,
                "classify": outcome.classify_ms,
                "total": ticket.spent_ms,
            },
        )


router.routes.append(Mount("/page", StaticFiles(directory=PAGE), name="page"))


def _total_ms(outcome: Outcome) -> float:
    return outcome.queue_ms + outcome.purify_ms + outcome.classify_ms


def _inspection(
    model: Model,
    preset: str,
    decoded: Decoded,
    attack: Outcome | None,
    image: UInt8[Tensor, "3 size size"],
    outcome: Outcome,
    *,
    request_id: str,
    timings_ms: dict[str, float],
) -> Inspection:
    """Return every image, score and loss; `image` is the one that was purified."""
    assert outcome.image is not None
    assert outcome.linf is not None
    classes, count = model.card.classes, min(5, len(model.card.classes))
    config = model.preset(preset)
    epsilon, vote = config.loop.epsilon, config.vote
    purified = to_png(torch.from_numpy(outcome.image), image.float() / 255, epsilon=epsilon)
    received = (outcome if attack is None else attack).unpurified_scores
    return Inspection(
        request_id=request_id,
        model=ModelName(id=model.id, digest=model.card.weights_sha256),
        preset=preset,
        original=_seen(png(torch.from_numpy(decoded.pixels)), top(received, classes, count)),
        attacked=None if attack is None else _seen(png(image), top(outcome.unpurified_scores, classes, count)),
        purified=_seen(purified, top(outcome.scores, classes, count)),
        epsilon_attack=ATTACK_LOOP.epsilon,
        epsilon=epsilon,
        linf=outcome.linf,
        losses=list(outcome.losses),
        loss_before=outcome.loss_before,
        loss_after=outcome.loss_after,
        vote=None if vote is None else len(vote),
        timings_ms=timings_ms,
    )


def _seen(payload: bytes, predictions: list[Prediction]) -> Seen:
    return Seen(image=base64.b64encode(payload).decode(), predictions=predictions)
