"""Image sources, and batches of one fixed shape.

A source is an indexable collection of examples (`Source`): pictures in folders (`Folder`), the samples that a
package registry delivers (`samples`), prepared TensorFlow data sets (`Tfds`), MNIST and its like (`mnist5k`,
`idx_folder`), a .npz file (`Npz`), arrays in memory (`Arrays`). `open_source` makes one from a text, `batches` walks
through any of them. Needs numpy and Pillow; for TFDS also tensorflow-datasets, never TensorFlow.

A segmented source (`SegmentedSource`) has label maps with its images, for network dissection: a folder in Broden's
format (`Broden`, faster when it is `packed`), arrays in memory (`SegmentedArrays`). `segmented_batches` walks through
them.
"""

from .batches import Batch, SegmentedBatch, batches, segmented_batches
from .broden import Broden
from .decode import Crop, decode
from .folder import Folder
from .idx import Labelled, idx_folder, mnist5k
from .npz import Npz
from .packed import Packed, packed
from .samples import samples
from .segmentation import Concepts, Segmented, SegmentedArrays, SegmentedSource
from .source import UNKNOWN, Arrays, DamagedImage, Example, Source
from .spec import AnySource, open_source
from .tfds import Tfds

__all__ = [
    "UNKNOWN",
    "AnySource",
    "Arrays",
    "Batch",
    "Broden",
    "Concepts",
    "Crop",
    "DamagedImage",
    "Example",
    "Folder",
    "Labelled",
    "Npz",
    "Packed",
    "Segmented",
    "SegmentedArrays",
    "SegmentedBatch",
    "SegmentedSource",
    "Source",
    "Tfds",
    "batches",
    "decode",
    "idx_folder",
    "mnist5k",
    "open_source",
    "packed",
    "samples",
    "segmented_batches",
]
