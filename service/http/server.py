"""Uvicorn with limits for each connection (`protocol`), and a SIGTERM that loses no request.

Then /readyz is 503 at once, while requests are still taken for `drain_s`, until every balancer has noticed; after that
new ones get 503, those in progress are finished, and the process ends with status 0. Every answer meanwhile closes its
connection.
"""

import asyncio
import logging
import math
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from wsgiref.simple_server import WSGIServer

import uvicorn
from fastapi import FastAPI
from prometheus_client import start_http_server

from unperturb.service.engine.engine import Engine
from unperturb.service.http.address import joined
from unperturb.service.http.gateway import Gateway
from unperturb.service.http.protocol import Protocol
from unperturb.service.settings import Settings

log = logging.getLogger("unperturb.service")
OTHER_FILES = 512  # beside connections: uploads that are spooled, decoders, workers, probes
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
                proxy_headers="FORWARDED_ALLOW_IPS"
                in os.environ,  # else a client behind one could name its own address
            )
        )
        self.engine: Engine = app.state.engine
        self.gateway: Gateway = app.state.gateway
        self.drain_s, self.grace_s = settings.drain_s, settings.grace_s
        self.drains_at = self.ends_at = math.inf  # on time.monotonic's clock
        self.failed = failed
        self.metrics_server: WSGIServer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does; serve the metrics on a port of their own where there is one."""
        settings = self.gateway.settings
        allow_files(settings.max_connections + OTHER_FILES)
        if settings.metrics_port is not None:
            try:
                self.metrics_server, _ = start_http_server(
                    settings.metrics_port, settings.host, self.gateway.metrics.registry
                )
            except OSError as error:
                where = f"{joined(settings.host, settings.metrics_port)} (UNPERTURB_METRICS_PORT)"
                raise OSError(error.errno, error.strerror, where) from error
        await super().startup(sockets)

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
        if self.metrics_server is not None:
            self.metrics_server.server_close()

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
