"""Errors as RFC 9457 problem+json, in one place."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from unperturb.models.errors import CheckpointError, ConfigError
from unperturb.service.errors import RequestError
from unperturb.service.http.context import RequestContext

log = logging.getLogger("unperturb.service")
MEDIA_TYPE = "application/problem+json"
KSERVE = "/v2/"  # its protocol's errors are application/json: its own client shows the message of no other
FAULTS_SHOWN, DETAIL_CHARACTERS = 8, 1000  # what a client has sent is not sent back at any length
CLIENT_CLOSED_REQUEST = 499  # the number that nginx gives a request whose client left


class Problem(BaseModel):
    """RFC 9457, section 3.1; `type` is about:blank, so `title` is the status's name."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI of these errors."""
    return {status: {"model": Problem, "content": {MEDIA_TYPE: {}}} for status in statuses}


def problem(request: Request, status: int, detail: str, *, retry_after_s: int | None = None) -> JSONResponse:
    """Return the answer to an error.

    Under /v2/ it has the member `error` that KServe's clients read, as application/json where problem+json is not asked
    for.
    """
    if len(detail) > DETAIL_CHARACTERS:
        detail = f"{detail[:DETAIL_CHARACTERS]} …"
    body = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        request_id=RequestContext.of(request.scope).request_id,
    ).model_dump()
    media_type = MEDIA_TYPE
    if request.scope["path"].startswith(KSERVE):
        body["error"] = detail
        media_type = MEDIA_TYPE if MEDIA_TYPE in request.headers.get("accept", "") else "application/json"
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status, headers, media_type=media_type)


def refused(request: Request, error: RequestError) -> JSONResponse:
    """Return the answer to a request that is refused, and note in its context why."""
    RequestContext.of(request.scope).rejected = type(error).__name__.removesuffix("Error")
    return problem(request, error.status, str(error), retry_after_s=error.retry_after_s)


def install(app: FastAPI) -> None:
    """Map every exception to its problem; a 500 shows no exception text."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        return refused(request, error)

    async def out_of_range(request: Request, error: Exception) -> JSONResponse:
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, str(error))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        RequestContext.of(request.scope).rejected = "Invalid"
        faults = [f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors()[:FAULTS_SHOWN]]
        return problem(request, HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(faults))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = problem(request, error.status_code, error.detail)
        answer.headers.update(error.headers or {})
        return answer

    async def gone(request: Request, _: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)  # for the log alone: nobody reads it

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        request_id = RequestContext.of(request.scope).request_id
        log.error("request failed", exc_info=error, extra={"request_id": request_id})
        answer = problem(request, HTTPStatus.INTERNAL_SERVER_ERROR, "an unexpected error; the service's log has it")
        answer.headers["x-request-id"] = request_id  # this one is sent outside of Observe
        return answer

    for kind, handler in (
        (RequestError, refuse),
        (ConfigError, out_of_range),
        (CheckpointError, out_of_range),
        (RequestValidationError, invalid),
        (HTTPException, http),
        (ClientDisconnect, gone),
        (Exception, unexpected),
    ):
        app.add_exception_handler(kind, handler)
