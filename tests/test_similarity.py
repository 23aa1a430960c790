"""SSIM and PSNR against scikit-image."""

import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jaxinterp.similarity import psnr, ssim


def test_values_are_those_of_scikit_image(rng):
    images = rng.uniform(size=(4, 23, 18, 3)).astype(np.float32)
    images[1] = 0.3  # flat
    noise = np.array([0, 0.01, 0.1, 0.5]).reshape(4, 1, 1, 1) * rng.normal(size=images.shape)
    others = np.clip(images + noise, 0, 1).astype(np.float32)
    setting = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = list(zip(images, others, strict=True))
    expected = [structural_similarity(*(x.astype(float) for x in p), channel_axis=-1, **setting) for p in pairs]
    found = ssim(jnp.asarray(images), jnp.asarray(others))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert found[0] == 1
    expected = [peak_signal_noise_ratio(*pair, data_range=1.0) for pair in pairs[1:]]
    found = psnr(jnp.asarray(images), jnp.asarray(others))
    np.testing.assert_allclose(found[1:], expected, rtol=1e-5)
    assert np.isinf(found[0])


def test_images_smaller_than_the_window_are_refused():
    small = jnp.zeros((1, 10, 12, 3))
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels for SSIM, got \(10, 12\)"):
        ssim(small, small)
