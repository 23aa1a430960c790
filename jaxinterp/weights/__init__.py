"""Weights: another framework's file -> strict name map -> Orbax checkpoint with a manifest -> verified load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from jaxinterp.network import Network
    from jaxinterp.weights.checkpoint import Placement


def convert(name: str, *, file: Path | None = None, root: Path | None = None, force: bool = False) -> Path:
    """Converts the weights of a network to an Orbax checkpoint; nothing is done where a sound one exists.

    Args:
        name: the network, such as "efficientnet_lite0".
        file: a file of weights, see `jaxinterp.weights.files`; None takes the one in the installed weight package.
        root: folder of checkpoints; None means `checkpoint.default_root()`.
        force: convert again even where a sound checkpoint of the same source exists.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: unknown network; no package installed; a damaged file, or one that does not fit.
        OSError: the file cannot be read, or the checkpoint not written.
    """
    from jaxinterp import models
    from jaxinterp.weights import checkpoint, conversion

    found = conversion.prepare(name, file)
    root = checkpoint.default_root() if root is None else Path(root)
    folder = root / name
    if not force and folder.is_dir():
        try:
            if checkpoint.read_manifest(folder, name=name)["source"].get("sha256") == found.sha256:
                checkpoint.load(folder, models.shapes(name, found.classes), name=name)
                return folder
        except ValueError:
            pass  # not sound: it is written anew
    source = {
        "file": found.file.name,
        "sha256": found.sha256,
        "known": found.sha256 == checkpoint.known_digests(root).get(name, {}).get("sha256"),
        **found.origin,
    }
    params, classes, notes = found.params(), found.classes, found.notes()
    del found  # the file's own tensors are in the way when the writer copies the parameters
    checkpoint.save(params, folder, name=name, classes=classes, source=source, notes=notes)
    return folder


def load(
    name: str, *, root: Path | None = None, placement: Placement | None = None
) -> tuple[Network, dict[str, jax.Array]]:
    """A network and its converted, verified weights.

    Args:
        name: the network, such as "efficientnet_lite0"; or an ensemble, see `ensemble_of`, such as
            "efficientnet_lite0+efficientnet_lite1".
        root: folder of checkpoints; None means `checkpoint.default_root()`.
        placement: where the parameters go: a sharding for all of them (replicated over a mesh, for instance), or a
            function from a parameter's name and shape to its sharding; None means the default device, without
            being committed to it.

    Raises:
        ValueError: unknown network (with the closest names), no checkpoint (with what to run), or a damaged one
            (with the tensor); an ensemble that cannot be.
    """
    from jaxinterp import models
    from jaxinterp.weights import checkpoint

    if is_ensemble(name):
        from jaxinterp import ensemble

        names, weights, options = ensemble_of(name)
        members = [load(member, root=root, placement=placement) for member in names]
        return ensemble.of(members, weights=weights, name=name, **options)
    models.network(name)  # an unknown name is said before a missing checkpoint
    folder = (checkpoint.default_root() if root is None else Path(root)) / name
    classes = checkpoint.read_manifest(folder, name=name)["classes"]
    params = checkpoint.load(folder, models.shapes(name, classes), name=name, placement=placement)
    return models.network(name, classes), params


def is_ensemble(name: str) -> bool:
    """Whether `name` is one of an ensemble, see `ensemble_of`."""
    return "+" in name or "*" in name or ":" in name


def ensemble_of(name: str) -> tuple[list[str], list[float], dict[str, Any]]:
    """Members, weights and options in the name of an ensemble: `[WEIGHT*]NAME+[WEIGHT*]NAME...[:OPTION=VALUE,...]`.

    Options are those of `jaxinterp.ensemble.of`: `combine` (logits or losses) and `image_size`, such as
    `resnet50+2*vgg16:combine=losses`.

    Raises:
        ValueError: a weight that is no number, or an unknown option.
    """
    whole, _, given = name.partition(":")
    names, weights = [], []
    for part in whole.split("+"):
        weight, star, member = part.rpartition("*")
        try:
            weights.append(float(weight) if star else 1.0)
        except ValueError:
            raise ValueError(f"model {name}: expected a number before *, got {weight!r}") from None
        names.append(member.strip())
    options: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        option, _, value = (text.strip() for text in part.partition("="))
        if option not in ("combine", "image_size"):
            raise ValueError(f"model {name}: unknown option {option!r}; known: combine, image_size")
        if option == "image_size" and not value.isdigit():
            raise ValueError(f"model {name}: image_size must be a whole number, got {value!r}")
        options[option] = int(value) if option == "image_size" else value
    return names, weights, options


def digest(name: str, *, root: Path | None = None) -> str:
    """What tells the converted weights of a network from others: the sha256 of their source; of several, one each.

    Raises:
        ValueError: no checkpoint, see `load`.
    """
    from jaxinterp.weights import checkpoint

    root = checkpoint.default_root() if root is None else root
    names = ensemble_of(name)[0] if is_ensemble(name) else [name]
    return "+".join(checkpoint.read_manifest(root / member, name=member)["source"]["sha256"] for member in names)
