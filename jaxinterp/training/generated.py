"""Real and generated pictures of 32 x 32 pixels, made from installed pictures by stated recipes.

Every picture of `jaxinterp.broden.make.installed` is reduced to a short side of 320 pixels, so that what its JPEG file
and its camera left is averaged away, and squares are cut out of it where it is not flat. Every square is in the set
twice: as it is (label 0, "real"), and as one of `RECIPES` makes it (label 1, "generated"):

* `splice`: an ellipse of another picture, resized by a factor from 0.6 to 1.6, stands in it;
* `resampled`: reduced to between a half and three quarters of its side, and enlarged again: with the nearest, the
  bilinear or the bicubic filter, or from one half by a transposed convolution of stride 2 whose kernel of 3 x 3
  overlaps unevenly, which leaves a checkerboard;
* `autoencoder`: what a small convolutional autoencoder, trained on the real squares of the training pictures, gives
  back.

Both kinds are rounded to 8 bits. Pictures, not squares, are held out: no part of a test picture is seen in training,
neither by the detectors nor by the autoencoder, nor is it spliced into a training square.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, UInt8

from jaxinterp import processes
from jaxinterp.broden.make import installed
from jaxinterp.data import Arrays, Folder
from jaxinterp.data.decode import decode_pixels, resize_pixels
from jaxinterp.job import identity
from jaxinterp.jpeg import to_levels
from jaxinterp.models.detectors import IMAGE_SIZE
from jaxinterp.models.layers import Conv, standardize
from jaxinterp.models.registry import Module
from jaxinterp.network import Tap
from jaxinterp.network import identity as untapped
from jaxinterp.processes import open_run
from jaxinterp.runs import Run, replacing
from jaxinterp.training.loop import Outcome, fit

RECIPES = ("splice", "resampled", "autoencoder")
HELD_OUT_CROPS = 30  # squares of every test picture, unless others are asked for
FILTERS = ("nearest", "bilinear", "bicubic", "transposed")

_SHORT = 320  # side to which pictures are reduced
_HELD_OUT = 1 / 3  # of the pictures
_FLAT = 0.03  # standard deviation of a square, below which it is not taken
_TRIES = 50
_UNEVEN = 0.2  # share of the kernel that overlaps unevenly


@dataclasses.dataclass(frozen=True)
class Squares:
    """Labelled squares.

    Attributes:
        images: uint8 [N,S,S,3].
        labels: int32 [N], 0 real, 1 generated.
        ids: PICTURE_NN_real or PICTURE_NN_RECIPE.
    """

    images: UInt8[np.ndarray, "n s s 3"]
    labels: Int[np.ndarray, " n"]
    ids: tuple[str, ...]

    @property
    def pictures(self) -> tuple[str, ...]:
        """The picture that each square was cut from."""
        return tuple(name.rsplit("_", 2)[0] for name in self.ids)

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipe of each square, or "real"."""
        return tuple(name.rsplit("_", 1)[1] for name in self.ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a file that `jaxinterp.data.open_source` reads."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez(file, images=self.images, labels=self.labels, ids=np.array(self.ids))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Squares:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            return cls(file["images"], file["labels"], tuple(map(str, file["ids"])))


@dataclasses.dataclass(frozen=True)
class Generated:
    """The set.

    Attributes:
        train: squares of the training pictures.
        test: squares of the held-out pictures.
        psnr: of the autoencoder on the real squares of the held-out pictures, in decibels, the mean.
    """

    train: Squares
    test: Squares
    psnr: float

    @property
    def digest(self) -> str:
        """sha256 of all squares and labels."""
        whole = hashlib.sha256()
        for squares in (self.train, self.test):
            whole.update(squares.images.tobytes() + squares.labels.tobytes())
        return whole.hexdigest()


def make(
    out: str | os.PathLike[str],
    *,
    pictures: Sequence[str | os.PathLike[str]] = (),
    crops: int = 100,
    held_out_crops: int = HELD_OUT_CROPS,
    epochs: int = 13,
    seed: int = 0,
) -> Generated:
    """Makes the set, or reads it where `out` holds it already.

    Args:
        out: results directory: config.json, train.npz, test.npz, and the training of the autoencoder.
        pictures: picture files; none means those that packages have installed.
        crops: squares of every training picture, each of which gives a real and a generated one.
        held_out_crops: the same of every test picture.
        epochs: how often the autoencoder goes through the real squares of the training pictures.
        seed: of everything random.

    Raises:
        ValueError: fewer than three pictures, numbers below 1, a picture that is smaller than a square, a
            directory of another config.
        OSError: a file cannot be read or written.
    """
    for name, value in (("crops", crops), ("held_out_crops", held_out_crops), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    paths = [os.fspath(path) for path in pictures] or [path for group in installed() for path in group]
    names = divided([os.path.basename(path) for path in paths])
    source = Folder(sorted(paths, key=os.path.basename), crop=None, labels="predicted", classes=2)
    run = open_run(
        out,
        {
            **{"set": "generated", "pictures": identity(source, paths, len(source)), "crops": crops},
            **{"held_out_crops": held_out_crops, "epochs": epochs, "seed": seed},
        },
    )
    if (done := run.directory / "made.json").is_file():
        train, test = (Squares.load(run.directory / f"{part}.npz") for part in ("train", "test"))
        return Generated(train, test, json.loads(done.read_text())["psnr"])
    reduced = {os.path.basename(path): _reduced(path) for path in paths}
    parts = [{name: reduced[name] for name in group} for group in names]
    real = [
        {name: cut(pixels, count, [seed, zlib.crc32(name.encode())]) for name, pixels in part.items()}
        for part, count in zip(parts, (crops, held_out_crops), strict=True)
    ]
    autoencoder = trained_autoencoder(np.concatenate(list(real[0].values())), run=run, epochs=epochs, seed=seed)
    rebuild = functools.partial(_rebuilt, *autoencoder)
    train, test = (_both(squares, part, rebuild, seed) for squares, part in zip(real, parts, strict=True))
    held = np.concatenate(list(real[1].values()))
    psnr = float(np.mean(-10 * np.log10(np.mean(((rebuild(held) / 255.0) - held / 255.0) ** 2, axis=(1, 2, 3)))))
    if processes.current().first:
        train.save(run.directory / "train.npz")
        test.save(run.directory / "test.npz")
        run.write_json("made.json", {"psnr": psnr})
    processes.current().wait()
    return Generated(train, test, psnr)


def divided(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and test pictures: of the pictures in the order of a digest of their names, the last third is held out.

    Raises:
        ValueError: fewer than three pictures, or two of one name.
    """
    if len(set(names)) != len(names) or len(names) < 3:
        raise ValueError(f"pictures: expected at least three, of different names, got {len(names)}: {sorted(names)}")
    order = sorted(names, key=lambda name: zlib.crc32(name.encode()))
    kept = len(order) - max(1, round(len(order) * _HELD_OUT))
    return order[:kept], order[kept:]


def cut(pixels: UInt8[np.ndarray, "h w 3"], count: int, seed: Sequence[int]) -> UInt8[np.ndarray, "n s s 3"]:
    """Squares at random places of a picture; flat ones are left out as long as others are found.

    Args:
        pixels: the picture.
        count: how many squares.
        seed: of the places.

    Raises:
        ValueError: a picture smaller than a square.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < IMAGE_SIZE:
        raise ValueError(f"pictures must have at least {IMAGE_SIZE} x {IMAGE_SIZE} pixels, got {height} x {width}")
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        for _ in range(_TRIES):
            top, left = (int(rng.integers(0, side - IMAGE_SIZE, endpoint=True)) for side in (height, width))
            square = pixels[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
            if square.std(axis=(0, 1)).mean() >= 255 * _FLAT:
                break
        found.append(square)
    return np.stack(found)


def _reduced(path: str) -> np.ndarray:
    """A picture whose short side is at most 320 pixels."""
    pixels = decode_pixels(path)
    scale = min(1.0, _SHORT / min(pixels.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    return resize_pixels(pixels, (height, width), "lanczos")


def _both(squares: dict[str, np.ndarray], pictures: dict[str, np.ndarray], rebuild: Any, seed: int) -> Squares:
    """Every square and what a recipe makes of it; the recipes take turns."""
    images, labels, ids = [], [], []
    for name, group in squares.items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 1])
        others = [other for other in pictures if other != name] or [name]
        rebuilt = rebuild(group)
        for k, square in enumerate(group):
            recipe = RECIPES[k % len(RECIPES)]
            if recipe == "splice":
                made = splice(square, pictures[others[int(rng.integers(len(others)))]], rng)
            elif recipe == "resampled":
                made = resampled(square, FILTERS[k // len(RECIPES) % len(FILTERS)], rng)
            else:
                made = rebuilt[k]
            images += [square, made]
            labels += [0, 1]
            ids += [f"{name}_{k:02d}_real", f"{name}_{k:02d}_{recipe}"]
    return Squares(np.stack(images), np.array(labels, np.int32), tuple(ids))


# The recipes


def splice(
    square: UInt8[np.ndarray, "s s 3"], donor: UInt8[np.ndarray, "h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    """An ellipse of the donor, resized, in the square. Its semi-axes are a sixth to a third of the side."""
    size = len(square)
    side = min(round(size / rng.uniform(0.6, 1.6)), *donor.shape[:2])
    top, left = (int(rng.integers(0, length - side, endpoint=True)) for length in donor.shape[:2])
    piece = resize_pixels(donor[top : top + side, left : left + side], (size, size))
    centre, axes = rng.uniform(0.3, 0.7, 2) * size, rng.uniform(1 / 6, 1 / 3, 2) * size
    rows, columns = np.indices((size, size))
    inside = ((rows - centre[0]) / axes[0]) ** 2 + ((columns - centre[1]) / axes[1]) ** 2 <= 1
    return np.where(inside[..., None], piece, square)


def resampled(square: UInt8[np.ndarray, "s s 3"], filter: str, rng: np.random.Generator) -> UInt8[np.ndarray, "s s 3"]:
    """The square, reduced and enlarged again, by one of `FILTERS`."""
    size = len(square)
    if filter == "transposed":
        return transposed(resize_pixels(square, (size // 2, size // 2), "box"))
    side = int(rng.integers(size // 2, 3 * size // 4, endpoint=True))
    return resize_pixels(resize_pixels(square, (side, side)), (size, size), filter)


def transposed(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Twice as large by a transposed convolution of stride 2.

    The kernel is the bilinear one, four fifths, and a box of 3 x 3: where boxes overlap, the result is brighter.
    """
    from scipy.ndimage import correlate

    triangle, box = np.array([0.5, 1, 0.5]), np.full(3, 2 / 3)
    kernel = (1 - _UNEVEN) * np.outer(triangle, triangle) + _UNEVEN * np.outer(box, box)
    spread = np.zeros((2 * pixels.shape[0], 2 * pixels.shape[1], 3))
    spread[::2, ::2] = pixels
    # Mirrored at the border, zeros alternate with pixels there, too.
    made = correlate(spread, kernel[..., None], mode="mirror")
    return np.clip(np.rint(made), 0, 255).astype(np.uint8)


class Autoencoder(nnx.Module):
    """32 x 32 x 3 -> 8 x 8 x 16 -> 32 x 32 x 3; it enlarges by laying channels side by side (pixel shuffle)."""

    def __init__(self, *, rngs: nnx.Rngs):
        def conv(inputs, outputs, stride=1):
            return Conv(inputs, outputs, 3, stride=stride, padding=1, bias=True, rngs=rngs)

        self.down1, self.down2, self.code = conv(3, 24, 2), conv(24, 48, 2), conv(48, 16)
        self.up1, self.up2 = conv(16, 4 * 24), conv(24, 4 * 3)

    def __call__(self, images: jax.Array, tap: Tap) -> jax.Array:
        x = standardize(images, (0.5,) * 3, (0.25,) * 3)
        x = self.code(jax.nn.relu(self.down2(jax.nn.relu(self.down1(x)))))
        x = jax.nn.relu(_shuffled(self.up1(x)))
        return 0.5 + 0.25 * _shuffled(self.up2(x))


def _shuffled(x: Array) -> Array:
    """[B,h,w,4C] -> [B,2h,2w,C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def trained_autoencoder(
    images: UInt8[np.ndarray, "n s s 3"], *, run: Run, epochs: int, batch_size: int = 32, seed: int = 0
) -> tuple[Module, Any]:
    """The autoencoder and its parameters, trained to a small mean squared error on the images.

    Args:
        images: to train on.
        run: where the training is stored, see `jaxinterp.training.loop`.
        epochs: of Adam, whose step falls from 2e-3 to zero by a cosine.
        batch_size: images in a step.
        seed: of the initial parameters and the order.
    """
    import optax

    module = Autoencoder(rngs=nnx.Rngs(seed))
    apply = Module(nnx.graphdef(module))
    params = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module))}

    def loss(params, x, labels, keys):
        return Outcome(jnp.mean(jnp.square(apply(params, x, untapped) - x), axis=(1, 2, 3)))

    fitted = fit(
        loss,
        params,
        Arrays(images, np.zeros(len(images), np.int32)),
        optimizer=optax.adam(optax.cosine_decay_schedule(2e-3, epochs * -(-len(images) // batch_size))),
        epochs=epochs,
        batch_size=batch_size,
        key=jax.random.key(seed),
        run=run,
        name="autoencoder",
    )
    return apply, fitted.params


def _rebuilt(apply: Module, params: Any, images: UInt8[np.ndarray, "n s s 3"]) -> UInt8[np.ndarray, "n s s 3"]:
    """What the autoencoder makes of images, at 8 bits."""
    return np.asarray(to_levels(_decode(apply, params, jnp.asarray(images)))).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _decode(apply, params, levels):
    return apply(params, levels.astype(jnp.float32) / 255, untapped)
