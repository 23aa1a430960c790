"""Trees of labels, which say how far two classes are from each other.

A tree is given for digits, Fashion-MNIST, CIFAR-10 and, coarsely, ImageNet; any other comes from a file: WordNet's
hypernyms, as ImageNet distributes them (`wordnet.is_a.txt`), with a file that names the synset of each class.
"""

from __future__ import annotations

import dataclasses
import functools
import graphlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxinterp.network import suggest

FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
"""The classes of Fashion-MNIST, in order."""


@dataclasses.dataclass(frozen=True, eq=False)
class LabelTree:
    """What lies above each label. A label may have several parents, as in WordNet.

    Attributes:
        name: how messages call it.
        parents: label -> the labels right above it.
    """

    name: str
    parents: Mapping[str, tuple[str, ...]]

    def distances(self, classes: Sequence[str]) -> np.ndarray:
        """[K,K] int32, steps between two classes: up to a common ancestor and down again, by the shortest way.

        Raises:
            ValueError: a class that the tree misses (named, with the closest ones), two classes without a common
                ancestor, or labels that are above themselves.
        """
        labels = {*self.parents, *(parent for above in self.parents.values() for parent in above)}
        missing = [c for c in dict.fromkeys(classes) if c not in labels]
        if missing:
            more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
            raise ValueError(
                f"the label tree {self.name} misses the class {missing[0]!r}{more}{suggest(missing[0], labels)}"
            )
        above = [self._above(label) for label in classes]
        number = {label: i for i, label in enumerate(dict.fromkeys(a for ways in above for a in ways))}
        try:
            graphlib.TopologicalSorter({label: self.parents.get(label, ()) for label in number}).prepare()
        except graphlib.CycleError as error:
            way = " above ".join(map(repr, error.args[1]))
            raise ValueError(f"the label tree {self.name}: labels are above themselves: {way}") from None
        far = 2**20  # more than any way
        up = np.full((len(classes), len(number)), far, np.int32)
        for row, ways in zip(up, above, strict=True):
            row[[number[label] for label in ways]] = list(ways.values())
        result = np.stack([np.min(row + up, axis=1) for row in up]).astype(np.int32)
        apart = np.argwhere(result >= far)
        if len(apart):
            a, b = (classes[i] for i in apart[0])
            raise ValueError(f"the label tree {self.name}: {a!r} and {b!r} have no common ancestor")
        return result

    def _above(self, label: str) -> dict[str, int]:
        """The label itself and all above it, with the number of steps."""
        found, level, steps = {label: 0}, [label], 0
        while level:
            steps += 1
            level = list(dict.fromkeys(p for each in level for p in self.parents.get(each, ()) if p not in found))
            found.update(dict.fromkeys(level, steps))
        return found


