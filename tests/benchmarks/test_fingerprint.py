"""What tells two functions, networks and purifiers apart, whatever their names."""

import copy

import torch
from torch import Tensor, nn

from unperturb.benchmarks.robustness.fingerprint import fingerprint


def test_buffer_that_is_not_saved_is_part_of_a_fingerprint() -> None:
    class Shifted(nn.Module):
        def __init__(self, mean: float) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((1,), mean), persistent=False)

    assert fingerprint(Shifted(0.0)) == fingerprint(Shifted(0.0))
    assert fingerprint(Shifted(0.0)) != fingerprint(Shifted(5.0))


def sine(x: Tensor) -> Tensor:
    return x.sin()


def cosine(x: Tensor) -> Tensor:
    return x.cos()


def times(x: Tensor, by: int = 2) -> Tensor:
    return x * by


def times_three(x: Tensor, by: int = 3) -> Tensor:
    return x * by


def clamped(_: nn.Module, __: tuple[Tensor, ...], found: Tensor) -> Tensor:
    return found.clamp(max=0)


def test_fingerprint_tells_functions_hooks_and_networks_of_one_name_apart() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    hooked = copy.deepcopy(layer)
    hooked.register_forward_hook(clamped)
    own, others = {"classifier": layer}, {"classifier": nn.Linear(2, 2)}
    for one, other in ((sine, cosine), (times, times_three), (layer, hooked), (own, others)):
        assert fingerprint(one) == fingerprint(one) != fingerprint(other)
    assert fingerprint(own, without=[layer]) == fingerprint(own, without=[layer])
    assert fingerprint({"of": layer}, without=[layer]) != fingerprint({"of": hooked}, without=[layer])

    def early() -> object:
        return late

    without_a_value = fingerprint(early)
    late = 1
    assert fingerprint(early) != without_a_value
