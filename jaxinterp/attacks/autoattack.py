"""AutoAttack: four attacks that need no tuning, one after the other (Croce and Hein 2020, arXiv 2003.01690).

    APGD-CE, APGD-T, FAB, Square

An image is robust when none of them breaks it. The version in L1 follows Croce and Hein 2021 (arXiv 2103.01208).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Array, Int

from jaxinterp.attacks.apgd import APGD, APGDT
from jaxinterp.attacks.attack import AttackResult, Real
from jaxinterp.attacks.chain import Chain, ChainState
from jaxinterp.attacks.fab import FAB
from jaxinterp.attacks.square import Square
from jaxinterp.pytree import pytree, static


@pytree
class AutoAttack:
    """The standard version: a `Chain` of APGD-CE, APGD-T, FAB-T and Square at their standard settings.

    An example is done at its first success, and what one attack breaks costs the others nothing. With targets, all
    four go for these.

    Attributes:
        eps: radius of the ball, in pixel units of [0, 1]; one number, or one for every example.
        kappa: confidence, the margin of logits that counts as success.
        norm: "linf", "l2" or "l1".
        steps: number of steps of a run of APGD, and of FAB.
        restarts: number of runs of APGD-CE; None means 1, in L1 5.
        classes: number of rivals of APGD-T and of FAB-T; None means 9, in L1 5 for the first.
        queries: number of images that Square evaluates.
    """

    name: ClassVar[str] = "autoattack"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("linf", "l2", "l1")}

    eps: Real = 8 / 255
    kappa: Real = 0.0
    norm: Literal["linf", "l2", "l1"] = static(default="linf")
    steps: int = static(default=100)
    restarts: int | None = static(default=None)
    classes: int | None = static(default=None)
    queries: int = static(default=5000)

    @property
    def chain(self) -> Chain:
        """The attacks as one."""
        l1 = self.norm == "l1"
        # The authors' program starts APGD in L1 from balls of three and two times the radius, which is not done here.
        restarts = (5 if l1 else 1) if self.restarts is None else self.restarts
        classes = (5 if l1 else 9) if self.classes is None else self.classes
        rivals = 9 if self.classes is None else self.classes
        stages = (
            APGD(norm=self.norm, loss="ce", steps=self.steps, restarts=restarts),
            APGDT(norm=self.norm, classes=classes, steps=self.steps),
            FAB(norm=self.norm, classes=rivals, steps=self.steps),
            # As in the authors' program, squares shrink as if there were twice as many queries.
            Square(norm=self.norm, p=0.8, steps=self.queries, horizon=2 * self.queries),
        )
        return Chain(stages, eps=self.eps, kappa=self.kappa, norm=self.norm)

    @property
    def iterations(self) -> int:
        """Those of all four attacks."""
        return self.chain.iterations

    def init(self, model, images, labels, targets, keys, support=None) -> ChainState:
        """Nobody has begun; no pass is made."""
        return self.chain.init(model, images, labels, targets, keys, support)

    def step(self, model, state: ChainState) -> ChainState:
        """One step of the earliest attack that has unfinished examples."""
        return self.chain.step(model, state)

    def stage(self, state: ChainState) -> Int[Array, ""]:
        """The place of that attack, from 0."""
        return self.chain.stage(state)

    def step_of(self, stage: int, model, state: ChainState) -> ChainState:
        """One step of the attack in that place."""
        return self.chain.step_of(stage, model, state)

    def result(self, state: ChainState) -> AttackResult:
        """What the first attack found that succeeded, and the passes of all."""
        return self.chain.result(state)
