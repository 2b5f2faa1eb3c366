"""Standard AutoAttack on the static classifier, in a process of its own.

pyautoattack's check for an optimisation loop counts through `sys.settrace`, is never reset and would flag every later
model of the same process; and its seed is the clock's unless one is given.
"""

import io
import logging
import os
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unperturb.benchmarks.robustness.attacks.scene import Threat
from unperturb.models.errors import UnperturbError
from unperturb.models.networks.classifier import ImageClassifier
from unperturb.models.networks.robustbench import ForeignClassifier, import_robustbench
from unperturb.models.shapes import Float, Int

LOGGER = "auto-attack"


def autoattack(
    classifier: ImageClassifier,
    x: Float[Tensor, "n 3 h w"],
    labels: Int[Tensor, " n"],
    *,
    threat: Threat,
    seed: int,
    batch: int = 250,
) -> tuple[Float[Tensor, "n 3 h w"], list[str]]:
    """The adversarial images (the clean one where none was found), and AutoAttack's warnings of what looks wrong."""
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    device = str(x.device)
    buffer = io.BytesIO()  # bytes: tensors would travel through shared memory, of which a container has little
    torch.save((classifier.to("cpu"), x.cpu(), labels.cpu()), buffer)
    classifier.to(device)
    foreign = any(isinstance(module, ForeignClassifier) for module in classifier.modules())
    job = (buffer.getvalue(), foreign, threat, seed, batch, device, torch.get_num_threads())
    process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    try:
        mine.send(job)
        answer = mine.recv()
    except (EOFError, BrokenPipeError):
        process.join()
        raise UnperturbError(f"AutoAttack's process ended with status {process.exitcode} before it answered") from None
    finally:
        mine.close()
        if process.is_alive():
            process.join(timeout=10)
            process.kill()
    if isinstance(answer, str):
        raise UnperturbError(f"AutoAttack failed: {answer}")
    points, warnings = answer
    return torch.from_numpy(points).to(device), warnings


def _serve(pipe: Connection, parent: int) -> None:
    """The process: one evaluation, then the end; also the end when the parent has been killed."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        payload, foreign, threat, seed, batch, device, threads = pipe.recv()
        torch.set_num_threads(threads)
        if foreign:
            import_robustbench()  # its classes cannot be unpickled before
        classifier, x, labels = torch.load(io.BytesIO(payload), weights_only=False)
        pipe.send(_evaluate(classifier.to(device), x.to(device), labels.to(device), threat, seed, batch))
    except Exception as error:  # whatever it is, the parent has to hear of it
        pipe.send(f"{type(error).__name__}: {error}")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _evaluate(
    classifier: ImageClassifier, x: Tensor, labels: Tensor, threat: Threat, seed: int, batch: int
) -> tuple[NDArray[np.float32], list[str]]:
    from pyautoattack import AutoAttack

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(LOGGER).addHandler(handler)
    norm: Literal["Linf", "L2"] = "Linf" if threat.norm == "linf" else "L2"
    classes = classifier.num_classes
    attack = AutoAttack(classifier, norm=norm, eps=threat.epsilon, seed=seed, version="standard", device=x.device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
    if classes < 4:  # its targeted DLR loss takes the fourth largest logit
        attack.attacks_to_run = ["apgd-ce", "fab-t", "square"]
        warnings.append(f"with {classes} classes AutoAttack's apgd-t was left out")
    points, _ = attack.run_standard_evaluation(x, labels, batch_size=batch)
    return points.detach().cpu().numpy(), warnings  # a tensor would be shared memory that ends with this process