def read(path: str | Path) -> LabelTree:
    """A tree from a file with a line for each pair, "PARENT CHILD"; labels with blanks are separated by a tab.

    Lines that are empty or begin with # are left out.

    Raises:
        ValueError: a line that is no pair, a label that is its own parent, no pair at all.
        OSError: the file cannot be read.
    """
    parents: dict[str, list[str]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pair = [part.strip() for part in (line.split("\t") if "\t" in line else line.split())]
        if len(pair) != 2 or not all(pair) or pair[0] == pair[1]:
            raise ValueError(
                f"{path}, line {number}: expected PARENT CHILD, two different labels, got {line.strip()!r}"
            )
        parents.setdefault(pair[1], []).append(pair[0])
    if not parents:
        raise ValueError(f"{path}: expected lines PARENT CHILD, found none")
    return LabelTree(str(path), {child: tuple(dict.fromkeys(above)) for child, above in parents.items()})


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The label of every class in the tree: the first word of each line, such as "n01440764 tench, Tinca tinca".

    Raises:
        ValueError: no line.
        OSError: the file cannot be read.
    """
    words = [line.split()[0] for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not words:
        raise ValueError(f"{path}: expected a line for each class, found none")
    return tuple(words)


def nested(name: str, tree: Mapping[str, object] | Sequence[str], root: str = "anything") -> LabelTree:
    """A tree from nested mappings that end in sequences of labels.

    Raises:
        ValueError: a label that occurs twice.
    """
    parents: dict[str, tuple[str, ...]] = {}

    def walk(above: str, below: Mapping[str, object] | Sequence[str]) -> None:
        for label in below:
            if label in parents:
                raise ValueError(f"the label tree {name} has {label!r} twice")
            parents[label] = (above,)
            if isinstance(below, Mapping):
                walk(label, below[label])  # type: ignore[arg-type]  # mappings all the way down, then sequences

    walk(root, tree)
    return LabelTree(name, parents)


def given(name: str) -> LabelTree:
    """The tree for a known set of classes: one of `GIVEN`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in GIVEN:
        raise ValueError(f"unknown label tree {name!r}{suggest(name, GIVEN)}, or a file with lines PARENT CHILD")
    return GIVEN[name]()


def open_tree(tree: str | Path) -> LabelTree:
    """A given tree by its name, or that in a file. Errors are those of `given` and `read`."""
    return read(tree) if Path(tree).is_file() else given(str(tree))


# ImageNet's classes are numbered along WordNet, so ranges of numbers are a coarse tree. Where they end is our choice.
_IMAGENET = {
    ("animal", "vertebrate", "fish"): ((0, 6), (389, 397)),
    ("animal", "vertebrate", "bird"): ((7, 24), (80, 100), (127, 146)),
    ("animal", "vertebrate", "amphibian"): ((25, 32),),
    ("animal", "vertebrate", "reptile"): ((33, 68),),
    ("animal", "invertebrate", "arthropod"): ((69, 79), (118, 126), (300, 326)),
    ("animal", "invertebrate", "other invertebrate"): ((107, 117), (327, 329)),
    ("animal", "vertebrate", "mammal", "marsupial"): ((102, 106),),
    ("animal", "vertebrate", "mammal", "sea mammal"): ((147, 150),),
    ("animal", "vertebrate", "mammal", "dog"): ((151, 268),),
    ("animal", "vertebrate", "mammal", "wild dog"): ((269, 280),),
    ("animal", "vertebrate", "mammal", "cat"): ((281, 293),),
    ("animal", "vertebrate", "mammal", "bear"): ((294, 299),),
    ("animal", "vertebrate", "mammal", "small mammal"): ((330, 338), (356, 364)),
    ("animal", "vertebrate", "mammal", "ungulate"): ((339, 355),),
    ("animal", "vertebrate", "mammal", "primate"): ((365, 384),),
    ("animal", "vertebrate", "mammal", "large mammal"): ((101, 101), (385, 388)),
    ("thing", "artefact"): ((398, 923), (999, 999)),
    ("thing", "food"): ((924, 935), (959, 969)),
    ("thing", "plant"): ((936, 958), (984, 998)),
    ("thing", "place"): ((970, 980),),
    ("animal", "vertebrate", "mammal", "person"): ((981, 983),),
}


@functools.cache
def _imagenet() -> LabelTree:
    from jaxinterp.models import imagenet_classes

    names, parents = imagenet_classes(), {}
    for path, ranges in _IMAGENET.items():
        for above, label in zip(("anything", *path), path, strict=False):
            parents[label + ":"] = (above if above == "anything" else above + ":",)  # no class ends in a colon
        for low, high in ranges:
            parents.update({names[i]: (path[-1] + ":",) for i in range(low, high + 1)})
    return LabelTree("imagenet", parents)


GIVEN = {
    "digits": lambda: nested("digits", tuple("0123456789"), "digit"),
    "fashion": lambda: nested(
        "fashion",
        {
            "clothing": {
                "upper body": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
                "lower or whole body": ("Trouser", "Dress"),
            },
            "shoes": ("Sandal", "Sneaker", "Ankle boot"),
            "accessories": ("Bag",),
        },
    ),
    "cifar10": lambda: nested(
        "cifar10",
        {
            "animal": {"mammal": ("cat", "deer", "dog", "horse"), "other animal": ("bird", "frog")},
            "vehicle": {"on land": ("automobile", "truck"), "not on land": ("airplane", "ship")},
        },
    ),
    "imagenet": _imagenet,
}
"""Trees for known classes. That of ImageNet is coarse: two levels of things, up to five of animals."""
