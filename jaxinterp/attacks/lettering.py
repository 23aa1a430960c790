"""Text over images, rendered beforehand to masks of coverage: placed and blended by pure functions.

    x' = x + a m (colour - x)

with m in [0, 1] the coverage of every pixel by the letters and a the opacity. A `Bank` holds every text in every size
and at every angle (`jaxinterp.typesetting` renders them), so that a search can try them inside a compiled program;
`place` moves one of them or repeats it on a grid, in integers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jaxinterp.pytree import pytree


@pytree
class Bank:
    """Texts in every size and at every angle, for images of one size.

    Attributes:
        tiles: [N,H,W] coverage, 0 to 255, of each text in the upper left corner of an image.
        ink: [N,2] rows and columns that it takes there.
        period: [N,2] rows and columns after which it is repeated on a grid: its own and a gap of the font's size, at
            most the image's.
    """

    tiles: UInt8[Array, "n h w"]
    ink: Int[Array, "n 2"]
    period: Int[Array, "n 2"]

    def __len__(self) -> int:
        return self.tiles.shape[0]


def place(tile: UInt8[Array, "h w"], period: Int[Array, " 2"], offset: Int[Array, " 2"]) -> Float[Array, "h w"]:
    """The coverage, in [0, 1], of an image by a text that begins at `offset` and comes again after every `period`.

    Args:
        tile: of a bank.
        period: rows and columns; those of the image for a single text.
        offset: row and column of its upper left corner.
    """
    height, width = tile.shape
    rows = (jnp.arange(height) - offset[0]) % period[0]
    columns = (jnp.arange(width) - offset[1]) % period[1]
    return tile[rows[:, None], columns[None, :]].astype(jnp.float32) / 255


def blend(
    images: Float[Array, "*b h w c"],
    mask: Float[Array, "*b h w"],
    opacity: Float[Array, "*#b"] | float,
    colour: Float[Array, "*#b c"],
) -> Float[Array, "*b h w c"]:
    """The images under a colour, where and as far as the mask covers them.

    Args:
        images: in [0, 1].
        mask: coverage in [0, 1].
        opacity: of the colour at full coverage; more than 1 is 1.
        colour: in [0, 1].
    """
    alpha = jnp.minimum(jnp.asarray(opacity), 1.0)[..., None, None] * mask
    return jnp.clip(images + alpha[..., None] * (colour[..., None, None, :] - images), 0.0, 1.0)
