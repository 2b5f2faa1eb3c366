"""POST /classify and POST /purify."""

import asyncio
import time
from functools import partial
from typing import Annotated, Literal

import torch
from fastapi import APIRouter, Query, Request, Response

from unperturb.models.errors import ConfigError
from unperturb.models.purifiers.reverse_attack import changing
from unperturb.service.errors import UnprocessableError
from unperturb.service.http import problem
from unperturb.service.http.answer import Answer, Answers, answer, pixels, png16, to_png
from unperturb.service.http.context import RequestContext
from unperturb.service.http.dependencies import GatewayOfApp, Key
from unperturb.service.http.gateway import Timeout
from unperturb.service.http.routes.parameters import Classify, Purify
from unperturb.service.http.upload import body_schema, is_json

INLINE = 500  # classes in all of a request's answers; to make more takes longer than to change to a thread


class PurifyImage(Purify):
    """The purifier's options, and the form of the image."""

    bits: Literal["8", "16"] = "8"


router = APIRouter(responses=problem.responses(400, 401, 408, 413, 415, 422, 429, 503, 504))


def target_of(request: Request, query: Classify, default: str) -> tuple[str | None, str | None] | None:
    """Return the model and the stage that a request's head asks for; None where JSON may name others."""
    return None if is_json(request) else (query.model, query.stage(default))


@router.post(
    "/classify",
    response_model=Answer | Answers,
    openapi_extra={"requestBody": body_schema(Classify, many=True)},
    responses=problem.responses(404),
)
async def classify(
    request: Request,
    gateway: GatewayOfApp,
    key: Key,
    query: Annotated[Classify, Query()],
    timeout_s: Timeout = None,
) -> Response:
    """Purify one image, or each of a list, classify it, and say what the purifier changed."""
    default = gateway.settings.preset
    with gateway.admit(request, key, timeout_s, target_of(request, query, default)) as ticket:
        upload = await gateway.read(ticket)
        wanted = query.updated(upload)
        preset = wanted.stage(default)
        ticket.context.preset = preset
        with (
            gateway.count(ticket, len(upload.files)),
            gateway.engine.models.use(wanted.model) as model,
        ):
            model.require(preset)
            top_k, gate = wanted.classes(model), wanted.gate(model, default)
            read = time.perf_counter()
            decoded = await gateway.decode(ticket, upload, model)
            decode_ms = (time.perf_counter() - read) * 1000
            outcomes = await gateway.run(
                ticket,
                model,
                [one.pixels for one in decoded],
                stage=preset,
                seed=wanted.seed,
                wants_image=wanted.return_image,
                gate=gate,
            )
        one_answer = partial(
            answer,
            model=model,
            request_id=ticket.context.request_id,
            preset=preset,
            gated=gate is not None,
            top_k=top_k,
            return_image=wanted.return_image,
            decode_ms=decode_ms,
            total_ms=ticket.spent_ms,
        )

        def body() -> str:
            answers = [one_answer(*pair) for pair in zip(outcomes, decoded, strict=True)]
            many = Answers(request_id=ticket.context.request_id, answers=answers)
            return (many if upload.many else answers[0]).model_dump_json()

        takes_long = wanted.return_image or top_k * len(outcomes) > INLINE
        return Response(await asyncio.to_thread(body) if takes_long else body(), media_type="application/json")


@router.post(
    "/purify",
    response_class=Response,
    openapi_extra={"requestBody": body_schema(PurifyImage, many=False)},
    responses={200: {"content": {"image/png": {}}, "description": "The purified image"}, **problem.responses(404)},
)
async def purify(
    request: Request,
    gateway: GatewayOfApp,
    key: Key,
    query: Annotated[PurifyImage, Query()],
    timeout_s: Timeout = None,
) -> Response:
    """Return the purified image itself, at the model's size, for a classifier of your own."""
    default = gateway.settings.preset
    with gateway.admit(request, key, timeout_s, (query.model, query.preset or default)) as ticket:
        upload = await gateway.read_one(ticket)
        query = query.updated(upload)
        preset = RequestContext.of(request.scope).preset = query.preset or default
        try:
            changing(preset)
        except ConfigError as error:
            raise UnprocessableError(str(error)) from error
        with gateway.engine.models.use(query.model) as model:
            model.require(preset)
            (decoded,) = await gateway.decode(ticket, upload, model)
            (outcome,) = await gateway.run(
                ticket, model, [decoded.pixels], stage=preset, seed=query.seed, wants_image=True
            )
    assert outcome.image is not None
    epsilon = model.preset(preset).loop.epsilon
    as_png = png16 if query.bits == "16" else partial(to_png, received=pixels(decoded), epsilon=epsilon)
    return Response(
        await asyncio.to_thread(as_png, torch.from_numpy(outcome.image)),
        media_type="image/png",
        headers={
            "x-model-id": model.id,
            "x-purification-linf": f"{outcome.linf:.6f}",
            **({} if outcome.loss_before is None else {"x-loss-before": f"{outcome.loss_before:.6f}"}),
            **({} if outcome.loss_after is None else {"x-loss-after": f"{outcome.loss_after:.6f}"}),
        },
    )
