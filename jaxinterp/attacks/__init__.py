"""Attacks as pure functions: `run(CW(), model, images, labels, targets, key=key)` drives any of them."""

from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.cw_l0 import CWL0
from jaxinterp.attacks.cw_linf import CWLinf
from jaxinterp.attacks.driver import advance, finish, finished, run, start
from jaxinterp.attacks.ead import EAD
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.pgd import PGD
from jaxinterp.attacks.strattack import StrAttack

ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW, EAD, StrAttack, CWLinf, CWL0)}

__all__ = [
    "ATTACKS",
    "CW",
    "CWL0",
    "EAD",
    "IFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "CWLinf",
    "StrAttack",
    "advance",
    "finish",
    "finished",
    "run",
    "start",
]
