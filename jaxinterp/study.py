"""What the experiments share: pictures attacked once, an analysis of every chunk, answers to claims.

A study is an `explain` run and an analysis beside it, in a directory of its own inside the run's:

    OUT/                    the run: attacks, effects of cells, maps, as `jaxinterp explain` leaves them
    OUT/NAME/config.json    what determines the analysis; another config is refused
    OUT/NAME/parts/         one part for each chunk of the run, so that a stopped analysis continues
    OUT/NAME/answers.json   the claims and what was found, with versions; machine.json beside it tells the devices

Several studies share one run, so that nothing is attacked twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from jaxinterp import effect, job, processes
from jaxinterp.attacks.attack import Attack
from jaxinterp.cellsize import CellSize
from jaxinterp.concepts import Dissected
from jaxinterp.explain import Explained, explain
from jaxinterp.job import Job
from jaxinterp.network import Network, Params
from jaxinterp.pictures import chunks, part_name
from jaxinterp.processes import open_run, read_part
from jaxinterp.runs import Run, file_name, versions
from jaxinterp.statistics import Estimate

PAPER = ("ifgsm", "cw", "ead", "strattack")
"""The attacks of the paper (arXiv 1904.02057)."""

CONFIRMED, NOT_CONFIRMED, UNDECIDED = "confirmed", "not confirmed", "undecided at this sample size"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What every study of cells is asked.

    Attributes:
        pictures: Picture files and folders; none means the labelled ImageNet pictures of the `samples` extra.
        model: Network, converted with `jaxinterp convert`.
        cell: Side of a cell in pixels, or HEIGHTxWIDTH.
        out: Results directory; None means one in results/ by the names of the study and the network.
        labels: As in `jaxinterp explain`.
        limit: Use only the first so many pictures.
        seed: Of targets, random starts, shuffled controls and the bootstrap.
        batch_size: Pictures that are attacked at once.
    """

    pictures: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    model: str = "efficientnet_lite0"
    cell: CellSize = 14
    out: Path | None = None
    labels: str = "auto"
    limit: int | None = None
    seed: int = 0
    batch_size: int = 4


@dataclasses.dataclass(frozen=True)
class Setting(Asked):
    """What a study of a run of `jaxinterp explain` is asked.

    Attributes:
        out: Results directory; studies of one model may share it. None means results/study/MODEL.
        attack: As in `jaxinterp explain`; may be given several times. None means the four of the paper.
        maps: Class activation maps, as in `jaxinterp explain`.
    """

    attack: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    maps: str = "auto"


@dataclasses.dataclass(frozen=True)
class Answer:
    """A claim, what was measured, and whether that settles it."""

    claim: str
    measured: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Study:
    """A finished run and the directory of an analysis of it.

    Attributes:
        name: of the study.
        found: the run.
        run: the analysis' own directory.
        seed: of the bootstrap, too.
    """

    name: str
    found: Explained
    run: Run
    seed: int

    def analysed(
        self,
        analyse: Callable[[Attack, Mapping[str, np.ndarray]], Mapping[str, Any]],
        attacks: Collection[str] | None = None,
    ) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """For every chunk the attack's name, the run's arrays, and what `analyse` makes of them, computed once.

        Args:
            analyse: takes an attack and the arrays of a chunk, the picture being their first axis; returns arrays.
            attacks: names of those whose chunks are wanted; None means all.
        """
        group = processes.current()
        wanted = [name for name in self.found.attacks if attacks is None or name in attacks]
        starts = chunks(self.found.pictures, self.found.batch_size)
        every = [part_name(name, start) for start in starts for name in wanted]
        missing = group.told([part for part in every if self.run.read_part(part) is None])
        mine = set(group.share(missing))
        with tqdm(total=len(mine), desc=self.name, unit="chunk") as left:
            for part, attack, arrays in self.found.parts(attacks) if mine else ():
                if part in mine:
                    made = analyse(self.found.attacks[attack], arrays)
                    self.run.write_part(part, {name: np.asarray(value) for name, value in made.items()})
                    left.update()
        group.wait()
        for part, attack, arrays in self.found.parts(attacks):
            yield attack, arrays, read_part(self.run, part)

    def conclude(self, answers: Sequence[Answer], results: Any = None) -> None:
        """Stores answers.json and prints the answers.

        Args:
            answers: to the claims.
            results: numbers behind them, as JSON.
        """
        count = len(self.found.pictures.correct)
        conclude(self.run, self.name, count, answers, results, {"run": self.found.run.config})
        print(f"{self.found.page}: what was attacked")


