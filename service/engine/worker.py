"""Run a worker, which owns one device: `python -m unperturb.service.engine.worker FD`, in a process of its own.

Its Python does not wait for the web server's, nor the server for its steps; and whatever happens to its device, the
server is there to answer everybody. It fills free slots between steps, and reports after each.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from unperturb.models.checkpoints import store
from unperturb.models.checkpoints.store import Checkpoint
from unperturb.models.devices import opened_device
from unperturb.models.errors import CheckpointError
from unperturb.models.inference.captured import Execution
from unperturb.models.inference.folding import prepared
from unperturb.service.engine import precompile
from unperturb.service.engine.batching import ContinuousBatch
from unperturb.service.engine.cost import Cost
from unperturb.service.engine.messages import (
    Admit,
    Cancel,
    Cancelled,
    Failed,
    Load,
    Loaded,
    LoadProgress,
    StepReport,
    Threads,
    Unload,
    Upgraded,
    Work,
    WorkerConfig,
)
from unperturb.service.engine.slot import SlotResult
from unperturb.service.engine.warm_up import warmed
from unperturb.service.telemetry import logs

log = logging.getLogger("unperturb.worker")
UPGRADE_EVERY_S = 2.0  # a piece, which takes about as long, where images are in progress
UPGRADE_POLL_S = 0.05
DONE = object()


def work(server: Connection, config: WorkerConfig) -> None:
    """Serve until the server hangs up; a failure of the device is reported and ends it too."""
    torch.set_num_threads(config.threads)
    worker = _Worker(server, config)
    try:
        worker.run()
    except (EOFError, ConnectionError):
        log.info("the server has hung up")
    except Exception as error:
        log.exception("the worker failed")
        server.send(Failed(type(error).__name__))
    finally:
        worker.upgrades.clear()  # which ends the process that compiles


class _Worker:
    def __init__(self, server: Connection, config: WorkerConfig) -> None:
        self.server, self.config, self.device = server, config, opened_device(config.device)
        self.batches: dict[int, ContinuousBatch] = {}
        self.inbox: list[Work] = []  # images that have no slot yet
        self.costs: dict[int, Cost] = {}
        self.loading: deque[tuple[int, Iterator[int]]] = deque()  # of each the pieces of its warm-up
        self.done = 0  # pieces of the first one's
        self.upgrades: dict[int, Iterator[None]] = {}  # by model, in order
        self.upgraded_at = 0.0  # the end of the last piece of an upgrade, on time.monotonic's clock
        self.retiring: list[tuple[int, ContinuousBatch]] = []  # they end the images that they have

    def run(self) -> None:
        while True:
            self._read()
            for model, batch in [*self.batches.items(), *self.retiring]:
                if batch.slots:
                    self._advance(model, batch)
            self.retiring = [(model, batch) for model, batch in self.retiring if batch.slots]
            if self.loading:  # a piece at a time, between steps
                model, warm_up = self.loading[0]
                if (pieces := next(warm_up, None)) is None:
                    self.loading.popleft()
                    self.done = 0
                else:
                    self.server.send(LoadProgress(model, self.done, pieces))
                    self.done += 1
            elif self.upgrades and (not self._busy() or time.monotonic() - self.upgraded_at > UPGRADE_EVERY_S):
                model, upgrade = next(iter(self.upgrades.items()))
                if next(upgrade, DONE) is DONE:
                    del self.upgrades[model]
                self.upgraded_at = time.monotonic()

    def _read(self) -> None:
        """Read everything that the server has sent; wait for it where there is nothing else to do."""
        while self.server.poll(0 if self.inbox or self._busy() else UPGRADE_POLL_S if self.upgrades else None):
            match self.server.recv():
                case Admit(works):
                    self.inbox.extend(works)
                case Cancel(ids):
                    self.inbox = [image for image in self.inbox if image.id not in ids]
                    for batch in self._every_batch():
                        batch.free(ids)
                    self.server.send(Cancelled(ids))
                case Threads(number):
                    torch.set_num_threads(number)
                case Load(model, name, digest):
                    self.loading.append((model, self._load(model, name, digest)))
                case None:
                    raise EOFError
                case Unload(model):
                    self.inbox = [image for image in self.inbox if image.model != model]
                    self.batches.pop(model, None)
                    self.costs.pop(model, None)
                    self.upgrades.pop(model, None)
        self._admit()

    def _admit(self) -> None:
        """Give the images of the inbox slots, in turn, as long as there are any: as many for those without steps."""
        every = [slot for batch in self._every_batch() for slot in batch.slots]
        staged = sum(slot.stage is not None for slot in every)
        free = {True: self.config.slots - staged, False: self.config.slots - (len(every) - staged)}
        new: dict[int, list[Work]] = {}
        left: list[Work] = []
        for image in self.inbox:
            kind = image.stage is not None
            if free[kind] > 0:
                new.setdefault(image.model, []).append(image)
                free[kind] -= 1
            else:
                left.append(image)
        self.inbox = left
        for model, works in new.items():
            if ended := self.batches[model].admit(works):
                self._report(model, (), 0.0, None, ended)

    def _every_batch(self) -> list[ContinuousBatch]:
        return [*self.batches.values(), *(batch for _, batch in self.retiring)]

    def _busy(self) -> bool:
        return bool(self.loading or self.retiring) or any(batch.slots for batch in self.batches.values())

    def _load(self, model: int, name: str, digest: str) -> Iterator[int]:
        """Load a checkpoint and warm it up, a piece for each `next`, which gives how many there are.

        A checkpoint's fault is its own alone.
        """
        started = time.monotonic()
        try:
            loaded = store.load(name, device=self.device)
            if loaded.card.weights_sha256 != digest:
                raise CheckpointError(f"checkpoint {name!r} has changed while it was loaded")
            ready = prepared(loaded, precision=self.config.precision)
            batch = ContinuousBatch(ready, self.device, execution=self.config.execution)
            cost = yield from warmed(batch, self.config.slots, threads=self.config.numbers_of_threads)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            log.exception("checkpoint %s cannot be served", name)
            reason = str(error) if isinstance(error, CheckpointError) else f"it does not run: {error}"
            self.server.send(Loaded(model, Cost(), reason))
            return
        self.batches[model], self.costs[model] = batch, cost
        log.info("warmed up %s on %s in %.1f s", loaded.card.id, self.device, time.monotonic() - started)
        self.server.send(Loaded(model, cost))
        if self.config.upgrade is not None:
            self.upgrades[model] = self._upgrade(model, name, ready, self.config.upgrade)

    def _upgrade(self, model: int, name: str, ready: Checkpoint, execution: Execution) -> Iterator[None]:
        """Make faster steps beside those that serve, then give them to new images; where that fails, all stays."""
        started = time.monotonic()
        try:
            if execution == "compiled":
                yield from self._precompiled(name)
            batch = ContinuousBatch(ready, self.device, execution=execution)
            pieces = warmed(batch, self.config.slots, threads=self.config.numbers_of_threads)
            while True:
                try:
                    next(pieces)
                except StopIteration as end:
                    cost = end.value
                    break
                yield
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("%s steps of %s cannot be made; it is served as before", execution, name)
            return
        self.retiring.append((model, self.batches[model]))
        self.batches[model], self.costs[model] = batch, cost
        log.info("steps of %s are %s after %.0f s", name, execution, time.monotonic() - started)
        self.server.send(Upgraded(model, execution, cost))

    def _precompiled(self, name: str) -> Iterator[None]:
        """Wait for another process that fills the compiler's cache; whatever it leaves out is made here."""
        process = subprocess.Popen(precompile.command(name, self.config), stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                yield
        finally:
            process.kill()
            process.wait()

    def _advance(self, model: int, batch: ContinuousBatch) -> None:
        batches, passes = batch.batch_count, batch.pass_count
        stepped = tuple(slot.work.id for slot in batch.slots if not slot.finished)
        started = time.monotonic()
        ended = batch.advance()
        if self.device.type == "cuda":  # admission is between steps: launch no further than the device is
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - started
        cost = self.costs[model] if batch is self.batches.get(model) else Cost()  # it is the new one's
        expected = cost.seconds(batch.batch_count - batches, batch.pass_count - passes)
        failed = any(isinstance(result, Exception) for _, result in ended)  # its other steps were not done
        self._report(model, stepped, seconds, seconds / expected if expected and not failed else None, ended)

    def _report(
        self, model: int, stepped: tuple[int, ...], seconds: float, pace: float | None, ended: list[SlotResult]
    ) -> None:
        memory = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
        self.server.send(StepReport(model, stepped, seconds, pace, [(id, result) for id, result in ended], memory))


if __name__ == "__main__":
    for _signal in (signal.SIGINT, signal.SIGTERM):  # the server ends it, when all is answered
        signal.signal(_signal, signal.SIG_IGN)
    precompile.cache()
    _server = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):  # the server has ended before it said how to work
        _config = _server.recv()
        logs.set_up(level=_config.log_level, style=_config.log_format)
        work(_server, _config)
    logging.shutdown()
    os._exit(0)  # a broken device may hang in its own clean-up
