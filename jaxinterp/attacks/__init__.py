"""Attacks as pure functions: `run(CW(), model, images, labels, targets, key=key)` drives any of them."""

from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.driver import advance, finish, finished, run, start
from jaxinterp.attacks.ead import EAD
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.pgd import PGD

ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW, EAD)}

__all__ = [
    "ATTACKS",
    "CW",
    "EAD",
    "IFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "advance",
    "finish",
    "finished",
    "run",
    "start",
]