def conclude(
    run: Run,
    name: str,
    pictures: int,
    answers: Sequence[Answer],
    results: Any = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Stores answers.json in a results directory and prints the answers.

    Args:
        run: the directory.
        name: of the study.
        pictures: how many the answers are from.
        answers: to the claims.
        results: numbers behind them, as JSON.
        more: what else the record says, as JSON.
    """
    if processes.current().first:
        run.write_json(
            "answers.json",
            {
                "study": name,
                "pictures": pictures,
                **(more or {}),
                "config": run.config,
                "versions": versions(),
                "answers": [dataclasses.asdict(answer) for answer in answers],
                "results": results,
            },
        )
    print()
    for answer in answers:
        print(f"{answer.verdict:<30} {answer.claim}: {answer.measured}")
    print(f"\n{pictures} pictures; {run.directory}/answers.json")


def begin(name: str, setting: Setting, config: Mapping[str, Any], attacks: Sequence[str] = PAPER) -> Study:
    """Runs or continues the explaining that a study looks at, and opens the study's directory.

    Args:
        name: of the study.
        setting: what the user asked.
        config: what else determines the analysis.
        attacks: the attacks if the user names none.

    Raises:
        ValueError, OSError: as `jaxinterp.explain.explain`.
    """
    out = setting.out or Path("results/study") / setting.model
    found = explain(
        setting.pictures,
        model=setting.model,
        specs=setting.attack or attacks,
        cell=setting.cell,
        method=setting.maps,
        out=out,
        labels=setting.labels,
        limit=setting.limit,
        seed=setting.seed,
        batch_size=setting.batch_size,
    )
    run = open_run(out / name, {"study": name, "run": found.run.config, **config})
    return Study(name, found, run, setting.seed)


def survey(name: str, setting: Asked, chosen: Mapping[str, Attack], config: Mapping[str, Any]) -> Job:
    """Opens the pictures and the results directory of a study that attacks by itself; see `jaxinterp.job.begin`."""
    return job.begin(
        name,
        setting.pictures,
        model=setting.model,
        chosen=chosen,
        config={"cell": setting.cell, **config},
        check=lambda network: effect.grid(network.image_size, network.image_size, setting.cell),
        out=setting.out or Path("results") / name / setting.model,
        labels=setting.labels,
        data_dir=None,
        limit=setting.limit,
        seed=setting.seed,
        batch_size=setting.batch_size,
        say=print,
    )


def problem(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Clean and adversarial images, true classes and targets of a chunk."""
    return arrays["clean"], arrays["adversarial"], arrays["labels"], arrays["targets"]


def verdict(estimate: Estimate, above: float) -> str:
    """Whether the interval lies above a value, below it, or around it."""
    if estimate.count < 2:
        return UNDECIDED
    if estimate.low > above:
        return CONFIRMED
    return NOT_CONFIRMED if estimate.high < above else UNDECIDED


# Studies of units


@dataclasses.dataclass(frozen=True)
class Units(Setting):
    """What studies of units are asked beside what `Setting` has.

    Attributes:
        data: Folder in Broden's format that tells what the units detect; where there is none, one is made of the
            installed pictures and textures, as `jaxinterp broden make` does.
        node: Layers; may be given several times. None means the last feature map.
        quantile: Share of positions that exceed a unit's threshold.
    """

    data: Path = Path("results/broden")
    node: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    quantile: float = 0.005


def dissected(setting: Units, out: Path | None = None, model: str | tuple[Network, Params] | None = None) -> Dissected:
    """The layers of the network, dissected once for all studies that share a results directory.

    Args:
        setting: what the user asked.
        out: results directory of the dissection; None means beside the study's run.
        model: a network and its parameters, where it is not the one in `setting`.

    Raises:
        ValueError, OSError: as `jaxinterp.concepts.dissect`, and as `jaxinterp.broden.make`.
    """
    from jaxinterp import broden, concepts

    group = processes.current()
    if group.first and not setting.data.exists():
        print(f"{setting.data} does not exist and is made of the installed pictures")
        broden.make((), setting.data)
    group.wait()
    prepared = concepts.prepare(
        f"broden:{setting.data}", model=model or setting.model, nodes=setting.node, quantile=setting.quantile
    )
    if out is None:
        nodes = "" if not setting.node else "-" + file_name("-".join(setting.node))
        out = Path("results/dissect") / f"{setting.model}{nodes}"
    return concepts.dissect(prepared, out, cache=setting.data.with_name(setting.data.name + ".packed"))
