"""The JSON answer of a classification, for the service and the command line."""

import base64
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field
from torch import Tensor

from unperturb.models.purifiers.reverse_attack import to_uint8
from unperturb.models.shapes import Float, UInt8
from unperturb.service.decoding.decode import Decoded
from unperturb.service.engine.messages import Outcome
from unperturb.service.engine.registry import Model
from unperturb.service.http.worth import PURPOSES, Worth, worth_of


class ModelName(BaseModel):
    """The checkpoint that answered."""

    id: str
    digest: str = Field(description="SHA-256 of the weights")


@dataclass(slots=True)  # an answer may have thousands, and a pydantic model takes four times as long to make
class Prediction:
    """One class and its softmax score."""

    index: int
    label: str
    score: Annotated[float, Field(ge=0, le=1)]


class Unpurified(BaseModel):
    """The classifier's answer for the image as it was received."""

    predictions: list[Prediction]


class Purification(BaseModel):
    """The purifier's work; all null but `applied` where it was not asked to. Distances in units of [0, 1].

    `applied` is false, too, where `purify=auto` left the image as it is. Losses are null for a preset without steps.
    """

    applied: bool
    preset: str | None = None
    steps: int | None = None
    views: int | None = Field(None, description="of each step")
    vote: int | None = Field(None, description="views whose scores are averaged; null: the image alone is classified")
    epsilon: float | None = None
    loss_before: float | None = Field(None, description="InfoNCE of the received image")
    loss_after: float | None = Field(None, description="InfoNCE of the purified image, on the same views")
    linf: float | None = Field(None, description="largest change of a channel of a pixel")
    changed_label: bool | None = None
    purpose: str | None = Field(None, description="what the preset is for, before whatever model")
    worth: Worth | None = Field(
        None, description="null where the preset, without a gate, was not judged before this model"
    )
    image: str | None = Field(None, description="the purified image as base64 PNG, where asked for")


class Size(BaseModel):
    """A width and a height in pixels."""

    width: int
    height: int


class Input(BaseModel):
    """The file as received; `resized_to` is null where it had the model's size."""

    width: int
    height: int
    mode: str = Field(description="Pillow's name of the pixel format")
    resized_to: Size | None


class Timings(BaseModel):
    """Milliseconds; purify and classify are those of the batch that the image was in."""

    decode: float
    queue: float
    purify: float
    classify: float
    total: float


class Answer(BaseModel):
    """The answer of POST /classify."""

    request_id: str
    model: ModelName
    predictions: list[Prediction]
    unpurified: Unpurified
    purification: Purification
    input: Input
    timings_ms: Timings


class Answers(BaseModel):
    """The answers to a list of images, in its order."""

    request_id: str
    answers: list[Answer]


def answer(
    outcome: Outcome,
    decoded: Decoded,
    model: Model,
    *,
    request_id: str,
    preset: str | None,
    gated: bool,
    top_k: int,
    return_image: bool,
    decode_ms: float,
    total_ms: float,
) -> Answer:
    """Return the answer for one image."""
    card = model.card
    predictions = top(outcome.scores, card.classes, top_k)
    unpurified = top(outcome.unpurified_scores, card.classes, top_k)
    changed = predictions[0].index != unpurified[0].index
    size = model.image_size
    image = None
    if return_image and preset is not None and outcome.image is not None:
        image = to_png(torch.from_numpy(outcome.image), pixels(decoded), epsilon=model.preset(preset).loop.epsilon)
    return Answer(
        request_id=request_id,
        model=ModelName(id=model.id, digest=card.weights_sha256),
        predictions=predictions,
        unpurified=Unpurified(predictions=unpurified),
        purification=_purification(outcome, preset, model, gated=gated, changed=changed, image=image),
        input=Input(
            width=decoded.width,
            height=decoded.height,
            mode=decoded.mode,
            resized_to=Size(width=size, height=size) if decoded.resized else None,
        ),
        timings_ms=Timings(
            decode=round(decode_ms, 3),
            queue=round(outcome.queue_ms, 3),
            purify=round(outcome.purify_ms, 3),
            classify=round(outcome.classify_ms, 3),
            total=round(total_ms, 3),
        ),
    )


def pixels(decoded: Decoded) -> Float[Tensor, "3 size size"]:
    """Return the received image in [0, 1]."""
    return torch.from_numpy(decoded.pixels).float() / 255


def top(scores: NDArray[np.float32], classes: tuple[str, ...], k: int) -> list[Prediction]:
    """Return the `k` highest scores, highest first."""
    order = np.argsort(-scores, kind="stable")[:k]
    highest = scores[order].clip(max=1).tolist()
    return [Prediction(index, classes[index], score) for index, score in zip(order.tolist(), highest, strict=True)]


def png(pixels: UInt8[Tensor, "3 h w"]) -> bytes:
    """Return the pixels as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def to_png(image: Float[Tensor, "3 h w"], received: Float[Tensor, "3 h w"], *, epsilon: float) -> bytes:
    """Return an image as an 8-bit PNG, within epsilon of the received one."""
    return png(to_uint8(image[None], received[None], epsilon=epsilon)[0])


def png16(image: Float[Tensor, "3 h w"]) -> bytes:
    """Return an image in [0, 1] as a PNG with 16 bits a channel, which Pillow cannot write.

    After W3C PNG, third edition, sections 5 and 11; no filter.
    """
    levels = (image.clamp(0, 1) * 65535).round().to(torch.int32)
    rows = levels.permute(1, 2, 0).contiguous().numpy().astype(">u2")
    height, width, _ = rows.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)  # bits, RGB, and no choice in the rest
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", data) + _png_chunk(b"IEND", b"")


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _purification(
    outcome: Outcome, preset: str | None, model: Model, *, gated: bool, changed: bool, image: bytes | None
) -> Purification:
    if preset is None:
        return Purification(applied=False)
    config = model.preset(preset)
    return Purification(
        applied=outcome.steps > 0 or not config.loop.steps,
        preset=preset,
        steps=outcome.steps,
        views=config.views if config.loop.steps else None,
        vote=None if config.vote is None else len(config.vote),
        epsilon=config.loop.epsilon,
        loss_before=outcome.loss_before,
        loss_after=outcome.loss_after,
        linf=outcome.linf,
        changed_label=changed,
        purpose=PURPOSES[preset],
        worth=None if gated else worth_of(model.card, preset),
        image=base64.b64encode(image).decode() if image is not None else None,
    )
