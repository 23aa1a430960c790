"""Smoothing that an image guides, even where it is flat and free at its edges (Zhang et al. 2019, arXiv 1903.11862).

The pixels of one channel are the nodes of a graph, each connected with its four neighbours by weights

    w_ij = exp(-lambda (x_i - x_j)^2),   S = D^-1/2 W D^-1/2,   D the sums of the rows of W

and a perturbation z becomes the r that minimises

    alpha/2 sum_ij w_ij (r_i / sqrt(d_i) - r_j / sqrt(d_j))^2 + (1 - alpha) ||r - z||^2,

    r = (1 - alpha) (I - alpha S)^-1 z,

plain, or normalised: divided by what becomes of ones, so that every r_i is a weighted mean of z and constants stay
what they are. The linear system is solved by conjugate gradients, every channel of every image by itself, with the same
number of iterations for all: no result depends on the batch (`jax.scipy.sparse.linalg.cg` has one step length for all
that it is given, and stops by the residual of all). I - alpha S is symmetric, so derivatives are one more solution of
the same system.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxinterp.attacks.attack import Real, along, norm, per_example
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static
from jaxinterp.sharding import mesh_of, on_mesh, with_automatic_axes

_SMALL = 64  # the largest side of what counts as a small image
_ALPHA = (0.95, 0.997)  # of small images and of others: the values of the authors' program
_LAM = (10.0, 300.0)
_ALONE = 1e-30  # a pixel whose weights add up to less has no neighbours
_TINY = 1e-30


@with_automatic_axes
def smooth(
    z: Any,
    images: Any,
    alpha: Real | None = None,
    lam: Real | None = None,
    *,
    normalised: bool = True,
    iterations: int = 50,
) -> Float[Array, "b h w c"]:
    """Smooths a perturbation as far as the images allow.

    Differentiable in z and in the images, as if the linear system were solved exactly. On CPU an example's result
    has the same bits in every batch.

    Args:
        z: [B,H,W,C] float, what is smoothed.
        images: [B,H,W,C] float, usually in [0, 1], whose pixels give the weights.
        alpha: how far to smooth, in [0, 1); with 0, r = z. One number, or one for every example; None means 0.95 where
            no side is longer than 64 pixels, else 0.997 (Zhang et al. 2019, section 5).
        lam: lambda, how much an edge of the image separates, not negative; likewise; None means 10 and 300.
        normalised: whether constants stay what they are.
        iterations: n, of conjugate gradients, which leave at most 2 ((sqrt(k) - 1) / (sqrt(k) + 1))^n of the solution
            as an error, in the system's own norm, with k = (1 + alpha) / (1 - alpha): after 50 of them 2e-7 with
            alpha = 0.95, and 0.04 with 0.997.

    Raises:
        ValueError: arrays of the wrong rank or of different shapes, alpha or lam out of range, no iterations.
        TypeError: arrays that are not floats.
    """
    z, images = jnp.asarray(z), jnp.asarray(images)
    for name, array in (("z", z), ("images", images)):
        if array.ndim != 4:
            raise ValueError(f"{name} must be [B,H,W,C], got shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floats, got {array.dtype}")
    if z.shape != images.shape:
        raise ValueError(f"z must have the images' shape {images.shape}, got {z.shape}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    check(alpha, lam)
    program = _program(mesh_of(images), normalised, iterations)
    return program(z, images, *by_image(images, alpha, lam))


@functools.cache
def _program(mesh: Mesh | None, normalised: bool, iterations: int):
    def of(z, images, alpha, lam):
        return once(z, images, alpha, lam, normalised=normalised, iterations=iterations)

    return on_mesh(mesh, canonical(of), (True, True, True, True))


def by_image(
    images: Float[Array, "b h w c"], alpha: Real | None, lam: Real | None
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Alpha and lambda of every image, where they are None those for its size."""
    large = max(images.shape[1:3]) > _SMALL
    return (
        per_example(_ALPHA[large] if alpha is None else alpha, images),
        per_example(_LAM[large] if lam is None else lam, images),
    )


