"""Image sources, and batches of one fixed shape.

A source is an indexable collection of examples (`Source`): pictures in folders (`Folder`), the samples that a
package registry delivers (`samples`), arrays in memory (`Arrays`). `batches` walks through any of them. Needs
numpy and Pillow only.
"""

from .batches import Batch, batches
from .decode import Crop, decode
from .folder import Folder
from .samples import samples
from .source import UNKNOWN, Arrays, DamagedImage, Example, Source

__all__ = [
    "UNKNOWN",
    "Arrays",
    "Batch",
    "Crop",
    "DamagedImage",
    "Example",
    "Folder",
    "Source",
    "batches",
    "decode",
    "samples",
]
