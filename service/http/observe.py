"""Around every request: an id and metrics; but for probes, a line in the log, and a span where traces are collected."""

import logging
import random
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unperturb.service.http.context import RequestContext
from unperturb.service.telemetry.metrics import Metrics
from unperturb.service.telemetry.tracing import Tracing

log = logging.getLogger("unperturb.access")
ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
QUIET = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class Observe:
    """Give every request a context, and record it at its end (ASGI middleware).

    The id is the client's own `x-request-id` where it is a plain one, else a random one; it is in the answer's header.
    Where the service is `ending`, the answer closes its connection, so that the next request goes elsewhere.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None, ending: Callable[[], bool]) -> None:
        self.app, self.metrics, self.tracing, self.ending = app, metrics, tracing, ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        context = RequestContext(given.decode() if ID.fullmatch(given) else f"{random.getrandbits(128):032x}")
        context.attach(scope)
        status, started = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                closing = [(b"connection", b"close")] if self.ending() else []
                message["headers"] = [*message["headers"], (b"x-request-id", context.request_id.encode()), *closing]
            await send(message)

        began_at = time.time_ns()
        try:
            with self.metrics.in_progress.track_inprogress():
                await self.app(scope, receive, send_with_id)
        finally:
            self._record(scope, context, status, time.perf_counter() - started, began_at)

    def _record(self, scope: Scope, context: RequestContext, status: int, seconds: float, began_at: int) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        model, preset = context.model or "none", context.preset or "none"
        labels = self.metrics.label(model), preset
        self.metrics.finished(route, status, *labels, seconds=seconds)
        if context.rejected is not None and scope["path"] not in QUIET:
            self.metrics.rejected.labels(context.rejected, *labels).inc()
        facts = {
            "request_id": context.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "client": context.client,
            "model": model,
            "preset": preset,
        }
        if scope["path"] not in QUIET:
            log.info("request", extra=facts)
            if self.tracing is not None:
                self.tracing.record(scope, facts, context.parts, began_at)
