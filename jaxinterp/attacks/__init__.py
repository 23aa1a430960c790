"""Attacks as pure functions: `run(CW(), model, images, labels, targets, key=key)` drives any of them."""

from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.chain import Chain
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.driver import advance, finish, finished, run, start
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.pgd import PGD
from jaxinterp.attacks.square import Square

ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW, Square)}

__all__ = [
    "ATTACKS",
    "CW",
    "IFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Chain",
    "Square",
    "advance",
    "finish",
    "finished",
    "run",
    "start",
]