def check(alpha: Any, lam: Any, owner: str = "") -> None:
    """Whether alpha and lambda make sense, where they are known.

    Args:
        alpha: one number, or several, or None.
        lam: likewise.
        owner: whose they are, for the message.

    Raises:
        ValueError: alpha is not in [0, 1), or lambda is negative or not finite.
    """
    for name, value, above, expected in (("alpha", alpha, 1, "in [0, 1)"), ("lam", lam, np.inf, "at least 0, finite")):
        if value is None or isinstance(value, Tracer):
            continue
        known = np.asarray(value, np.float64)
        if not np.all((known >= 0) & (known < above)):
            raise ValueError(f"{owner}{name} must be {expected}, got {value}")


@pytree
class Smoother:
    """The operator of every image of a batch.

    Attributes:
        right: alpha S between each pixel and its neighbour to the right, zero in the last column.
        below: alpha S between each pixel and the one below, zero in the last row.
        gain: factor of the solution of the linear system: 1 - alpha, or one over the solution for ones.
        iterations: of conjugate gradients.
    """

    right: Float[Array, "b c h w"]
    below: Float[Array, "b c h w"]
    gain: Float[Array, "b c h w"]
    iterations: int = static(default=50)

    @classmethod
    def of(
        cls,
        images: Float[Array, "b h w c"],
        alpha: Real | None = None,
        lam: Real | None = None,
        *,
        normalised: bool = True,
        iterations: int = 50,
    ) -> Smoother:
        """The operator that `images` guide; see `smooth` for the arguments."""
        x = jnp.moveaxis(images, -1, 1)
        share, sharpness = (along(value, x).astype(x.dtype) for value in by_image(images, alpha, lam))
        right, below = (
            jnp.exp(-sharpness * jnp.square(_moved(x, axis, 1) - x)) * _but_the_last(x, axis) for axis in (3, 2)
        )
        degree = (right + _moved(right, 3, -1)) + (below + _moved(below, 2, -1))
        connected = degree > _ALONE
        root = jnp.where(connected, 1 / jnp.sqrt(jnp.where(connected, degree, 1)), 0)
        right, below = (share * (weight * root * _moved(root, axis, 1)) for weight, axis in ((right, 3), (below, 2)))
        plain = cls(right, below, jnp.broadcast_to(1 - share, x.shape), iterations)
        if not normalised:
            return plain
        # The solution is at least one, as all that S adds to it is positive; the last iterate may not be.
        ones = lax.optimization_barrier(jnp.ones_like(x))  # or compilers begin to compute with them, number by number
        return cls(right, below, 1 / jnp.maximum(plain._solve(ones), 1), iterations)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """r, what becomes of z."""
        return jnp.moveaxis(self.gain * self._solve(jnp.moveaxis(z, -1, 1)), 1, -1)

    def transposed(self, gradient: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The gradient with respect to z, from that with respect to r."""
        return jnp.moveaxis(self._solve(self.gain * jnp.moveaxis(gradient, -1, 1)), 1, -1)

    def inverse(self, r: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """The z that becomes r."""
        return jnp.moveaxis(_times(self.right, self.below, jnp.moveaxis(r, -1, 1) / self.gain), 1, -1)

    def turned(self, z: Float[Array, "b h w c"], support: Any = None) -> Float[Array, "b h w c"]:
        """What becomes of z, on the support, with the Euclidean length of z: smoothing alone makes it far shorter."""
        return lengthened(self(z), z, support)

    def _solve(self, b: Float[Array, "b c h w"]) -> Float[Array, "b c h w"]:
        """(I - alpha S)^-1 b."""
        return lax.custom_linear_solve(
            functools.partial(_times, self.right, self.below),
            b,
            lambda _, b: _conjugate_gradients(self.right, self.below, b, self.iterations),
            symmetric=True,
        )


def once(
    z: Float[Array, "b h w c"],
    images: Float[Array, "b h w c"],
    alpha: Real | None = None,
    lam: Real | None = None,
    *,
    normalised: bool = True,
    iterations: int = 50,
) -> Float[Array, "b h w c"]:
    """What `Smoother.of(images, ...)(z)` is; z and the ones that normalise it are solved for in one loop."""
    plain = Smoother.of(images, alpha, lam, normalised=False, iterations=iterations)
    if not normalised:
        return plain(z)
    planes = jnp.moveaxis(z, -1, 1)
    ones = lax.optimization_barrier(jnp.ones_like(planes))
    twice = jax.tree.map(lambda weights: jnp.concatenate([weights, weights], axis=1), plain)
    solution, of_ones = jnp.split(twice._solve(jnp.concatenate([planes, ones], axis=1)), 2, axis=1)
    return jnp.moveaxis(1 / jnp.maximum(of_ones, 1) * solution, 1, -1)


def lengthened(r: Float[Array, "b h w c"], z: Float[Array, "b h w c"], support: Any = None) -> Float[Array, "b h w c"]:
    """What r is on the support, at the Euclidean length of z."""
    if support is not None:
        r = jnp.where(support, r, 0)
    wanted, found = jax.vmap(norm)(jnp.stack([z, r]))
    return along(wanted / jnp.maximum(found, _TINY), r) * r


def _times(
    right: Float[Array, "... h w"], below: Float[Array, "... h w"], p: Float[Array, "... h w"]
) -> Float[Array, "... h w"]:
    """(I - alpha S) p."""
    row, column = p.ndim - 2, p.ndim - 1
    across = right * _moved(p, column, 1) + _moved(right * p, column, -1)
    down = below * _moved(p, row, 1) + _moved(below * p, row, -1)
    return p - (across + down)


def _moved(x: Array, axis: int, by: int) -> Array:
    """What stands `by` further along the axis; zero beyond the end."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(-by * (i == axis), by * (i == axis), 0) for i in range(x.ndim)])


def _but_the_last(x: Array, axis: int) -> np.ndarray:
    """One for every index of an axis but the last, for which there is no neighbour."""
    size = x.shape[axis]
    ones = (np.arange(size) < size - 1).astype(x.dtype)
    return ones.reshape([size if i == axis else 1 for i in range(x.ndim)])


def _conjugate_gradients(
    right: Float[Array, "b c h w"], below: Float[Array, "b c h w"], b: Float[Array, "b c h w"], iterations: int
) -> Float[Array, "b c h w"]:
    """The solution of (I - alpha S) x = b for every plane [h,w], from x = 0.

    On CPU one image after the other, since what an iteration reads and writes then stays in the cache.
    """
    return lax.platform_dependent(
        right,
        below,
        b,
        cpu=lambda *batch: lax.map(lambda one: _iterated(one[0], one[1], one[2], iterations), batch),
        default=lambda right, below, b: _iterated(right, below, b, iterations),
    )


def _iterated(right, below, b, iterations):
    """Conjugate gradients on planes [...,h,w]."""
    # By a power of two, which changes no digit: the squares of very small numbers would vanish.
    largest = jnp.max(jnp.abs(b), axis=(-2, -1), keepdims=True)
    power = lax.reduce_precision(largest, exponent_bits=jnp.finfo(b.dtype).nexp, mantissa_bits=0)
    scale = jnp.where(power > 0, power, 1)
    b = b / scale

    def body(_, carry):
        x, r, p, size = carry
        product = _times(right, below, p)
        step = size / _or_one(_dot(p, product))
        x, r = x + step * p, r - step * product
        new = _dot(r, r)
        return x, r, r + new / _or_one(size) * p, new

    x, *_ = lax.fori_loop(0, iterations, body, (jnp.zeros_like(b), b, b, _dot(b, b)))
    return x * scale


def _or_one(x: Array) -> Array:
    """A divisor; where it is zero so is what it divides: the solution has been found."""
    return jnp.where(x > 0, x, 1)


def _dot(a: Array, b: Array) -> Array:
    """Scalar products of planes."""
    return jnp.sum(a * b, axis=(-2, -1), keepdims=True)
