"""What is computed for a chunk of pictures: the attack, and what remains of it in an 8-bit picture."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jaxinterp import parallel
from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Attack, along
from jaxinterp.attacks.constraint import distance
from jaxinterp.attacks.diagnostics import norm_of
from jaxinterp.canonical import canonical
from jaxinterp.data import Batch, Source
from jaxinterp.jpeg import to_unit
from jaxinterp.network import Network, Params
from jaxinterp.pictures import Pictures, Progress, chunk_size, chunks, classify, load_chunk, part_name, silent
from jaxinterp.resumable import run_to_end
from jaxinterp.runs import Run, file_name, replacing, stem
from jaxinterp.sharding import on_mesh

NORMS = ("l0", "l1", "l2", "linf")
_LEVEL = 1e-3  # part of a level by which a ball may miss it for rounding
_RADIUS = 1e-4  # part of a radius that rounding may add


def evaluate_batch(
    network: Network,
    params: Params,
    attack: Attack,
    batch: Batch,
    targets: np.ndarray | None,
    *,
    seed: int,
    run: Run,
    part: str,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Attacks one batch and looks at the results once more after rounding.

    Args:
        network: the network.
        params: its parameters.
        attack: the attack.
        batch: pictures [B,H,W,C]; rows that only pad it are dropped from the result.
        targets: [B] the classes of a targeted attack, or None.
        seed: of the attack's randomness.
        run: where the state of a long attack is stored,
        part: and under which name.
        progress: see `Progress`.

    Returns:
        Arrays by name, the picture being their first axis.
    """
    mesh = parallel.data_mesh()
    model = network.bind(parallel.replicate(params, mesh))
    clean, labels, wanted = parallel.shard((batch.images, batch.labels, targets), mesh)
    found = run_to_end(
        attack,
        model,
        clean,
        labels,
        wanted,
        key=jax.random.key(seed),
        run=run,
        part=part,
        progress=lambda done: progress(f"attack {done:4.0%}", 0.0),
    )
    norm = norm_of(attack) if getattr(attack, "eps", None) is not None else None
    numbers = (getattr(attack, "eps", 0) if norm else 0, getattr(attack, "kappa", 0))
    eps, kappa = parallel.shard([np.full(len(batch.labels), number, np.float32) for number in numbers], mesh)
    rounded, distances, inside = _rounded(mesh, norm)(found.images, clean, eps)
    rounded_class, reached = _judged(mesh)(model, rounded, labels, wanted, kappa)
    result = {
        "adversarial": found.images,
        "rounded": rounded,
        "adversarial_class": classify(model, found.images),
        **{name: getattr(found, name) for name in ("success", *NORMS, "iterations", "forward", "backward")},
        "rounded_class": rounded_class,
        "rounded_success": found.success & reached,
        "rounded_inside": inside,
        **{f"rounded_{name}": distances[name] for name in ("linf", "l2")},
    }
    kept = {name: np.asarray(value)[batch.mask] for name, value in result.items()}
    kept["ids"] = np.array([i for i, keep in zip(batch.ids, batch.mask, strict=True) if keep], dtype=np.str_)
    kept["labels"] = batch.labels[batch.mask]
    kept["targets"] = (np.full(len(batch.mask), -1, np.int32) if targets is None else targets)[batch.mask]
    return kept


@functools.cache
def _rounded(mesh: Mesh | None, norm: str | None) -> Callable[..., tuple[jax.Array, dict[str, jax.Array], jax.Array]]:
    """(images, clean, eps) -> the images with 8 bits, their distances, and whether they are in the ball.

    In Linf a level outside the ball is replaced by the next one inside, if there is one. In other norms rounding may
    leave a ball. Where there is none, all are inside. The same bits in any batch, and those that are read from a PNG.
    """

    def of(images, clean, eps):
        levels = jnp.round(images * 255)
        if norm == "linf":
            lowest = jnp.ceil((clean - along(eps, clean)) * 255 - _LEVEL)
            highest = jnp.floor((clean + along(eps, clean)) * 255 + _LEVEL)
            levels = jnp.where(lowest <= highest, jnp.clip(levels, lowest, highest), levels)
        rounded = to_unit(jnp.clip(levels, 0, 255).astype(jnp.int32))
        distances = {name: distance(rounded - clean, name) for name in NORMS}
        if norm is None:
            return rounded, distances, jnp.ones(len(images), bool)
        inside = distances[norm] <= eps * (1 + _RADIUS) + (_LEVEL / 255 if norm == "linf" else 0)
        return rounded, distances, inside

    return on_mesh(mesh, canonical(of), (True, True, True))


@functools.cache
def _judged(mesh: Mesh | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(model, images, labels, targets, kappa) -> classes, and whether they are successes, as attacks judge them."""

    def of(model, images, labels, targets, kappa):
        logits = objective.single(model)(images)
        return jnp.argmax(logits, axis=-1), objective.succeeded(logits, labels, targets, kappa)

    return on_mesh(mesh, canonical(of), (False, True, True, True, True))


def compute_parts(
    run: Run,
    network: Network,
    params: Params,
    source: Source,
    pictures: Pictures,
    chosen: Mapping[str, Attack],
    *,
    targeted: bool,
    images: bool,
    seed: int,
    batch_size: int,
    starts: Iterable[int],
    progress: Progress = silent,
) -> None:
    """Computes what is missing of the chunks with the numbers `starts`: arrays as of `evaluate_batch`, but the images.

    The adversarial images are written before the chunk counts as finished.
    """
    size, every = chunk_size(pictures, batch_size), chunks(pictures, batch_size)
    for start in starts:
        chunk = every[start]
        batch, targets = None, None
        for name, attack in chosen.items():
            part = part_name(name, start)
            if run.read_part(part) is None:
                progress(name, 0.0)
                if batch is None:
                    batch, targets = load_chunk(source, pictures, chunk, size)
                arrays = evaluate_batch(
                    network,
                    params,
                    attack,
                    batch,
                    targets if targeted else None,
                    seed=seed,
                    run=run,
                    part=part,
                    progress=lambda what, done, name=name: progress(f"{name}: {what}", done),
                )
                adversarial, rounded = arrays.pop("adversarial"), arrays.pop("rounded")
                if images:
                    progress(f"{name}: pictures", 0.0)
                    _write_images(run.directory, name, arrays, adversarial, rounded)
                run.write_part(part, arrays)
                run.remove_state(part)
            progress(name, len(chunk) / len(chosen))


def image_path(attack: str, picture: str) -> Path:
    """The PNG of a success, in the results directory; the .npz lies beside it."""
    return Path("adversarial", file_name(attack), f"{stem(picture)}.png")


def _write_images(
    directory: Path, attack: str, arrays: Mapping[str, np.ndarray], adversarial: np.ndarray, rounded: np.ndarray
) -> None:
    """A .npz with the float image and its classes, and a PNG with the image of 8 bits, for every success."""
    for i, name in enumerate(arrays["ids"]):
        if not arrays["success"][i]:
            continue
        png = directory / image_path(attack, str(name))
        with replacing(png.with_suffix(".npz")) as file:
            fields = {key: arrays[key][i] for key in ("labels", "targets", "adversarial_class")}
            np.savez(file, image=adversarial[i], id=name, **fields)  # type: ignore[arg-type]  # arrays by name
        pixels = np.round(rounded[i] * 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
        with replacing(png) as file:
            file.write(buffer.getvalue())
