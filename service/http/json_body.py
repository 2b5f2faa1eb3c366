"""JSON from strangers: parsed only so far as it is small in number, since every member may cost an error of its own."""

import json
from typing import Any

from unperturb.service.errors import MalformedRequestError

MAX_MEMBERS = 1000


def parse(body: bytes, *, unbounded: str = "") -> dict[str, Any]:
    """The object that the body holds; MalformedRequestError for anything else, or for more than 1,000 members in all.

    What stands under a key `unbounded` is not counted.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError("the body is not JSON") from error
    if not isinstance(value, dict):
        raise MalformedRequestError("the body is not a JSON object")
    left: list[dict[str, Any] | list[Any]] = [value]
    members = 0
    while left:
        one = left.pop()
        inner = [v for k, v in one.items() if k != unbounded] if isinstance(one, dict) else one
        members += len(one)
        if members > MAX_MEMBERS:
            raise MalformedRequestError(f"the JSON has more than {MAX_MEMBERS:,} members")
        left += [v for v in inner if isinstance(v, dict | list)]
    return value
