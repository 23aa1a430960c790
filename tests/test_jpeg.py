"""The JPEG of the device against files that Pillow writes and reads."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp.jpeg import recompress, to_levels

QUALITIES = (1, 24, 50, 75, 95, 100)


def pictures(height, width):
    """Noise, saturated blocks of colour, and a ramp: one for each quality, as levels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, height, width, 3))
    blocks = rng.choice([0, 255], (2, -(-height // 5), -(-width // 5), 3)).repeat(5, 1).repeat(5, 2)[:, :height, :width]
    ramp = np.stack(np.broadcast_arrays(*np.ogrid[:height, :width], 40), -1) * 255 // max(height, width, 40)
    return np.concatenate([noise, blocks, [ramp, 255 - ramp]]).astype(np.uint8)


def by_pillow(pixels, quality):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize("size", [(32, 48), (37, 21), (6, 3)])  # whole units of the format, odd sides, too narrow
def test_pixels_are_those_of_a_file_bit_for_bit(size):
    given = pictures(*size)
    expected = np.stack([by_pillow(*pair) for pair in zip(given, QUALITIES, strict=True)])
    found = jax.jit(recompress)(jnp.float32(given) / 255, jnp.float32(QUALITIES))
    np.testing.assert_array_equal(np.asarray(to_levels(found)), expected)
    np.testing.assert_array_equal(found, np.float32(expected) / 255)
    assert np.abs(expected[:2].astype(int) - given[:2]).max() > 20  # something is lost


def test_values_are_rounded_to_levels_halves_upwards_and_clipped():
    values = jnp.float32([-0.1, 0.4 / 255, 2.5 / 255, 3.5 / 255, 254.4 / 255, 1.2])
    np.testing.assert_array_equal(to_levels(values), [0, 0, 3, 4, 254, 255])


def test_grey_images_are_refused():
    with pytest.raises(ValueError, match=r"images must be RGB \[B,H,W,3\], got shape \(1, 8, 8, 1\)"):
        recompress(jnp.zeros((1, 8, 8, 1)))
