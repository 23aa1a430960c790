"""The smoothing operator against dense matrices in float64, and what follows from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxinterp.attacks import smooth
from jaxinterp.attacks.smoothing import Smoother, by_image
from jaxinterp.canonical import canonical

BATCH, SIDE, CHANNELS = 3, 8, 2
SMALL, LARGE = (0.95, 10.0), (0.997, 300.0)  # the authors' alpha and lambda for small images, and for large ones


def pictures(seed: int, shape=(BATCH, SIDE, SIDE, CHANNELS)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, shape)


def noise(seed: int, shape=(BATCH, SIDE, SIDE, CHANNELS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def smoothed(z, images, alpha, lam, normalised=True) -> np.ndarray:
    """In iterations that are enough for the values for large images, too, and in one program."""
    return np.asarray(smooth(z, images, alpha, lam, normalised=normalised, iterations=200))


def dense(image: np.ndarray, alpha: float, lam: float, normalised: bool) -> np.ndarray:
    """The operator of one channel [h,w] as a matrix [h w,h w], entry by entry from the formulas, in float64."""
    height, width = image.shape
    w = np.zeros((height * width,) * 2)
    for i in range(height):
        for j in range(width):
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < height and m < width:
                    weight = np.exp(-lam * (float(image[i, j]) - float(image[k, m])) ** 2)
                    w[i * width + j, k * width + m] = w[k * width + m, i * width + j] = weight
    root = w.sum(1) ** -0.5
    a = (1 - alpha) * np.linalg.inv(np.eye(len(w)) - alpha * root[:, None] * w * root)
    return a / a.sum(1, keepdims=True) if normalised else a


def dense_smooth(z: np.ndarray, images: np.ndarray, alpha: float, lam: float, normalised: bool) -> np.ndarray:
    found = np.zeros_like(z, np.float64)
    for b in range(len(z)):
        for c in range(z.shape[-1]):
            matrix = dense(images[b, :, :, c], alpha, lam, normalised)
            found[b, :, :, c] = (matrix @ z[b, :, :, c].ravel()).reshape(z.shape[1:3])
    return found


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("setting", [SMALL, LARGE], ids=["small", "large"])
def test_conjugate_gradients_against_a_dense_solution(setting, normalised):
    z, images = noise(0), 0.3 * pictures(1)
    alpha, lam = setting
    expected = dense_smooth(z, images, alpha, lam, normalised)
    found = smoothed(z.astype(np.float32), images.astype(np.float32), alpha, lam, normalised)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.exhaustive
def test_fifty_iterations_are_as_close_as_their_bound_says():
    """With the values for large images, for which 50 iterations leave an error."""
    shape = (1, 40, 40, 1)
    z, images = noise(0, shape).astype(np.float32), 0.1 * pictures(1, shape).astype(np.float32)

    few, many = (smooth(z, images, *LARGE, normalised=False, iterations=n) for n in (50, 1000))
    whole = jax.jit(lambda r: Smoother.of(jnp.asarray(images), *LARGE, normalised=False).inverse(r))
    k = np.sqrt(1.997 / 0.003)
    left = np.sqrt(np.vdot(few - many, whole(few - many)) / np.vdot(many, whole(many)))
    assert 1e-4 < left < 2 * ((k - 1) / (k + 1)) ** 50


def test_normalised_smoothing_keeps_constants_and_stays_within_the_values():
    images = pictures(1).astype(np.float32)
    constant = np.full_like(images, 0.37)
    np.testing.assert_allclose(smoothed(constant, images, *SMALL), constant, rtol=1e-6)
    assert np.abs(smoothed(constant, images, *SMALL, False) - constant).max() > 0.01
    z = noise(2).astype(np.float32)
    r = smoothed(z, images, *SMALL)
    assert (r.min((1, 2)) > z.min((1, 2))).all()  # weighted means, every channel by itself
    assert (r.max((1, 2)) < z.max((1, 2))).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_with_alpha_zero_nothing_changes(normalised):
    z, images = noise(0).astype(np.float32), pictures(1).astype(np.float32)
    np.testing.assert_array_equal(smoothed(z, images, 0.0, 10.0, normalised), z)


@pytest.mark.parametrize("normalised", [True, False])
def test_transposed_and_inverse_are_what_they_are_called(normalised):
    """The plain operator is symmetric, the normalised one is not."""
    u, v, images = noise(0), noise(1), np.concatenate([pictures(2)] * 2)

    @jax.jit
    def programs(both, images):
        s = Smoother.of(images, *SMALL, normalised=normalised)
        r = s(both)
        return r, s.transposed(both), s.inverse(r)

    both = np.concatenate([u, v]).astype(np.float32)
    forward, transposed, back = map(np.asarray, programs(both, images.astype(np.float32)))
    of_u, of_v = np.split(forward, 2)
    assert np.vdot(u, of_v) == pytest.approx(np.vdot(transposed[:BATCH], v), rel=1e-4)
    symmetric = np.vdot(u, of_v) == pytest.approx(np.vdot(of_u, v), rel=1e-4)
    assert symmetric == (not normalised)
    np.testing.assert_allclose(back, both, atol=1e-4)


def loss(z, images, by_r, alpha, lam):
    return jnp.vdot(by_r, smooth(z, images, alpha, lam))


def test_derivatives_against_finite_differences_of_the_dense_solution():
    """In z and, through weights and normalisation, in the images."""
    z, images, by_r = noise(0), pictures(1), noise(2)
    dz, dx, h = noise(3), noise(4), 1e-5

    def slope(dz, dx):
        ends = [float(np.vdot(by_r, dense_smooth(z + s * dz, images + s * dx, 0.9, 5.0, True))) for s in (h, -h)]
        return (ends[0] - ends[1]) / (2 * h)

    at = [jnp.asarray(each, jnp.float32) for each in (z, images, by_r, 0.9, 5.0)]
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    by_z, by_x = gradients(*at)
    assert np.vdot(by_z, dz) == pytest.approx(slope(dz, 0), rel=1e-4)
    assert np.vdot(by_x, dx) == pytest.approx(slope(0, dx), rel=1e-3)
    # Where every weight underflows nothing is infinite either.
    by_z, by_x = gradients(at[0], board(), at[2], jnp.float32(0.997), jnp.float32(300))
    np.testing.assert_array_equal(by_z, at[2])
    np.testing.assert_array_equal(by_x, 0)


@pytest.mark.exhaustive
def test_forward_mode_agrees_with_reverse_mode():
    at = [jnp.asarray(each, jnp.float32) for each in (noise(0), pictures(1), noise(2), 0.9, 5.0)]
    tangents = [jnp.asarray(each, jnp.float32) for each in (noise(3), noise(4), 0 * noise(2), 0.0, 0.0)]
    by_z, by_x = jax.grad(loss, (0, 1))(*at)
    expected = np.vdot(by_z, tangents[0]) + np.vdot(by_x, tangents[1])
    assert jax.jvp(loss, at, tangents)[1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 9, 7, 3), pytest.param((8, 1, 5, 1), marks=pytest.mark.exhaustive)])
def test_a_batch_is_its_examples_one_by_one_on_any_devices(shape):
    z, images = jnp.asarray(noise(0, shape), jnp.float32), jnp.asarray(pictures(1, shape), jnp.float32)
    alpha, lam = jnp.linspace(0, 0.99, 8), jnp.linspace(0, 50, 8)
    whole = np.asarray(smooth(z, images, alpha, lam))
    for i in range(8):
        one = smooth(z[i : i + 1], images[i : i + 1], alpha[i], lam[i])
        assert np.asarray(one).tobytes() == whole[i : i + 1].tobytes()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    z_spread, images_spread = jax.device_put((z, images), NamedSharding(mesh, PartitionSpec("data")))
    found = smooth(z_spread, images_spread, alpha, lam)
    assert len(found.sharding.device_set) == 8
    assert np.asarray(found).tobytes() == whole.tobytes()
    order = np.array([3, 3, 0, 7, 5, 1, 1, 2])
    assert np.asarray(smooth(z[order], images[order], alpha[order], lam[order])).tobytes() == whole[order].tobytes()


def test_nothing_crosses_an_edge():
    """Noise on the left half of a picture of two halves stays there; on a flat picture it does not."""
    halves = np.zeros((BATCH, SIDE, SIDE, CHANNELS), np.float32)
    halves[:, :, 4:] = 0.5
    z = noise(0).astype(np.float32) * (halves == 0)
    r = smoothed(z, halves, *LARGE)
    assert np.abs(r[:, :, :4]).max() > 1e-2
    assert np.abs(r[:, :, 4:]).max() < 1e-20
    assert np.abs(smoothed(z, 0 * halves, *LARGE)[:, :, 4:]).max() > 1e-3


def board() -> jnp.ndarray:
    """A chessboard, on which every weight is exp(-lambda)."""
    squares = (np.indices((SIDE, SIDE)).sum(0) % 2).astype(np.float32)
    return jnp.broadcast_to(squares[None, :, :, None], (BATCH, SIDE, SIDE, CHANNELS))


def test_pixels_without_neighbours_stay_as_they_are():
    z = noise(0).astype(np.float32)
    np.testing.assert_array_equal(smoothed(z, board(), *LARGE), z)


def test_numbers_whose_squares_vanish_are_smoothed_as_others_are():
    z, images = noise(0).astype(np.float32), pictures(1).astype(np.float32)
    tiny = np.float32(2.0**-100)
    np.testing.assert_array_equal(smoothed(tiny * z, images, *SMALL), tiny * smoothed(z, images, *SMALL))
    np.testing.assert_array_equal(smoothed(0 * z, images, *SMALL), 0)


@pytest.mark.parametrize("normalised", [True, False])
def test_once_is_what_the_operator_does(normalised):
    z, images = noise(0).astype(np.float32), pictures(1).astype(np.float32)
    operator = jax.jit(canonical(lambda z, images: Smoother.of(images, *SMALL, normalised=normalised)(z)))
    found = np.asarray(smooth(z, images, *SMALL, normalised=normalised))
    assert found.tobytes() == np.asarray(operator(z, images)).tobytes()


def test_a_turned_perturbation_has_its_length_on_the_support():
    z, images = noise(0).astype(np.float32), jnp.asarray(pictures(1), jnp.float32)
    support = np.zeros(z.shape, bool)
    support[:, :, :5] = True
    turned = jax.jit(lambda images, z, support: Smoother.of(images, *SMALL).turned(z, support))
    r = np.asarray(turned(images, z, support))
    np.testing.assert_allclose(np.linalg.norm(r.reshape(3, -1), axis=1), np.linalg.norm(z.reshape(3, -1), axis=1), 1e-5)
    assert not r[~support].any()


def test_defaults_follow_the_size():
    for side, expected in ((64, SMALL), (65, LARGE)):
        for shape in ((2, side, 3, 1), (2, 3, side, 1)):
            found = by_image(jnp.zeros(shape), None, None)
            np.testing.assert_allclose(found, np.repeat(np.array(expected)[:, None], 2, 1))


GOOD = np.zeros((1, 4, 4, 1), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD[0], GOOD), ValueError, r"z must be \[B,H,W,C\], got shape \(4, 4, 1\)"),
        ((GOOD, GOOD[0]), ValueError, r"images must be \[B,H,W,C\], got shape \(4, 4, 1\)"),
        ((GOOD, GOOD[:, :3]), ValueError, r"z must have the images' shape \(1, 3, 4, 1\), got \(1, 4, 4, 1\)"),
        ((GOOD.astype(int), GOOD), TypeError, "z must be floats, got int"),
        ((GOOD, GOOD, 1.0), ValueError, r"alpha must be in \[0, 1\), got 1.0"),
        ((GOOD, GOOD, -0.1), ValueError, r"alpha must be in \[0, 1\), got -0.1"),
        ((GOOD, GOOD, float("nan")), ValueError, "alpha must be in"),
        ((GOOD, GOOD, 0.5, -1.0), ValueError, "lam must be at least 0, finite, got -1.0"),
        ((GOOD, GOOD, 0.5, float("inf")), ValueError, "lam must be at least 0, finite, got inf"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        smooth(*arguments)


def test_no_iterations_are_bad_input():
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        smooth(GOOD, GOOD, iterations=0)
