"""`python -m unperturb.benchmarks.serving.peers.litserve_server PORT`: LitServe's dynamic batching, measured."""

import sys
from typing import Any

import litserve
import torch
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from unperturb.benchmarks.serving.peers.shared import BATCH_WAIT_S, MAX_BATCH, QUEUE, WITHIN_S, PeerModel


class Bounded:
    """Answer 503 where as many requests are in progress as a batch and the queue take: LitServe has no bound."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.held = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self.held >= MAX_BATCH + QUEUE:
            await PlainTextResponse("full", 503)(scope, receive, send)
        else:
            self.held += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.held -= 1


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Decode, then batch, then predict, as LitServe's documentation shows it."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.model = PeerModel()

    def decode_request(self, request: dict[str, Any]) -> tuple[torch.Tensor, str]:
        """Return one request's image."""
        return self.model.read(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Keep images and presets together."""
        return list(inputs)

    def predict(self, batch: list[Any]) -> list[dict[str, Any]]:
        """Return a batch's answers."""
        return self.model.answer(batch)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one answer for each request."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the answer as JSON."""
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Api(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S), timeout=WITHIN_S, middlewares=[Bounded]
    )
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
