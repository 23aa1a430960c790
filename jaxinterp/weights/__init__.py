"""Weights: another framework's file -> strict name map -> Orbax checkpoint with a manifest -> verified load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from jaxinterp.network import Network


def convert(name: str, *, file: Path | None = None, root: Path | None = None, force: bool = False) -> Path:
    """Converts the weights of a network to an Orbax checkpoint; nothing is done where a sound one exists.

    Args:
        name: the network, such as "efficientnet_lite0".
        file: a PyTorch state dict; None takes the one in the installed weight package.
        root: folder of checkpoints; None means `checkpoint.default_root()`.
        force: convert again even where a sound checkpoint of the same source exists.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: unknown network; no package installed; a file that is not a state dict, or does not fit.
        OSError: the file cannot be read, or the checkpoint not written.
    """
    from jaxinterp import models
    from jaxinterp.weights import checkpoint, names, recipes, torchfile

    expected = models.shapes(name)
    origin: dict[str, Any] = {}
    if file is None:
        recipe = recipes.recipe(name)
        file = recipe.find()
        origin = {"package": recipe.install, "license": recipe.license}
    if not Path(file).is_file():
        raise ValueError(f"no such file: {file}")
    root = checkpoint.default_root() if root is None else Path(root)
    folder, digest = root / name, checkpoint.file_digest(Path(file))
    if not force and folder.is_dir():
        try:
            if checkpoint.read_manifest(folder, name=name)["source"].get("sha256") == digest:
                checkpoint.load(folder, expected, name=name)
                return folder
        except ValueError:
            pass  # not sound: it is written anew
    params = names.map_tensors(torchfile.read(file), expected, source=Path(file).name)
    known = checkpoint.known_digests(root).get(name, {}).get("sha256")
    source = {"file": Path(file).name, "sha256": digest, "known": digest == known, **origin}
    checkpoint.save(params, folder, name=name, source=source)
    return folder


def load(name: str, *, root: Path | None = None) -> tuple[Network, dict[str, jax.Array]]:
    """A network and its converted, verified weights.

    Args:
        name: the network, such as "efficientnet_lite0".
        root: folder of checkpoints; None means `checkpoint.default_root()`.

    Raises:
        ValueError: unknown network (with the closest names), no checkpoint (with what to run), or a damaged one
            (with the tensor).
    """
    from jaxinterp import models
    from jaxinterp.weights import checkpoint

    network = models.network(name)
    root = checkpoint.default_root() if root is None else Path(root)
    return network, checkpoint.load(root / name, models.shapes(name), name=name)
