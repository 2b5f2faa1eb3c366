"""Refuse what the engine cannot take before the framework looks at it: under overload most requests end here."""

import functools

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from unperturb.service import keys
from unperturb.service.errors import NotReadyError, RequestError, TooManyRequestsError
from unperturb.service.http import problem
from unperturb.service.http.gateway import Gateway, Timeout
from unperturb.service.http.routes import classify
from unperturb.service.http.routes.parameters import Classify

TIMEOUT: TypeAdapter[float | None] = TypeAdapter(Timeout)
(ROUTE,) = (
    route for route in classify.router.routes if isinstance(route, APIRoute) and route.endpoint is classify.classify
)


class RefuseEarly:
    """Answer 429 or 503 to a POST /classify that would get it from its route (ASGI middleware).

    A request that has another fault as well is left to the route, which says so.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self.app, self.gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == ROUTE.path:
            request = Request(scope)
            error = self._error(request)
            if error is not None:
                scope["route"] = ROUTE
                await problem.refused(request, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _error(self, request: Request) -> RequestError | None:
        try:
            query = _options(request.scope["query_string"])
            timeout_s = TIMEOUT.validate_python(request.headers.get("x-timeout-s"))
            target = classify.target_of(request, query, self.gateway.settings.preset)
            with self.gateway.admit(request, keys.presented(request), timeout_s, target):
                return None
        except (NotReadyError, TooManyRequestsError) as error:
            return error.with_traceback(None)  # its frames lead back to who holds it: a cycle
        except (ValidationError, RequestError):
            return None


@functools.lru_cache(maxsize=256)
def _options(query: bytes) -> Classify:
    """Return the options in a query; most requests have one that others had. Raises ValidationError."""
    return Classify.model_validate(dict(QueryParams(query)))
