"""Uvicorn with limits for each connection (`protocol`), and a SIGTERM that loses no request.

Then /readyz is 503 at once, while requests are still taken for `drain_s`, until every balancer has noticed; after that
new ones get 503, those in progress are finished, and the process ends with status 0. Every answer meanwhile closes its
connection.
"""

import asyncio
import gc
import logging
import math
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.server import ServerState

from unperturb.service.engine.engine import Engine
from unperturb.service.http.address import taken
from unperturb.service.http.gateway import Gateway
from unperturb.service.http.protocol import Protocol
from unperturb.service.settings import Settings
from unperturb.service.telemetry.metrics import CONTENT_TYPE

log = logging.getLogger("unperturb.service")
OTHER_FILES = 512  # beside connections: those of the metrics' port, decoders, workers
METRICS_CONNECTIONS = 64
LAST_S = 2  # for the answers to what is refused at the end of the grace period


class Server(uvicorn.Server):
    """Ends on SIGTERM within the grace period, without losing a request; on SIGINT without waiting for new ones.

    It also ends once `failed` holds the reason why the app can never serve again; the process's status is then not to
    be 0.
    """

    def __init__(self, app: FastAPI, settings: Settings, failed: list[str]) -> None:
        class LimitedProtocol(Protocol):
            header_timeout_s, write_timeout_s = settings.header_timeout_s, settings.upload_timeout_s
            max_connections = settings.max_connections

        class MetricsProtocol(LimitedProtocol):
            max_connections = METRICS_CONNECTIONS

        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=LimitedProtocol,
                ws="none",
                loop="uvloop",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,
                proxy_headers="FORWARDED_ALLOW_IPS"
                in os.environ,  # else a client behind one could name its own address
            )
        )
        self.engine: Engine = app.state.engine
        self.gateway: Gateway = app.state.gateway
        self.drain_s, self.grace_s = settings.drain_s, settings.grace_s
        self.drains_at = self.ends_at = math.inf  # on time.monotonic's clock
        self.failed = failed
        self.metrics_protocol = MetricsProtocol
        self.held = ExitStack()
        self.metrics_servers: list[asyncio.Server] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does; serve the metrics on a port of their own where there is one."""
        settings = self.gateway.settings
        allow_files(settings.max_connections + OTHER_FILES)
        if settings.metrics_port is not None:
            await self._serve_metrics(settings.host, settings.metrics_port)
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what has been loaded stays: looking through it again and again is a tenth of a request's cost

    async def _serve_metrics(self, host: str, port: int) -> None:
        """Listen there, with the limits of every connection and a count of its own."""
        try:
            sockets = self.held.enter_context(taken(host, port))
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{error.filename} (UNPERTURB_METRICS_PORT)") from error
        page = Route("/metrics", lambda _: Response(self.gateway.metrics.page(), media_type=CONTENT_TYPE))
        config = uvicorn.Config(
            Starlette(routes=[page]), http=self.metrics_protocol, ws="none", log_config=None, access_log=False
        )
        state = ServerState()
        for one in sockets:
            self.metrics_servers.append(
                await asyncio.get_running_loop().create_server(
                    lambda: self.metrics_protocol(config, state, app_state={}), sock=one
                )
            )

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ten times a second."""
        now = time.monotonic()
        if now >= self.drains_at:
            self.engine.lifecycle.drain()
            if not self.server_state.tasks or now >= self.ends_at:
                self.should_exit = True
        return bool(self.failed) or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does; refuse, with a reason, what is in progress at the end of the grace period."""
        left_s = min(self.grace_s, max(0.0, self.ends_at - time.monotonic()))
        self.config.timeout_graceful_shutdown = round(left_s) + LAST_S
        timer = asyncio.get_running_loop().call_later(left_s, self.engine.refuse_rest)
        await super().shutdown(sockets)
        timer.cancel()
        for server in self.metrics_servers:
            server.close()
        self.held.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second signal ends at once."""
        if self.ends_at < math.inf:
            self.should_exit = self.force_exit = True
            return
        wait_s = self.drain_s if sig == signal.SIGTERM and self.engine.lifecycle.not_ready is None else 0.0
        self.engine.lifecycle.leave()
        now = time.monotonic()
        self.drains_at, self.ends_at = now + wait_s, now + self.grace_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals as uvicorn does, but do not raise them again at the end: the status would be a kill's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def allow_files(count: int) -> None:
    """Let this process open so many files, where it may; say so where it may not: connections are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if resource.RLIM_INFINITY != soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < count:
        log.warning("%d files may be open, fewer than UNPERTURB_MAX_CONNECTIONS needs (%d)", allowed, count)
