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
from jaxinterp.attacks.driver import advance, finish, finished, lowered, run, start
from jaxinterp.attacks.ead import EAD
from jaxinterp.attacks.fab import FAB
from jaxinterp.attacks.fgsm import FGSM
from jaxinterp.attacks.fmn import FMN
from jaxinterp.attacks.hopskipjump import HopSkipJump
from jaxinterp.attacks.ifgsm import IFGSM
from jaxinterp.attacks.key_pixels import KeyPixels
from jaxinterp.attacks.mifgsm import MIFGSM
from jaxinterp.attacks.pgd import PGD
from jaxinterp.attacks.smooth_cw import SmoothCW
from jaxinterp.attacks.smooth_pgd import SmoothBIM, SmoothPGD
from jaxinterp.attacks.smoothed import Smoothed
from jaxinterp.attacks.smoothing import smooth
from jaxinterp.attacks.spsa import SPSA
from jaxinterp.attacks.square import Square
from jaxinterp.attacks.strattack import StrAttack
from jaxinterp.attacks.transforms import (
    TRANSFORMS,
    DiverseInputs,
    Nesterov,
    ScaleInvariant,
    TranslationInvariant,
    VarianceTuning,
)
from jaxinterp.attacks.transparent_text import TransparentText
from jaxinterp.attacks.watermark import Watermark

FAMILIES: dict[str, tuple[type, ...]] = {
    "at a budget": (FGSM, IFGSM, PGD, MIFGSM, APGD, APGDT),
    "the smallest change": (CW, CWLinf, CWL0, EAD, StrAttack, DeepFool, DDN, FMN, FAB, KeyPixels),
    "without gradients": (Square, SPSA, HopSkipJump, TransparentText, Watermark),
    "smooth": (SmoothPGD, SmoothBIM, SmoothCW, Smoothed),
    "several": (AutoAttack,),
}
"""Every attack, by what it is asked for or allowed to know."""
ATTACKS: dict[str, type] = {attack.name: attack for family in FAMILIES.values() for attack in family}
Smoothed.parts["base"] = ATTACKS

__all__ = [
    "APGD",
    "APGDT",
    "ATTACKS",
    "CW",
    "CWL0",
    "DDN",
    "EAD",
    "FAB",
    "FAMILIES",
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
    "KeyPixels",
    "Nesterov",
    "ScaleInvariant",
    "SmoothBIM",
    "SmoothCW",
    "SmoothPGD",
    "Smoothed",
    "Square",
    "StrAttack",
    "TranslationInvariant",
    "TransparentText",
    "VarianceTuning",
    "Watermark",
    "advance",
    "compare_access",
    "compare_transfer",
    "diagnose",
    "finish",
    "finished",
    "lowered",
    "run",
    "smooth",
    "start",
]
