"""`python -m unperturb.benchmarks.serving.peers.ray_batch_server PORT`: Ray Serve's `@serve.batch`, measured."""

import os
import signal
import sys
import time
from typing import Any

import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from unperturb.benchmarks.serving.peers.shared import BATCH_WAIT_S, MAX_BATCH, QUEUE, WITHIN_S, PeerModel


@serve.deployment(
    max_ongoing_requests=MAX_BATCH + QUEUE,  # Ray's own bound on the queue, of the proxy, fills no batch by itself
    max_queued_requests=MAX_BATCH,
    ray_actor_options={"num_gpus": 1 if torch.cuda.is_available() else 0},
)
class Batched:
    """One replica with the model."""

    def __init__(self) -> None:
        torch.set_num_threads(os.cpu_count() or 1)  # Ray gives an actor one thread
        self.model = PeerModel()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def predict(self, batch: list[Any]) -> list[dict[str, Any] | None]:
        """Return the answers of those of a batch that are not too late, and None for the others."""
        now = time.monotonic()
        places = [i for i, (came, _) in enumerate(batch) if now - came <= WITHIN_S]
        answers = dict(zip(places, self.model.answer([batch[i][1] for i in places]) if places else [], strict=True))
        return [answers.get(i) for i in range(len(batch))]

    async def __call__(self, request: Request) -> JSONResponse:
        """Answer one request."""
        if request.method == "GET":
            return JSONResponse({"status": "ready"})
        came = time.monotonic()
        answer = await self.predict((came, self.model.read(await request.json())))
        return JSONResponse(answer or {"detail": "too late"}, 504 if answer is None else 200)


if __name__ == "__main__":
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Batched.bind())  # type: ignore[attr-defined]
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
