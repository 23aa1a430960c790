"""What is computed for a chunk of pictures: the attack, the effect of every cell, the maps and their scores."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import attacks, cam, effect, localize, parallel
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.driver import example_keys
from jaxinterp.data import Batch, DamagedImage, Source, batches
from jaxinterp.explain.pictures import Pictures, Progress, Selection, classify, silent
from jaxinterp.network import Network, Params
from jaxinterp.runs import Run


def explain_batch(
    network: Network,
    params: Params,
    attack: Attack,
    batch: Batch,
    targets: np.ndarray,
    *,
    cell: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Attacks one batch and explains the perturbations.

    Args:
        network: the network.
        params: its parameters.
        attack: the attack.
        batch: pictures [B,H,W,C]; rows that only pad it are dropped from the result.
        targets: [B] the class that each picture is attacked towards.
        cell: side of a cell, in pixels.
        seed: of the attack's randomness and the shuffled control.
        progress: see `Progress`.

    Returns:
        Arrays by name, the picture being their first axis.
    """
    mesh = parallel.data_mesh()
    params = parallel.replicate(params, mesh)
    model = network.bind(params)
    clean, labels, wanted = parallel.shard((batch.images, batch.labels, targets), mesh)
    key = jax.random.key(seed)
    state = attacks.start(attack, model, clean, labels, wanted, key=key)
    pieces = min(50, attack.iterations)
    for piece in range(pieces):
        progress(f"attack {piece / pieces:4.0%}", 0.0)
        state = attacks.advance(attack, model, state, -(-attack.iterations // pieces))
        if attacks.finished(state):
            break
    found = attacks.finish(attack, state)
    # Rows that only pad the batch are left unperturbed, which makes their cells free.
    mask = parallel.shard(batch.mask, mesh)
    adversarial = jnp.where(mask[:, None, None, None], found.images, clean)
    progress("cells", 0.0)
    cells = effect.pse(model, clean, adversarial, labels, wanted, cell)
    jax.block_until_ready(cells)
    progress("maps", 0.0)
    both = jnp.stack([labels, wanted], axis=1)
    before = cam.maps(network, params, clean, both)
    after = cam.maps(network, params, adversarial, both)
    four = jnp.stack([before[:, 0], after[:, 0], before[:, 1], after[:, 1]], axis=1)
    delta = adversarial - clean
    shuffled = localize.shuffled_score(delta, before[:, 0], example_keys(key, clean))
    result = {
        "adversarial": adversarial,
        "adversarial_class": classify(model, adversarial),
        **{name: getattr(found, name) for name in ("success", "l0", "l1", "l2", "linf")},
        **{name: getattr(found, name) for name in ("iterations", "forward", "backward")},
        **{name: getattr(cells, name) for name in ("suppression", "promotion", "ratio", "kind", "norm")},
        "pse_forward": cells.forward,
        "maps": four,
        "is_label": localize.interpretability_score(delta, before[:, 0]),
        "is_target": localize.interpretability_score(delta, after[:, 1]),
        "is_null": localize.null_score(delta, before[:, 0]),
        "is_shuffled": shuffled,
    }
    kept = {name: np.asarray(value)[batch.mask] for name, value in result.items()}
    kept["ids"] = np.array([i for i, keep in zip(batch.ids, batch.mask, strict=True) if keep], dtype=np.str_)
    kept["labels"], kept["targets"] = batch.labels[batch.mask], targets[batch.mask]
    kept["clean"] = batch.images[batch.mask]
    return kept


def parts(
    run: Run,
    network: Network,
    params: Params,
    source: Source,
    pictures: Pictures,
    chosen: Mapping[str, Attack],
    *,
    cell: int,
    seed: int,
    batch_size: int,
    progress: Progress = silent,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every finished chunk, (name of the attack, arrays as `explain_batch` gives them), computed or read back.

    Chunks come picture by picture, all attacks of one before the next, so that a stopped run has whole comparisons.
    """
    positions = pictures.correct
    size = chunk_size(pictures, batch_size)
    for start in range(0, len(positions), size):
        chunk = positions[start : start + size]
        batch = None
        for name, attack in chosen.items():
            part = _part_name(name, start)
            arrays = run.read_part(part)
            if arrays is None:
                progress(name, 0.0)
                if batch is None:
                    selection = Selection(source, tuple(int(i) for i in pictures.indices[chunk]))
                    batch = next(iter(batches(selection, size, on_damaged=_gone)))
                    batch = dataclasses.replace(batch, labels=_padded(pictures.labels[chunk], size))
                arrays = explain_batch(
                    network,
                    params,
                    attack,
                    batch,
                    _padded(pictures.targets[chunk], size),
                    cell=cell,
                    seed=seed,
                    progress=lambda what, done, name=name: progress(f"{name}: {what}", done),
                )
                run.write_part(part, arrays)
            yield name, arrays
            progress(name, len(chunk) / len(chosen))


def chunk_size(pictures: Pictures, batch_size: int) -> int:
    """How many pictures are attacked at once: `batch_size` or all there are, a multiple of the devices."""
    unit = parallel.multiple(parallel.data_mesh())
    return -(-min(batch_size, max(1, len(pictures.correct))) // unit) * unit


def stored_parts(
    run: Run, names: Iterable[str], pictures: Pictures, batch_size: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Every chunk of a finished run, read back in order."""
    for start in range(0, len(pictures.correct), chunk_size(pictures, batch_size)):
        for name in names:
            arrays = run.read_part(_part_name(name, start))
            if arrays is not None:
                yield name, arrays


def _part_name(attack: str, start: int) -> str:
    return f"{safe_name(attack)}-{zlib.crc32(attack.encode()):08x}-{start:06d}"


def _gone(error: DamagedImage) -> None:
    raise ValueError(f"{error}; it could be read when the run began")


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """Values for a batch of `size`, the last one repeated."""
    return np.concatenate([values, np.repeat(values[-1:], size - len(values))]).astype(np.int32)


def safe_name(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80] or "_"
