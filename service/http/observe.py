"""Around every request: an id, a line in the log, metrics, and a span where traces are collected."""

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unperturb.service.telemetry.metrics import Metrics
from unperturb.service.telemetry.tracing import Tracing

log = logging.getLogger("unperturb.access")
ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
QUIET = ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready")


class Observe:
    """ASGI middleware. The id is the client's own `x-request-id` where it is a plain one, else a random one; it is in
    `scope["request_id"]` and the answer's header.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None) -> None:
        self.app, self.metrics, self.tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        scope["request_id"] = given.decode() if ID.fullmatch(given) else uuid.uuid4().hex
        status, started = 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", scope["request_id"].encode())]
            await send(message)

        began_at = time.time_ns()
        try:
            with self.metrics.in_progress.track_inprogress():
                await self.app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started, began_at)

    def _record(self, scope: Scope, status: int, seconds: float, began_at: int) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        preset = scope.get("preset") or "none"
        self.metrics.requests.labels(route, status, preset).inc()
        self.metrics.duration.labels(route).observe(seconds)
        if "rejected" in scope:
            self.metrics.rejected.labels(scope["rejected"]).inc()
        facts = {
            "request_id": scope["request_id"],
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "client": scope.get("client_name"),
            "preset": preset,
        }
        if scope["path"] not in QUIET:
            log.info("request", extra=facts)
        if self.tracing is not None:
            self.tracing.record(scope, facts, began_at)
