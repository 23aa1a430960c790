"""Does a perturbation need the whole picture? Attacks confined to what the maps and the effects point at.

    python experiments/refined_attacks.py --model efficientnet_lite0 --fractions 0.2 0.35 0.5

Each attack that succeeded is run once more with no perturbation outside a part of the picture, begun at what it found
before. That refined attacks exist is the paper's finding (arXiv 1904.02057, section 5); where to look is ours: the top
of the class activation map of the true class, of the target, the union of both, and the cells with the largest s + p.
A control takes as many cells at random. Reported are success and the norms of the refined perturbation relative to the
original one, at every fraction of the picture kept. Writes refined_attacks/answers.json and refined.png.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxinterp import effect, localize, plots
from jaxinterp.attacks.driver import example_keys
from jaxinterp.cli import guarded
from jaxinterp.statistics import bootstrap_mean, proportion
from jaxinterp.study import CONFIRMED, NOT_CONFIRMED, PAPER, UNDECIDED, Answer, Setting, begin, problem, verdict

SUPPORTS = ("map of t0", "map of t", "union of maps", "top cells by s + p", "random cells")
NORMS = ("l0", "l1", "l2", "linf")
TOP, RANDOM = SUPPORTS.index("top cells by s + p"), SUPPORTS.index("random cells")


@dataclasses.dataclass(frozen=True)
class Refined(Setting):
    """What `Setting` has, the fractions, and the attacks.

    Attributes:
        refine: Attacks that are refined, of those that are run; each is run again for every part of the picture. None
            means I-FGSM and C&W where they are run, else all.
        fractions: Parts of the picture that are kept (of the union, of each of its two maps).
    """

    refine: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (0.2, 0.35, 0.5)


def supports(arrays, cell: effect.Cell, fraction: float, key: jax.Array) -> dict[str, jax.Array]:
    """Masks [B,H,W] by name."""
    size = arrays["clean"].shape[1:3]
    of_label, of_target = (
        localize.salient(jnp.asarray(arrays["maps"][:, i]), size, 100 * (1 - fraction)) for i in (0, 3)
    )
    overall = jnp.asarray(arrays["suppression"] + arrays["promotion"])
    keys = example_keys(key, jnp.asarray(arrays["clean"]))
    chance = jax.vmap(lambda k: jax.random.uniform(k, overall.shape[1:]))(keys)
    top, random = (localize.top_cells(values, cell, size, fraction) for values in (overall, chance))
    return dict(zip(SUPPORTS, (of_label, of_target, of_label | of_target, top, random), strict=True))


def chosen(setting: Refined) -> tuple[list[float], list[str]]:
    """The fractions and the attacks that are refined. Raises ValueError where they are out of range or unknown."""
    fractions, known = sorted(set(setting.fractions)), setting.attack or PAPER
    if not fractions or not 0 < fractions[0] <= fractions[-1] <= 1:
        raise ValueError(f"--fractions must be above 0 and at most 1, got {fractions}")
    if missing := [name for name in setting.refine if name not in known]:
        raise ValueError(f"--refine names {missing[0]}, which is not among the attacks: {', '.join(known)}")
    usual = [name for name in known if name.partition(":")[0] in ("ifgsm", "cw")]
    return fractions, sorted(setting.refine or usual or known)


def main(setting: Refined) -> None:
    """Refined attacks, by support and fraction."""
    fractions, refine = chosen(setting)
    study = begin("refined_attacks", setting, {"fractions": fractions, "refine": refine, "norms": "absolute"})
    model, key = study.found.network.bind(study.found.params), jax.random.key(setting.seed)

    def analyse(attack, arrays):
        made = []
        for fraction in fractions:
            for support in supports(arrays, setting.cell, fraction, key).values():
                result = localize.refine(attack, model, *problem(arrays), support, key=key)
                norms = [getattr(result, norm) for norm in NORMS] + [arrays[norm] for norm in NORMS]
                made.append(
                    np.stack([np.asarray(result.success, np.float64), np.mean(support, (1, 2)), *norms], axis=1)
                )
        shape = (len(fractions), len(SUPPORTS), len(arrays["labels"]), 2 + 2 * len(NORMS))
        return {"refined": np.array(made).reshape(shape).transpose(2, 0, 1, 3)}

    parts = defaultdict(list)
    for attack, arrays, extra in study.analysed(analyse, refine):
        parts[attack].append(extra["refined"][arrays["success"]])
    found = {attack: np.concatenate(each) for attack, each in parts.items()}  # [pictures, fractions, supports, columns]

    def mean(values):
        return bootstrap_mean(values, seed=setting.seed)

    def norms(values, norm):
        """Of pictures (rows with the columns last) the norms of the refined and of the original perturbation."""
        place = 2 + NORMS.index(norm)
        return values[..., place], values[..., place + len(NORMS)]

    def ratio(values, norm):
        refined, original = norms(values, norm)
        return refined / original

    def successful(values, f, s):
        return values[values[:, f, s, 0] > 0, f, s]

    def told(values):
        return format(mean(values))

    answers, middle = [], len(fractions) // 2
    for attack, values in found.items():
        won = int(np.sum(values[:, middle, TOP, 0]))
        share = proportion(won, len(values))
        settled = CONFIRMED if share.low > 0.5 else NOT_CONFIRMED if share.high < 0.5 else UNDECIDED
        claim = f"{attack}: on the top {fractions[middle]:.0%} of cells by s + p most attacks still succeed"
        answers.append(Answer(claim, f"{won} of {len(values)}, {share}", settled))
        more = mean(values[:, middle, TOP, 0] - values[:, middle, RANDOM, 0])
        claim = f"{attack}: they succeed more often there than on as many random cells"
        answers.append(Answer(claim, f"by {more}", verdict(more, 0.0)))
        both = values[(values[:, middle, TOP, 0] > 0) & (values[:, middle, RANDOM, 0] > 0), middle]
        less = mean(ratio(both[:, RANDOM], "l2") - ratio(both[:, TOP], "l2"))
        claim = f"{attack}: and need a smaller L2 than there"
        answers.append(Answer(claim, f"by {less} of the original's, {less.count} pictures", verdict(less, 0.0)))
    panels = {}
    for attack, values in found.items():
        panels[f"{attack}: success"] = {
            name: [mean(values[:, f, s, 0]) for f in range(len(fractions))] for s, name in enumerate(SUPPORTS)
        }
        for norm in ("l2", "l0"):
            panels[f"{attack}: {norm.upper()}, refined / original"] = {
                name: [mean(ratio(successful(values, f, s), norm)) for f in range(len(fractions))]
                for s, name in enumerate(SUPPORTS)
            }
    plots.save(plots.curves(panels, fractions, xlabel="fraction kept"), study.run.directory / "refined.png")
    study.conclude(
        answers,
        {
            attack: {
                f"{fraction:g}": {
                    name: {
                        "part of the picture": format(mean(values[:, f, s, 1])),
                        "success": f"{int(np.sum(values[:, f, s, 0]))} of {len(values)}",
                        "of these": {
                            norm: {
                                **dict(zip(("refined", "original"), map(told, norms(won, norm)), strict=True)),
                                "refined / original": told(ratio(won, norm)),
                            }
                            for norm in NORMS
                        },
                    }
                    for s, name in enumerate(SUPPORTS)
                    for won in [successful(values, f, s)]
                }
                for f, fraction in enumerate(fractions)
            }
            for attack, values in found.items()
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda words: main(tyro.cli(Refined, description=__doc__, args=words))))
