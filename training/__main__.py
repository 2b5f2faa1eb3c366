"""`unperturb train METHOD --flag value …`; `python -m unperturb.training METHOD …` is the same."""

import sys
from collections.abc import Callable, Sequence

from unperturb.models import command
from unperturb.models.options import parse
from unperturb.training.contrastive.pretrain import PretrainConfig, pretrain
from unperturb.training.purifier.gate import GateConfig, set_gates
from unperturb.training.purifier.generator import GeneratorConfig, train_generator
from unperturb.training.purifier.head import HeadConfig, train_head
from unperturb.training.purifier.purifier import PurifierConfig, train_purifier
from unperturb.training.purifier.restorer import RestorerConfig, train_restorer
from unperturb.training.supervised.classifier import ClassifierConfig, train_classifier
from unperturb.training.supervised.knn import KnnConfig, make_knn
from unperturb.training.supervised.linear import LinearConfig, train_linear

PROGRAM = "unperturb train"
COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "classifier": (ClassifierConfig, train_classifier),
    "head": (HeadConfig, train_head),
    "restorer": (RestorerConfig, train_restorer),
    "purifier": (PurifierConfig, train_purifier),
    "gate": (GateConfig, set_gates),
    "pretrain": (PretrainConfig, pretrain),
    "linear": (LinearConfig, train_linear),
    "knn": (KnnConfig, make_knn),
    "generator": (GeneratorConfig, train_generator),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training method; 2 for a refused argument, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] not in COMMANDS:
        asked_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(
            f"usage: {PROGRAM} {{{','.join(COMMANDS)}}} [--help]",
            file=sys.stdout if asked_help else sys.stderr,
        )
        return 0 if asked_help else 2
    name = arguments[0]
    config_class, train = COMMANDS[name]
    program = f"{PROGRAM} {name}"
    return command.run(
        program,
        lambda: train(parse(config_class, arguments[1:], program=program)),
        interrupted="the same command goes on from its last state",
    )


if __name__ == "__main__":
    sys.exit(main())
