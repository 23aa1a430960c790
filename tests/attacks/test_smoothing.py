"""The smoothing operator against dense matrices in float64, and what follows from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxinterp.attacks import smooth
from jaxinterp.attacks.smoothing import Smoother

BATCH, SIDE, CHANNELS = 3, 8, 2
SMALL = {"alpha": 0.95, "lam": 10.0}  # the authors' values for small images, and for large ones
LARGE = {"alpha": 0.997, "lam": 300.0, "iterations": 200}


def pictures(seed: int, shape=(BATCH, SIDE, SIDE, CHANNELS)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 1, shape)


def noise(seed: int, shape=(BATCH, SIDE, SIDE, CHANNELS)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


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
    expected = dense_smooth(z, images, setting["alpha"], setting["lam"], normalised)
    found = smooth(z.astype(np.float32), images.astype(np.float32), **setting, normalised=normalised)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_fifty_iterations_are_as_close_as_their_bound_says():
    """With the values for large images, for which 50 iterations leave an error."""
    shape = (1, 40, 40, 1)
    z, images = noise(0, shape).astype(np.float32), jnp.asarray(0.1 * pictures(1, shape), jnp.float32)
    few, many = (Smoother.of(images, 0.997, 300.0, normalised=False, iterations=n) for n in (50, 1000))
    solution = many(z)
    error = few(z) - solution
    k = np.sqrt(1.997 / 0.003)
    left = np.sqrt(np.vdot(error, many.inverse(error)) / np.vdot(solution, many.inverse(solution)))
    assert 1e-4 < left < 2 * ((k - 1) / (k + 1)) ** 50


def test_normalised_smoothing_keeps_constants_and_stays_within_the_values():
    images = pictures(1).astype(np.float32)
    constant = np.full_like(images, 0.37)
    np.testing.assert_allclose(smooth(constant, images, **SMALL), constant, rtol=1e-6)
    assert np.abs(np.asarray(smooth(constant, images, **SMALL, normalised=False)) - constant).max() > 0.01
    z = noise(2).astype(np.float32)
    r = np.asarray(smooth(z, images, **SMALL))
    assert (r.min((1, 2)) > z.min((1, 2))).all()  # weighted means, every channel by itself
    assert (r.max((1, 2)) < z.max((1, 2))).all()


@pytest.mark.parametrize("normalised", [True, False])
def test_with_alpha_zero_nothing_changes(normalised):
    z, images = noise(0).astype(np.float32), pictures(1).astype(np.float32)
    np.testing.assert_array_equal(smooth(z, images, 0.0, 10.0, normalised=normalised), z)


def test_the_plain_operator_is_symmetric_and_the_transposed_one_is_the_transposed_one():
    u, v, images = noise(0).astype(np.float32), noise(1).astype(np.float32), jnp.asarray(pictures(2), jnp.float32)
    plain, normalised = (Smoother.of(images, **SMALL, normalised=n) for n in (False, True))
    assert np.vdot(u, plain(v)) == pytest.approx(np.vdot(plain(u), v), rel=1e-4)
    assert np.vdot(u, normalised(v)) == pytest.approx(np.vdot(normalised.transposed(u), v), rel=1e-4)
    assert np.vdot(u, normalised(v)) != pytest.approx(np.vdot(normalised(u), v), rel=1e-2)


def test_the_inverse_undoes_it():
    z, images = noise(0).astype(np.float32), jnp.asarray(pictures(1), jnp.float32)
    smoother = Smoother.of(images, **SMALL)
    np.testing.assert_allclose(smoother.inverse(smoother(z)), z, atol=1e-4)


def test_derivatives_against_finite_differences_of_the_dense_solution():
    """In z and, through weights and normalisation, in the images; reverse and forward mode."""
    z, images, by_r = noise(0), pictures(1), noise(2)
    dz, dx, h = noise(3), noise(4), 1e-5

    def slope(along):
        ends = [
            np.vdot(by_r, dense_smooth(z + s * (along == "z") * dz, images + s * (along == "x") * dx, 0.9, 5.0, True))
            for s in (h, -h)
        ]
        return (ends[0] - ends[1]) / (2 * h)

    def loss(z, images):
        return jnp.vdot(jnp.asarray(by_r, jnp.float32), smooth(z, images, 0.9, 5.0))

    at = jnp.asarray(z, jnp.float32), jnp.asarray(images, jnp.float32)
    by_z, by_x = jax.jit(jax.grad(loss, (0, 1)))(*at)
    assert np.vdot(by_z, dz) == pytest.approx(slope("z"), rel=1e-4)
    assert np.vdot(by_x, dx) == pytest.approx(slope("x"), rel=1e-3)
    tangents = jnp.zeros_like(at[0]), jnp.asarray(dx, jnp.float32)
    assert jax.jvp(loss, at, tangents)[1] == pytest.approx(slope("x"), rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 9, 7, 3), (8, 1, 5, 1)])
def test_a_batch_is_its_examples_one_by_one_on_any_devices(shape):
    z, images = noise(0, shape).astype(np.float32), pictures(1, shape).astype(np.float32)
    alpha, lam = np.linspace(0, 0.99, 8).astype(np.float32), np.linspace(0, 50, 8).astype(np.float32)
    whole = np.asarray(smooth(z, images, alpha, lam))
    for i in range(8):
        one = smooth(z[i : i + 1], images[i : i + 1], float(alpha[i]), float(lam[i]))
        assert np.asarray(one).tobytes() == whole[i : i + 1].tobytes()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put((z, images), NamedSharding(mesh, PartitionSpec("data")))
    found = smooth(*spread, alpha, lam)
    assert len(found.sharding.device_set) == 8
    assert np.asarray(found).tobytes() == whole.tobytes()
    order = [3, 3, 0, 7, 5]
    assert np.asarray(smooth(z[order], images[order], alpha[order], lam[order])).tobytes() == whole[order].tobytes()


def test_nothing_crosses_an_edge():
    """Noise on the left half of a picture of two halves stays there; on a flat picture it does not."""
    halves = np.zeros((1, 8, 8, 1), np.float32)
    halves[:, :, 4:] = 0.5
    z = noise(0, halves.shape).astype(np.float32) * (halves == 0)
    r = np.asarray(smooth(z, halves, 0.997, 300.0))
    assert np.abs(r[:, :, :4]).max() > 1e-2
    assert np.abs(r[:, :, 4:]).max() < 1e-20
    assert np.abs(np.asarray(smooth(z, 0 * halves, 0.997, 300.0))[:, :, 4:]).max() > 1e-3


def test_pixels_without_neighbours_stay_as_they_are():
    """On a chessboard every weight is exp(-300), which underflows."""
    board = (np.indices((8, 8)).sum(0) % 2).astype(np.float32)[None, :, :, None]
    z = noise(0, board.shape).astype(np.float32)
    np.testing.assert_array_equal(smooth(z, board, 0.997, 300.0), z)
    slopes = jax.grad(lambda x: jnp.vdot(z, smooth(z, x, 0.997, 300.0)))(jnp.asarray(board))
    assert np.isfinite(np.asarray(slopes)).all()


def test_numbers_whose_squares_vanish_are_smoothed_as_others_are():
    z, images = noise(0).astype(np.float32), pictures(1).astype(np.float32)
    tiny = np.float32(2.0**-100)
    np.testing.assert_array_equal(smooth(tiny * z, images, **SMALL), tiny * np.asarray(smooth(z, images, **SMALL)))
    np.testing.assert_array_equal(smooth(0 * z, images, **SMALL), 0)


def test_a_turned_perturbation_has_its_length_on_the_support():
    z, images = noise(0).astype(np.float32), jnp.asarray(pictures(1), jnp.float32)
    support = np.zeros(z.shape, bool)
    support[:, :, :5] = True
    r = np.asarray(Smoother.of(images, **SMALL).turned(z, support))
    np.testing.assert_allclose(np.linalg.norm(r.reshape(3, -1), axis=1), np.linalg.norm(z.reshape(3, -1), axis=1), 1e-5)
    assert not r[~support].any()


def test_defaults_follow_the_size():
    for side, setting in ((64, (0.95, 10.0)), (65, (0.997, 300.0))):
        z, images = noise(0, (1, side, 3, 1)).astype(np.float32), pictures(1, (1, side, 3, 1)).astype(np.float32)
        np.testing.assert_array_equal(smooth(z, images), smooth(z, images, *setting))


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
