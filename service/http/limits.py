"""How many images one client, and all clients together, may have in progress."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from unperturb.service.errors import NotReadyError, TooManyRequestsError


class Limits:
    """Counts from the request's head to its answer, so that slow uploads count too; for one event loop."""

    def __init__(self, *, per_client: int, total: int) -> None:
        self.per_client, self.total = per_client, total
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, client: str, images: int) -> Iterator[None]:
        """Count `images` for `client` inside the block.

        Raises TooManyRequestsError past the client's limit, NotReadyError past everybody's.
        """
        if self._held[client] + images > self.per_client:
            raise TooManyRequestsError(
                f"{self._held[client]} images of this client are in progress, {images} more are asked for, and "
                f"at most {self.per_client} may be"
            )
        if self._held.total() + images > self.total:
            raise NotReadyError(f"{self._held.total()} images are in progress, and at most {self.total} may be")
        self._held[client] += images
        try:
            yield
        finally:
            self._held[client] -= images
            if not self._held[client]:
                del self._held[client]
