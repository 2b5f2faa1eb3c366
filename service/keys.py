"""API keys: `name:sha256` pairs in the settings, checked in constant time."""

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

from starlette.requests import HTTPConnection

from unperturb.service.errors import ForbiddenError, UnauthorizedError

PAIR = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<digest>[0-9a-f]{64})")


class KeyRing(NamedTuple):
    """Digests by name, for users and for administrators; a request may do nothing without a key if `required`."""

    users: dict[str, str]
    admins: dict[str, str]
    required: bool

    def user(self, key: str | None) -> str | None:
        """Return the name of a request's key, or None where none is needed; raise UnauthorizedError otherwise."""
        name = None if key is None else match(key, self.users) or match(key, self.admins)
        if name is None and (self.required or key is not None):
            raise UnauthorizedError(
                "no API key: send `Authorization: Bearer KEY`" if key is None else "the API key is not known here"
            )
        return name

    def admin(self, key: str | None) -> str:
        """Return the name of a request's administrator key; raise UnauthorizedError or ForbiddenError otherwise."""
        if not self.admins:
            raise ForbiddenError("no administrator key is set; UNPERTURB_ADMIN_KEYS takes name:sha256 pairs")
        if key is None:
            raise UnauthorizedError("no API key: send `Authorization: Bearer KEY` with an administrator's key")
        name = match(key, self.admins)
        if name is None:
            raise ForbiddenError("this API key is not an administrator's")
        return name


def new_key(name: str) -> tuple[str, str]:
    """Return a random key of 256 bits, and the `name:sha256` pair for the settings."""
    key = secrets.token_urlsafe(32)
    return key, f"{name}:{digest(key)}"


def digest(key: str) -> str:
    """Return the SHA-256 of a key; a random one of 256 bits needs no slower hash."""
    return hashlib.sha256(key.encode()).hexdigest()


def presented(request: HTTPConnection) -> str | None:
    """Return the key in `Authorization: Bearer` or `X-API-Key`, or None."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return (key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")) or None


def match(key: str, digests: dict[str, str]) -> str | None:
    """Return the name whose digest is the key's; every digest is compared, whichever matches."""
    given, matching = digest(key), None
    for name, expected in digests.items():
        if hmac.compare_digest(given, expected):
            matching = name
    return matching
