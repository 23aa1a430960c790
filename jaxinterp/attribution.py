"""How much every pixel adds to the logit of a class.

    input x gradient       x_i dZ_c/dx_i                                   Shrikumar et al. 2016, arXiv 1605.01713
    integrated gradients   (x - b)_i mean_a dZ_c/dx_i (b + a (x - b))      Sundararajan et al. 2017, arXiv 1703.01365
    SmoothGrad             mean_e dZ_c/dx_i (x + e), e ~ N(0, sigma^2)     Smilkov et al. 2017, arXiv 1706.03825

Attributions have the shape of the images, a value for every channel; `heat` makes them maps. Integrated gradients sum
to Z_c(x) - Z_c(b) but for the error of the sum over a, which is taken at the middle of each step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxinterp.attacks.driver import check_several, example_keys, whole
from jaxinterp.canonical import canonical
from jaxinterp.draws import shaped, wrapped
from jaxinterp.network import Model, as_model
from jaxinterp.sharding import mesh_of, on_host, on_mesh, with_automatic_axes


@with_automatic_axes
def input_x_gradient(model: Model, images: Any, classes: Any) -> Float[Array, "b *n H W C"]:
    """The image times the gradient of a logit.

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1].
        classes: [B], or [B,n] for several classes at one forward pass.

    Returns:
        [B,H,W,C], or [B,n,H,W,C] for several classes.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`.
    """
    model, images, several, squeeze = _problem(model, images, classes)
    return squeeze(_input_x_gradient(mesh_of(images))(model, images, several))


@with_automatic_axes
def integrated_gradients(
    model: Model, images: Any, classes: Any, *, baseline: Any = 0.0, steps: int = 50
) -> Float[Array, "b *n H W C"]:
    """The difference to a baseline times the mean gradient on the way there.

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1].
        classes: [B], or [B,n] for several classes at one forward pass.
        baseline: a number, or an array that broadcasts to the images, in [0, 1].
        steps: gradients that are averaged, each at the middle of its step.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`; a baseline that does not broadcast or is not in
            [0, 1]; steps below 1 or not whole.
    """
    steps = whole(steps, "steps")
    model, images, several, squeeze = _problem(model, images, classes)
    return squeeze(_integrated(mesh_of(images))(model, images, several, over(images, baseline), jnp.int32(steps)))


@with_automatic_axes
def smoothgrad(
    model: Model,
    images: Any,
    classes: Any,
    *,
    key: jax.Array,
    samples: int = 50,
    sigma: float = 0.15,
    ids: Any = None,
) -> Float[Array, "b *n H W C"]:
    """The mean gradient over noisy copies of the image.

    Args:
        model: images -> logits.
        images: [B,H,W,C] float in [0, 1]. Noisy copies are not clipped.
        classes: [B], or [B,n] for several classes at one forward pass.
        key: a JAX random key; every image draws from its own.
        samples: number of noisy copies.
        sigma: standard deviation of the noise, in pixel units; the paper takes 10 to 20 % of the range.
        ids: as in `jaxinterp.attacks.run`.

    Raises:
        ValueError, TypeError: as `jaxinterp.attacks.run`; samples below 1 or not whole; a sigma that is
            negative or not finite.
    """
    samples = whole(samples, "samples")
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be finite and not negative, got {sigma}")
    model, images, several, squeeze = _problem(model, images, classes)
    keys = jax.random.key_data(example_keys(key, images, ids))
    program = _smooth(mesh_of(images))
    return squeeze(program(model, images, several, keys, jnp.float32(sigma), jnp.int32(samples)))


def heat(attribution: Float[Array, "*n H W C"]) -> Float[Array, "*n H W"]:
    """The sum over the channels of |attribution|: how much a pixel matters, whichever way."""
    return jnp.sum(jnp.abs(attribution), axis=-1)


def _problem(model: Model, images: Any, classes: Any):
    model = as_model(model)
    images, several = check_several(model, images, classes)
    return model, images, several, lambda result: result if np.ndim(classes) == 2 else result[:, 0]


def over(images: Float[Array, "b H W C"], baseline: Any) -> Float[Array, "b H W C"]:
    """A baseline, of the images' shape. Raises ValueError where it does not broadcast or is not in [0, 1]."""
    try:
        spread = jnp.broadcast_to(jnp.asarray(baseline, jnp.float32), images.shape)
    except ValueError:
        raise ValueError(f"baseline {np.shape(baseline)} must broadcast to the images {images.shape}") from None
    if not isinstance(spread, Tracer):
        known = on_host(baseline)
        if known.size and not (np.min(known) >= 0 and np.max(known) <= 1):
            raise ValueError(f"baseline must be finite and in [0, 1], got {np.min(known):g} to {np.max(known):g}")
    return spread


def _gradients(model: Model, x: Float[Array, "b H W C"], classes: Int[Array, "b n"]) -> Float[Array, "b n H W C"]:
    """Gradients of the logits of `classes`, at one forward pass."""
    logits, pull_back = jax.vjp(model, x)

    def of_class(c):
        return pull_back(jax.nn.one_hot(c, logits.shape[-1], dtype=logits.dtype))[0]

    if classes.shape[1] == 1:
        return of_class(classes[:, 0])[:, None]
    return jax.vmap(of_class, in_axes=1, out_axes=1)(classes)


@functools.cache
def _input_x_gradient(mesh):
    @canonical
    def program(model, images, classes):
        return images[:, None] * _gradients(model, images, classes)

    return on_mesh(mesh, program, (False, True, True))


def _mean(model, points, images, classes, count):
    """Mean gradient at `points(i)`, i = 0..count-1; the number of points does not compile anew."""
    zeros = jnp.zeros((images.shape[0], classes.shape[1], *images.shape[1:]))

    def add(i, total):
        return total + _gradients(model, points(i), classes)

    return lax.fori_loop(0, count, add, zeros) / count


@functools.cache
def _integrated(mesh):
    @canonical
    def program(model, images, classes, baseline, steps):
        def at(i):
            return baseline + (i + 0.5) / steps * (images - baseline)

        return (images - baseline)[:, None] * _mean(model, at, images, classes, steps)

    return on_mesh(mesh, program, (False, True, True, True, False))


@functools.cache
def _smooth(mesh):
    @canonical
    def program(model, images, classes, keys, sigma, samples):
        def noisy(i):
            def noise(data):
                key = jax.random.fold_in(wrapped(data), i)
                return shaped(jax.random.normal, key, images.shape[1:])

            return images + sigma * jax.vmap(noise)(keys)

        return _mean(model, noisy, images, classes, samples)

    return on_mesh(mesh, program, (False, True, True, True, False, False))
