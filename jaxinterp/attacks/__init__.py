"""Attacks as pure functions: `run(CW(), model, images, labels, targets, key=key)` drives any of them."""

from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.diagnostics import Finding, compare_access, compare_transfer, diagnose
from jaxinterp.attacks.driver import advance, finish, finished, run, start
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.pgd import PGD

ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW)}

__all__ = [
    "ATTACKS",
    "CW",
    "IFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "Finding",
    "advance",
    "compare_access",
    "compare_transfer",
    "diagnose",
    "finish",
    "finished",
    "run",
    "start",
]
