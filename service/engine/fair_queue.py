"""Queue images so that every client gets an equal share of the devices' time, however many it sends.

Self-clocked fair queueing (Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994,
section 3): an image's tag is max(virtual time, the last tag of its client) plus its cost; the least tag goes first, and
the virtual time is the tag of what went last. With one client it is first come, first served.

A client that has had less than its share lately goes first, by CREDIT_S at most. Golestani's queue forgets that at
once: in it a client below its share waits with those that ask for ten times theirs whenever it has two images.
"""

import bisect
from collections.abc import Collection, Iterator

from unperturb.service.engine.requests import ImageRequest

CREDIT_S = 1.0  # of a device's work


class FairQueue:
    """Hold the images that wait; iterating over it gives them in the order of service."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, ImageRequest]] = []
        self._virtual_s = 0.0
        self._last_s: dict[str, float] = {}  # tags, of clients whose images still count

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[ImageRequest]:
        return (request for _, request in self._waiting)

    def add(self, request: ImageRequest) -> None:
        """Put an image behind its client's others, and before those of clients that have had more."""
        tag = self._tag(request.client, request.cost_s)
        self._last_s = {client: last for client, last in self._last_s.items() if last > self._virtual_s - CREDIT_S}
        self._last_s[request.client] = tag
        bisect.insort(self._waiting, (tag, request), key=lambda waiting: waiting[0])

    def ahead_of(self, client: str | None, cost_s: float) -> Iterator[ImageRequest]:
        """Iterate over the images that go before a new one of a client; over all of them for None."""
        tag = None if client is None else self._tag(client, cost_s)
        return (request for other, request in self._waiting if tag is None or other <= tag)

    def take(self, requests: Collection[ImageRequest]) -> None:
        """Remove images that are served now."""
        served = set(requests)
        self._virtual_s = max([self._virtual_s, *(tag for tag, request in self._waiting if request in served)])
        self._waiting = [waiting for waiting in self._waiting if waiting[1] not in served]

    def remove(self, requests: Collection[ImageRequest]) -> None:
        """Remove images that nobody waits for, and that count for their client no more; others are passed over."""
        gone = set(requests)
        self._waiting = [waiting for waiting in self._waiting if waiting[1] not in gone]
        for client in {request.client for request in gone} & self._last_s.keys():
            self._last_s[client] = max((tag for tag, left in self._waiting if left.client == client), default=0.0)

    def _tag(self, client: str, cost_s: float) -> float:
        return max(self._virtual_s - CREDIT_S, self._last_s.get(client, 0.0)) + cost_s
