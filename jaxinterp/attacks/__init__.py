"""Attacks as pure functions: `run(CW(), model, images, labels, targets, key=key)` drives any of them."""

from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.ddn import DDN
from jaxinterp.attacks.deepfool import DeepFool
from jaxinterp.attacks.driver import advance, finish, finished, run, start
from jaxinterp.attacks.fab import FAB
from jaxinterp.attacks.fmn import FMN
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.pgd import PGD

ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW, DDN, FMN, DeepFool, FAB)}

__all__ = [
    "ATTACKS",
    "CW",
    "DDN",
    "FAB",
    "FMN",
    "IFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "DeepFool",
    "advance",
    "finish",
    "finished",
    "run",
    "start",
]
