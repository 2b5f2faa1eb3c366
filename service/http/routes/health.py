"""Health and metrics."""

from typing import Any

from fastapi import APIRouter, Response

from unperturb.service.http import problem
from unperturb.service.http.dependencies import FOR_USERS, GatewayOfApp
from unperturb.service.telemetry.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])
metrics_router = APIRouter(tags=["health"])
UNAVAILABLE = problem.responses(503)
TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {}}, "description": "Prometheus's exposition format"}
}


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", responses=UNAVAILABLE)
async def healthz(gateway: GatewayOfApp) -> dict[str, str]:
    """Say whether the process can serve, now or after its warm-up; 503 when it must be restarted."""
    gateway.engine.lifecycle.require_alive()
    return {"status": "alive"}


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses=UNAVAILABLE)
async def readyz(gateway: GatewayOfApp) -> dict[str, str]:
    """Say whether requests are served; 503 before the warm-up, when stopping, and after a failure."""
    gateway.engine.lifecycle.require_ready()
    return {"status": "ready"}


@metrics_router.get(
    "/metrics",
    response_class=Response,
    responses={**TEXT, **problem.responses(401)},
    dependencies=[FOR_USERS],
)
async def metrics(gateway: GatewayOfApp) -> Response:
    """Return what Prometheus reads."""
    return Response(gateway.metrics.page(), media_type=CONTENT_TYPE)
