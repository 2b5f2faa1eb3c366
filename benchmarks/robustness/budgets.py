"""How much each attack may spend."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The numbers of steps, restarts, draws and queries; the same for every row of a table.

    apgd_steps, restarts, targets: of every APGD; autoattack_steps, autoattack_queries: of AutoAttack's gradient attacks
    and of its Square (standard: 100 and 5,000)
    eot: draws of fresh seeds per gradient; lambdas: weights of the contrastive term
    unrolled_steps: purifier steps that a full gradient goes through at most
    adaptive_steps: of the APGDs on the purifier's own parts
    mates: the images of the batch that the attacker owns, beside the victim's
    """

    apgd_steps: int
    restarts: int
    targets: int
    autoattack_steps: int
    autoattack_queries: int
    eot: int
    lambdas: tuple[float, ...]
    unrolled_steps: int
    adaptive_steps: int
    square_queries: int
    rays_queries: int
    mates: int
    mate_steps: int

    def less_than(self, other: "Budget") -> list[str]:
        """Return the numbers of which it has less; of `lambdas` that is how many."""

        def size(value: Any) -> float:  # noqa: ANN401
            return len(value) if isinstance(value, tuple) else value

        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if size(mine[name]) < size(theirs[name])]


BUDGETS = {
    "fast": Budget(
        apgd_steps=10,
        restarts=1,
        targets=2,
        autoattack_steps=10,
        autoattack_queries=100,
        eot=4,
        lambdas=(0.1, 1.0, 10.0),
        unrolled_steps=5,
        adaptive_steps=6,
        square_queries=40,
        rays_queries=40,
        mates=3,
        mate_steps=2,
    ),
    "standard": Budget(
        apgd_steps=50,
        restarts=1,
        targets=9,
        autoattack_steps=100,
        autoattack_queries=5000,
        eot=20,
        lambdas=(0.1, 1.0, 10.0),
        unrolled_steps=40,
        adaptive_steps=30,
        square_queries=1000,
        rays_queries=1000,
        mates=7,
        mate_steps=10,
    ),
    "full": Budget(
        apgd_steps=100,
        restarts=5,
        targets=9,
        autoattack_steps=100,
        autoattack_queries=5000,
        eot=20,
        lambdas=(0.1, 0.3, 1.0, 3.0, 10.0),
        unrolled_steps=1000,
        adaptive_steps=100,
        square_queries=5000,
        rays_queries=10000,
        mates=15,
        mate_steps=30,
    ),
}
