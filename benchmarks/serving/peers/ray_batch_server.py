"""`python -m unperturb.benchmarks.serving.peers.ray_batch_server PORT`: Ray Serve's `@serve.batch`, measured."""

import os
import signal
import sys
from typing import Any

import ray
import torch
from ray import serve
from starlette.requests import Request

from unperturb.benchmarks.serving.peers.shared import BATCH_WAIT_S, MAX_BATCH, PeerModel


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_gpus": 1 if torch.cuda.is_available() else 0})
class Batched:
    """One replica with the model."""

    def __init__(self) -> None:
        torch.set_num_threads(os.cpu_count() or 1)  # Ray gives an actor one thread
        self.model = PeerModel()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S)
    async def predict(self, batch: list[Any]) -> list[dict[str, Any]]:
        """Return a batch's answers."""
        return self.model.answer(batch)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        if request.method == "GET":
            return {"status": "ready"}
        answer: dict[str, Any] = await self.predict(self.model.read(await request.json()))
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Batched.bind())  # type: ignore[attr-defined]
    signal.sigwait({signal.SIGTERM})
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
