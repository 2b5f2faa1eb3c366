"""Queue images so that every client gets an equal share of the devices' time, however many it sends.

Self-clocked fair queueing (Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994,
section 3): an image's tag is max(virtual time, the last tag of its client) plus its cost; the least tag goes first, and
the virtual time is the tag of what went last. With one client it is first come, first served.

A client that has had less than its share lately goes first, by its part of CREDIT_S at most. Golestani's queue forgets
that at once: in it a client below its share waits with those that ask for ten times theirs whenever it has two images.
So that the credit of many clients is no more than that of one, the virtual time also moves on by each image's cost,
divided by the clients that wait, as in Demers, Keshav and Shenker, "Analysis and simulation of a fair queueing
algorithm", SIGCOMM 1989, section 2.
"""

import bisect
from collections import Counter
from collections.abc import Collection, Iterator

from unperturb.service.engine.requests import ImageRequest

CREDIT_S = 4.0  # of a device's work, of all clients that wait together; with 1 who asks for nearly its share queues


class FairQueue:
    """Hold the images that wait; iterating over it gives them in the order of service."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, ImageRequest]] = []
        self._counts: Counter[str] = Counter()  # of those that wait, by client
        self._virtual_s = 0.0
        self._last_s: dict[str, float] = {}  # tags, of clients whose images still count
        self._served_s: dict[str, float] = {}  # the same of what has been served

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[ImageRequest]:
        return (request for _, request in self._waiting)

    def add(self, request: ImageRequest) -> None:
        """Put an image behind its client's others, and before those of clients that have had more."""
        tag = self._tag(request.client, request.cost_s)
        self._last_s = self._that_count(self._last_s)
        self._last_s[request.client] = tag
        bisect.insort(self._waiting, (tag, request), key=lambda waiting: waiting[0])
        self._counts[request.client] += 1

    def ahead_of(self, client: str | None, cost_s: float) -> Iterator[ImageRequest]:
        """Iterate over the images that go before a new one of a client; over all of them for None."""
        tag = None if client is None else self._tag(client, cost_s)
        return (request for other, request in self._waiting if tag is None or other <= tag)

    def take(self, requests: Collection[ImageRequest]) -> None:
        """Remove images that are served now."""
        served, clients = set(requests), len(self._counts)
        for tag, request in self._waiting:
            if request in served:
                self._virtual_s = max(self._virtual_s + request.cost_s / clients, tag)
                self._served_s[request.client] = tag
        self._served_s = self._that_count(self._served_s)
        self._drop(served)

    def remove(self, requests: Collection[ImageRequest]) -> None:
        """Remove images that nobody waits for, and that count for their client no more; others are passed over."""
        gone = set(requests)
        clients = {request.client for _, request in self._waiting if request in gone}
        self._drop(gone)
        for client in clients:
            left = [tag for tag, request in self._waiting if request.client == client]
            self._last_s[client] = max(left, default=self._served_s.get(client, 0.0))

    def _drop(self, requests: Collection[ImageRequest]) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting[1] not in requests]
        self._counts = Counter(request.client for _, request in self._waiting)

    def _that_count(self, tags: dict[str, float]) -> dict[str, float]:
        return {client: tag for client, tag in tags.items() if tag > self._virtual_s - CREDIT_S}

    def _tag(self, client: str, cost_s: float) -> float:
        credit_s = CREDIT_S / (len(self._counts) + (client not in self._counts))
        return max(self._virtual_s - credit_s, self._last_s.get(client, 0.0)) + cost_s
