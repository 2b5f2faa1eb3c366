"""Errors as RFC 9457 problem+json, in one place."""

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from models.errors import ConfigError, RequestError

log = logging.getLogger("unperturb.service")
RETRY_AFTER_S = "1"


class Problem(BaseModel):
    """RFC 9457, section 3.1; `type` is about:blank, so `title` is the status's name."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str


def problem(request: Request, status: int, detail: str) -> JSONResponse:
    """The answer of an error."""
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        request_id=request.scope.get("request_id", ""),
    )
    headers = {"Retry-After": RETRY_AFTER_S} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    return JSONResponse(body.model_dump(), status, headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Map every exception to its problem; a 500 shows no exception text."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        return problem(request, error.status, str(error))

    async def out_of_range(request: Request, error: Exception) -> JSONResponse:
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, str(error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        faults = [f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()]
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(faults))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = problem(request, error.status_code, error.detail)
        answer.headers.update(error.headers or {})
        return answer

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("request %s failed", request.scope.get("request_id"), exc_info=error)
        return problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error; the service's log has it")

    for kind, handler in (
        (RequestError, refused), (ConfigError, out_of_range), (RequestValidationError, invalid),
        (HTTPException, http), (Exception, unexpected),
    ):  # fmt: skip
        app.add_exception_handler(kind, handler)
