"""Image sources, and batches of one fixed shape.

A source is an indexable collection of examples (`Source`): pictures in folders (`Folder`), the samples that a
package registry delivers (`samples`), prepared TensorFlow data sets (`Tfds`), a .npz file (`Npz`), arrays in memory
(`Arrays`). `open_source` makes one from a text, `batches` walks through any of them. Needs numpy and Pillow; for TFDS
also tensorflow-datasets, never TensorFlow.
"""

from .batches import Batch, batches
from .decode import Crop, decode
from .folder import Folder
from .npz import Npz
from .samples import samples
from .source import UNKNOWN, Arrays, DamagedImage, Example, Source
from .spec import AnySource, open_source
from .tfds import Tfds

__all__ = [
    "UNKNOWN",
    "AnySource",
    "Arrays",
    "Batch",
    "Crop",
    "DamagedImage",
    "Example",
    "Folder",
    "Npz",
    "Source",
    "Tfds",
    "batches",
    "decode",
    "open_source",
    "samples",
]
