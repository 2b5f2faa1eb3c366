"""Health and metrics."""

from typing import Any

from fastapi import APIRouter, Request, Response

from unperturb.service.errors import NotReadyError
from unperturb.service.http import problem
from unperturb.service.http.gateway import Gateway
from unperturb.service.telemetry.metrics import CONTENT_TYPE


def router(gateway: Gateway) -> APIRouter:
    """What orchestrators and Prometheus ask."""
    routes = APIRouter(tags=["health"])
    unavailable = problem.responses(503)

    @routes.get("/healthz", responses=unavailable)
    async def healthz() -> dict[str, str]:
        """The process can serve, now or after its warm-up; 503 when it must be restarted."""
        if gateway.engine.failure is not None:
            raise NotReadyError(gateway.engine.not_ready or "")
        return {"status": "alive"}

    @routes.get("/readyz", responses=unavailable)
    async def readyz() -> dict[str, str]:
        """Requests are served; 503 before the warm-up, when stopping, and after a failure."""
        if (reason := gateway.engine.not_ready) is not None:
            raise NotReadyError(reason)
        return {"status": "ready"}

    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {}}, "description": "Prometheus's exposition format"}
    }

    @routes.get("/metrics", response_class=Response, responses={**text, **problem.responses(401)})
    async def metrics(request: Request) -> Response:
        """What Prometheus reads."""
        gateway.keys.user(request)
        return Response(gateway.metrics.page(), media_type=CONTENT_TYPE)

    return routes
