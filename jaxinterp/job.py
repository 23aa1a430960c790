"""What every job on pictures begins with: network, pictures, a results directory, what the network sees rightly."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinterp import attacks, parallel, processes
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.driver import coerce
from jaxinterp.attacks.spec import from_spec, record
from jaxinterp.data import AnySource, Crop, Folder, Tfds, open_source
from jaxinterp.network import Network, Params
from jaxinterp.pictures import Pictures, Progress, Selection, left_out, survey
from jaxinterp.processes import open_run
from jaxinterp.runs import Run
from jaxinterp.supplies import supplied
from jaxinterp.watermarks import read as read_watermarks
from jaxinterp.weights import checkpoint, digest, load

Say = Callable[[str], None]
"""Is told what a person should know, line by line."""

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} pictures [{elapsed}<{remaining}]"
_LARGEST_SEED = 2**32 - 1  # beyond, seeds of JAX repeat; numpy takes none below 0
_MOST_STEPS = 2**31 - 1
_SAMPLES = {1000: "samples:imagenet", 10: "samples:cifar10"}  # by number of classes


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that has looked at its pictures and attacks next.

    Attributes:
        run: the results directory.
        network: the network that is attacked.
        params: its parameters.
        attacks: by name, with texts and pictures for images of the network's size, see `jaxinterp.supplies`.
        source: the pictures that were asked for.
        pictures: what the network makes of them.
        label_origin: where the labels come from, in words.
    """

    run: Run
    network: Network
    params: Params
    attacks: dict[str, Attack]
    source: Selection
    pictures: Pictures
    label_origin: str


