"""Logs: one JSON object a line, or plain text. They hold ids, sizes and times, and never anything of an image."""

import json
import logging
import sys
import time
from typing import Any

_OWN = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """Return what was given as `extra`; Ray adds a private member to every record of its process."""
    return {key: value for key, value in vars(record).items() if key not in _OWN and not key.startswith("_")}


class JsonLines(logging.Formatter):
    """A record as one line of JSON, with what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        moment = time.gmtime(record.created)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', moment)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Text(logging.Formatter):
    """A record as a line for people, with what was given as `extra` behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line."""
        extra = " ".join(f"{key}={value}" for key, value in _extra(record).items())
        return f"{super().formatMessage(record)} {extra}".rstrip()


def set_up(*, level: str, style: str) -> None:
    """Send every logger's records to stderr in that style."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else Text())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
