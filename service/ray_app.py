"""The same app under Ray Serve: `serve run unperturb.service.ray_app:app` (the extra `ray`).

A replica is one whole service: its own engine, limits and worker process, on a GPU of its own where there are GPUs.
Ray routes, scales and restarts; what may wait, and for how long, is still decided by the engine. Settings are the
service's own environment variables, and UNPERTURB_REPLICAS=2 or 1-8 (the least and the most; 1-4 by default). Since Ray
counts the requests in progress, not those refused, UNPERTURB_PATIENCE is twice the slots where it is not set. POST
/models changes one replica only: set UNPERTURB_CHECKPOINT instead.
"""

import os
import re
import time
from typing import Any

from fastapi import FastAPI
from ray import serve

from unperturb.models.errors import ConfigError
from unperturb.service.http.app import create_app
from unperturb.service.settings import Settings
from unperturb.service.telemetry import logs

TARGET_SHARE = 0.75  # of the slots: a replica is added when more requests than that are in progress on each


def replicas(text: str) -> tuple[int, int]:
    """Return the least and the most replicas; raise ConfigError for what is not N or N-M."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise ConfigError(f"UNPERTURB_REPLICAS={text!r} is not a number above 0, or two as in 1-8")
    return least, most


def build_app() -> FastAPI:
    """Return the app of one replica, in its process; Ray shows it one GPU, or none."""
    settings = Settings()
    changed: dict[str, Any] = (
        {} if "patience" in settings.model_fields_set else {"patience": 2.0 * settings.slots_in_all}
    )
    if settings.authentication == "auto":
        changed["authentication"] = "on"
    settings = settings.model_copy(update=changed)
    logs.set_up(level=settings.log_level, style=settings.log_format)
    return create_app(settings, on_failure=_end, warm_first=True)


def _end(_: str) -> None:
    """End the replica's process, which Ray then starts anew, once those who wait have been answered."""
    time.sleep(1.0)
    os._exit(1)


def build() -> serve.Application:
    """Return the deployment; raise ValidationError or ConfigError for a bad setting, before anything is started."""
    settings = Settings()
    if settings.authentication == "auto" and not settings.api_keys:
        raise ConfigError(
            "Ray decides on which address it listens, so clients need an API key, and none is set: put the pair that "
            "`unperturb key NAME` prints into UNPERTURB_API_KEYS, or set UNPERTURB_AUTHENTICATION=off"
        )
    if settings.metrics_port is not None:
        raise ConfigError("under Ray /metrics is on the service's own port; unset UNPERTURB_METRICS_PORT")
    least, most = replicas(os.environ.get("UNPERTURB_REPLICAS", "1-4"))
    on_gpu = any(device.type == "cuda" for device in settings.devices)
    slots = settings.slots if on_gpu else settings.slots_in_all  # a replica is given one GPU of this machine's
    deployment: serve.Deployment = serve.deployment(  # type: ignore[assignment]
        serve.ingress(build_app)(),
        name="unperturb",
        max_ongoing_requests=max(2 * slots, settings.max_in_progress),
        ray_actor_options={"num_gpus": 1} if on_gpu else {"num_cpus": 1},
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": max(1.0, TARGET_SHARE * slots),
        },
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=settings.grace_s,
    )
    return deployment.bind()


app = build()
