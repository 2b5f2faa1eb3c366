"""Dependencies of the route handlers: the gateway, and the client's API key, declared in the OpenAPI document."""

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from unperturb.service import keys
from unperturb.service.http.gateway import Gateway

# They declare the two forms of the key; KeyRing decides whether one is needed, and whether it is known.
BEARER = HTTPBearer(scheme_name="bearer", description="an API key, where the service asks for one", auto_error=False)
HEADER = APIKeyHeader(name="X-API-Key", scheme_name="header", description="the same key", auto_error=False)


async def find_gateway(request: Request) -> Gateway:
    """Return the gateway of the app that handles the request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayOfApp = Annotated[Gateway, Depends(find_gateway)]


async def read_key(
    request: Request, _bearer: Annotated[object, Security(BEARER)], _header: Annotated[object, Security(HEADER)]
) -> str | None:
    """Return the API key that the request presents, or None."""
    return keys.presented(request)


Key = Annotated[str | None, Depends(read_key)]


async def require_user(gateway: GatewayOfApp, key: Key) -> None:
    """Raise UnauthorizedError for an unknown key, or for none where one is required."""
    gateway.keys.user(key)


async def require_admin(gateway: GatewayOfApp, key: Key) -> None:
    """Raise UnauthorizedError or ForbiddenError for any key but an administrator's."""
    gateway.keys.admin(key)


FOR_USERS, FOR_ADMINS = Depends(require_user), Depends(require_admin)
