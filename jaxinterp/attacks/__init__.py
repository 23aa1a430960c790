"""Attacks as pure functions: `run(CW(), model, images, labels, targets, key=key)` drives any of them."""

from jaxinterp.attacks.apgd import APGD, APGDT
from jaxinterp.attacks.attack import Attack, AttackResult
from jaxinterp.attacks.autoattack import AutoAttack
from jaxinterp.attacks.chain import Chain
from jaxinterp.attacks.cw import CW
from jaxinterp.attacks.cw_l0 import CWL0
from jaxinterp.attacks.cw_linf import CWLinf
from jaxinterp.attacks.ddn import DDN
from jaxinterp.attacks.deepfool import DeepFool
from jaxinterp.attacks.diagnostics import Finding, compare_access, compare_transfer, diagnose
from jaxinterp.attacks.driver import advance, finish, finished, run, start
from jaxinterp.attacks.ead import EAD
from jaxinterp.attacks.fab import FAB
from jaxinterp.attacks.fgsm import FGSM
from jaxinterp.attacks.fmn import FMN
from jaxinterp.attacks.hopskipjump import HopSkipJump
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.mifgsm import MIFGSM
from jaxinterp.attacks.pgd import PGD
from jaxinterp.attacks.spsa import SPSA
from jaxinterp.attacks.square import Square
from jaxinterp.attacks.transforms import (
    TRANSFORMS,
    DiverseInputs,
    Nesterov,
    ScaleInvariant,
    TranslationInvariant,
    VarianceTuning,
)

ATTACKS: dict[str, type] = {
    attack.name: attack
    for attack in (
        IFGSM,
        PGD,
        CW,
        FGSM,
        APGD,
        APGDT,
        MIFGSM,
        SPSA,
        DDN,
        FMN,
        DeepFool,
        FAB,
        Square,
        AutoAttack,
        HopSkipJump,
    )
}
ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW, EAD)}
from jaxinterp.attacks.strattack import StrAttack

ATTACKS: dict[str, type] = {attack.name: attack for attack in (IFGSM, PGD, CW, EAD, StrAttack, CWLinf, CWL0)}

__all__ = [
    "APGD",
    "APGDT",
    "ATTACKS",
    "CW",
    "CWL0",
    "DDN",
    "EAD",
    "FAB",
    "FGSM",
    "FMN",
    "IFGSM",
    "MIFGSM",
    "PGD",
    "SPSA",
    "TRANSFORMS",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "CWLinf",
    "Chain",
    "DeepFool",
    "DiverseInputs",
    "Finding",
    "HopSkipJump",
    "Nesterov",
    "ScaleInvariant",
    "Square",
    "StrAttack",
    "TranslationInvariant",
    "VarianceTuning",
    "advance",
    "compare_access",
    "compare_transfer",
    "diagnose",
    "finish",
    "finished",
    "run",
    "start",
]