def begin(
    command: str,
    pictures: Sequence[str | Path],
    *,
    model: str,
    chosen: Mapping[str, Attack],
    config: Mapping[str, Any],
    check: Callable[[Network], object],
    out: Path,
    labels: str,
    data_dir: Path | None,
    limit: int | None,
    seed: int,
    batch_size: int,
    say: Say,
    watermarks: str | Path | None = None,
) -> Job:
    """Loads the network, opens the pictures and the results directory, and classifies the clean pictures.

    Args:
        command: name of the job.
        pictures: files and folders, or one source as `jaxinterp.data.open_source` takes it; none means the labelled
            pictures of the `samples` extra.
        model: name of the network; its weights must have been converted.
        chosen: attacks by the name under which tables list them.
        config: what else determines the results.
        check: raises ValueError where the job does not suit the network.
        out: results directory.
        labels: "auto", "names", "predicted", or the path of a labels file; see `jaxinterp.data.Folder`.
        data_dir: where TensorFlow data sets were prepared.
        limit: use only the first so many pictures.
        seed: 0 to 2^32 - 1.
        batch_size: pictures that are looked at at once.
        say: see `Say`.
        watermarks: a folder of class folders of pictures, for attacks that embed them.

    Raises:
        ValueError: bad arguments, no pictures, no weights, an output directory of another config, no picture that
            the network classifies correctly.
        OSError: the results cannot be written.
    """
    for name, value in (("--batch-size", batch_size), ("--limit", 1 if limit is None else limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_seed(seed)
    network, params = load(model)
    check(network)
    marks = None if watermarks is None else read_watermarks(watermarks, network.image_size)
    equipped = supplied(chosen, network.image_size, marks)
    _check_starts(equipped.values(), network, params)
    crop = Crop(network.image_size, network.crop_pct, network.interpolation)
    if not pictures:
        pictures = [_SAMPLES.get(network.num_classes, "samples")]
    source = open_source(
        pictures if len(pictures) > 1 else pictures[0],
        crop=crop,
        classes=network.classes,
        labels=labels,
        data_dir=data_dir,
    )
    count = len(source) if limit is None else min(limit, len(source))
    run = open_run(
        out,
        {
            "command": command,
            "model": model,
            "weights": digest(model),
            "attacks": {name: record(attack) for name, attack in chosen.items()},
            **config,
            **({} if marks is None else {"watermarks": marks.digest}),
            "seed": seed,
            "batch_size": batch_size,
            "pictures": count,
            "source": identity(source, pictures, count),
        },
    )
    selected = Selection(source, tuple(range(count)))
    origin = _label_origin(source, count)
    say(f"{count} pictures; labels: {origin}")
    if marks is not None:
        say(f"{len(marks.ids)} watermarks in {len(marks.folders)} folders")
        for name, reason in marks.damaged:
            say(f"  left out: {name}: {reason}")

    unit = parallel.multiple(parallel.data_mesh())
    if batch_size % unit:
        say(f"--batch-size {batch_size} is not a multiple of the {unit} devices: some of them have less to do")
    with tqdm(total=count, unit="picture", desc="reading pictures", leave=False) as bar:
        seen = survey(
            run,
            network,
            params,
            selected,
            seed=seed,
            batch_size=batch_size,
            progress=_shown(bar),
        )
    for name, reason in left_out(network, seen):
        say(f"  {name}: {reason}")
    say(f"{len(seen.correct)} of {count} pictures are classified correctly and attacked")
    if not seen.ids:
        raise ValueError("no picture could be read, so there is nothing to attack")
    if not len(seen.correct):
        raise ValueError("no picture is classified correctly, so there is nothing to attack")
    return Job(run, network, params, equipped, selected, seen, origin)


def _label_origin(source: AnySource, count: int) -> str:
    """Where the labels of the first `count` pictures come from; of a data set, all or none have one."""
    if isinstance(source, Tfds) or np.all(source.labels < 0) or np.all(source.labels[:count] >= 0):
        return source.label_origin
    missing = np.sum(source.labels[:count] < 0)
    return f"{source.label_origin}; for {missing} of {count} pictures, the network's own prediction"


def _check_starts(chosen: Iterable[Attack], network: Network, params: Params) -> None:
    """Raises ValueError or TypeError where an attack does not suit images of the network's size; computes nothing."""
    size, label = network.image_size, jax.ShapeDtypeStruct((1,), jnp.int32)
    for channels in (3, 1):  # which the network takes
        image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
        try:
            jax.eval_shape(lambda params, image: network.bind(params)(image), params, image)
            break
        except (TypeError, ValueError):
            continue
    else:
        return  # as the pictures will be told
    for attack in chosen:

        def start(params, image, label, target, key, attack=attack):
            return attacks.start(attack, network.bind(params), image, label, target, key=key)

        jax.eval_shape(start, params, image, label, label, jax.eval_shape(jax.random.key, 0))


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that JAX or numpy does not take."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"--seed must be from 0 to {_LARGEST_SEED}, got {seed}")


@contextlib.contextmanager
def attacking(pictures: Pictures, done: int) -> Iterator[Progress]:
    """The bar of the attacked pictures over all processes, of which so many are done.

    At its end it waits until all processes have done their share.
    """
    with tqdm(total=len(pictures.correct), initial=done, bar_format=BAR) as bar:
        progress = _shown(bar)
        yield progress
        bar.set_description_str("waiting for the other processes" if processes.current().count > 1 else "done")
        processes.current().wait(lambda: progress("", 0.0))
        bar.update(len(pictures.correct) - bar.n)
        bar.set_description_str("done")


def _shown(bar: tqdm) -> Progress:
    """Progress of all processes on a bar."""
    group, before = processes.current(), bar.n
    group.begin_stage()

    def progress(what: str, done: float) -> None:
        group.report(done)
        if what:
            bar.set_description_str(what, refresh=not done)
        bar.update(before + group.done - bar.n)

    return progress


def choose_attacks(specs: Sequence[str], presets: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Attack]:
    """Attacks by their text, see `jaxinterp.attacks.spec`.

    Raises:
        ValueError: none, one given twice, an unknown one, a parameter out of range.
    """
    chosen: dict[str, Attack] = {}
    for spec in specs:
        if spec in chosen:
            raise ValueError(f"attack {spec} is given twice")
        chosen[spec] = from_spec(spec, attacks.ATTACKS, presets)
        coerce(chosen[spec])
        if chosen[spec].iterations > _MOST_STEPS:
            raise ValueError(f"attack {spec} has more than {_MOST_STEPS} steps in all")
    if not chosen:
        raise ValueError("at least one attack is needed")
    return chosen


def identity(source: AnySource, pictures: Sequence[str | Path], count: int) -> str:
    """What tells one set of pictures from another: ids, labels and contents, or the name of a prepared data set."""
    if isinstance(source, Tfds):
        return str(pictures[0])
    whole = hashlib.sha256()
    for i, (name, label) in enumerate(zip(source.ids[:count], source.labels[:count], strict=True)):
        content = (
            _file_digest(source.paths[i]) if isinstance(source, Folder) else checkpoint.tensor_digest(source.images[i])
        )
        whole.update(f"{name}\t{int(label)}\t{content}\n".encode())
    return f"sha256 of ids, labels and pictures: {whole.hexdigest()}"


def _file_digest(path: str) -> str:
    """sha256 of a picture's file; empty where there is nothing to read, which is said when it should be decoded."""
    try:
        return checkpoint.file_digest(Path(path)) if Path(path).is_file() else ""
    except OSError:
        return ""
