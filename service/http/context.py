"""Hold what is known of one request, for its log line, its metrics and its trace."""

from dataclasses import dataclass, field

from starlette.types import Scope

from unperturb.service.telemetry.tracing import Part

KEY = "unperturb.context"


@dataclass
class RequestContext:
    """Filled in along a request's way; Observe makes it, and reads it at the end.

    client:   the name behind its API key, or its address; None until it is admitted
    model:    the id of the one that was asked for; None until it is known to be served
    preset:   the purifier's; None without purification, and until it is known
    rejected: the kind of refusal, as the metrics count them; None where it was not refused
    parts:    what was done for it, for its trace
    """

    request_id: str
    client: str | None = None
    model: str | None = None
    preset: str | None = None
    rejected: str | None = None
    parts: list[Part] = field(default_factory=list)

    def attach(self, scope: Scope) -> None:
        """Make this the context of the request with that scope."""
        scope[KEY] = self

    @classmethod
    def of(cls, scope: Scope) -> "RequestContext":
        """Return the context that Observe attached."""
        context: RequestContext = scope[KEY]
        return context
