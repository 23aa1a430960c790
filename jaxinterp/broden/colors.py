"""Eleven colour names for every colour.

The names are the basic colour terms of English (Berlin and Kay, "Basic Color Terms", 1969), as in Broden. Broden looked
names up in the table that van de Weijer, Schmid, Verbeek, Larlus, "Learning Color Names for Real-World Applications",
IEEE Trans. Image Processing 2009, learnt from photographs. Here a colour has the name of the nearest of some 400 named
colours in CIE L*a*b* (D65, 2 degrees). Those are the colours of a survey of 222,500 sessions in which people named what
they saw on their screens (R. Munroe, "Color survey results", 2010; the data are in the public domain), as far as their
names end in a basic term and have no other: "dark green" and "sky blue" stand for green and blue. Like Broden's, the
table has 32 levels a channel.
"""

from __future__ import annotations

import functools

import numpy as np

NAMES = ("black", "blue", "brown", "grey", "green", "orange", "pink", "purple", "red", "white", "yellow")
"""The names, without the suffix "-c" that they have among Broden's labels."""

_BITS = 3  # that the table leaves out
# "Reddish brown" is both. "Very light pink" and "very dark green" are white and black to the eye.
_STEMS = ("black", "blue", "bluis", "brown", "grey", "green", "orang", "pink", "purpl", "red", "white", "yellow")
_NOT_AS_NAMED = ("pale grey", "deep brown")  # #fdfdfe and #410200


def color_names(pixels: np.ndarray) -> np.ndarray:
    """The position in `NAMES` of every pixel's colour.

    Args:
        pixels: uint8 [...,3], sRGB.

    Returns:
        uint8 [...].
    """
    table = _table()
    return table[pixels[..., 0] >> _BITS, pixels[..., 1] >> _BITS, pixels[..., 2] >> _BITS]


@functools.cache
def _table() -> np.ndarray:
    """uint8 [32,32,32], by R, G and B: the name of one colour in each cell; black and white are among these."""
    prototypes, names = _prototypes()
    levels = np.linspace(0, 255, 256 >> _BITS)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    colors = _lab(grid)
    nearest = [np.argmin(((part[:, None] - prototypes) ** 2).sum(-1), axis=1) for part in np.array_split(colors, 64)]
    table = names[np.concatenate(nearest)].reshape([len(levels)] * 3)
    table.flags.writeable = False  # it is kept
    return table


def _prototypes() -> tuple[np.ndarray, np.ndarray]:
    """Named colours in L*a*b*, [K,3], and the positions of their names in `NAMES`, uint8 [K]."""
    from matplotlib.colors import XKCD_COLORS, to_rgb

    colors, names = [], []
    for full, color in XKCD_COLORS.items():
        words = full.removeprefix("xkcd:").replace("gray", "grey").split()
        mixed = any(word.startswith(_STEMS) for word in words[:-1])
        if words[-1] in NAMES and words[0] != "very" and not mixed and " ".join(words) not in _NOT_AS_NAMED:
            colors.append([255 * level for level in to_rgb(color)])
            names.append(NAMES.index(words[-1]))
    return _lab(np.array(colors)), np.array(names, np.uint8)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """SRGB in 0..255 as CIE L*a*b* with the white point D65 (IEC 61966-2-1, CIE 15)."""
    level = rgb / 255
    linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
