"""Other libraries on the same weights, images and device: torchattacks, foolbox, pytorch-grad-cam.

The network is the PyTorch original (torchvision's, or the module that a function in a file returns), and our parameters
are made from its state dict, so that both sides compute with the same numbers. Its parameters ask for no gradients,
which is what our attacks compute, too.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.bench.attacks import PEER_STEPS, peer_form
from jaxinterp.bench.formats import computing_in
from jaxinterp.bench.records import cores
from jaxinterp.bench.setting import Setting
from jaxinterp.weights import validation

# import name -> name in the package index.
PACKAGES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "pytorch_grad_cam": "grad-cam"}
EPS, STEP_SIZE = 8 / 255, 2 / 255


def missing() -> dict[str, str]:
    """The peers (and torch, which all of them need) that are not installed, and how to install them."""
    return {
        package: f"not installed; run: pip install {package}"
        for name, package in {"torch": "torch", **PACKAGES}.items()
        if importlib.util.find_spec(name) is None
    }


def versions() -> dict[str, str]:
    """Of those that are installed."""
    all_of = {"torch": "torch", **PACKAGES}
    return {p: importlib.metadata.version(p) for n, p in all_of.items() if importlib.util.find_spec(n) is not None}


class Peers:
    """A network in both frameworks."""

    def __init__(self, setting: Setting, against: str):
        """Builds the PyTorch network.

        Args:
            setting: names our network.
            against: "torchvision" or "FILE.py:factory", as `jaxinterp validate` takes it.

        Raises:
            ValueError: torch or the original is missing, or does not fit the network.
        """
        original = validation.original(setting.network.name, against)
        import torch  # pyright: ignore[reportMissingImports]  # there, or `original` would have said so

        torch.set_num_threads(cores())
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = peer_form(setting) == "tf32"
        self._torch = torch
        self._device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        params = jax.tree.map(jnp.asarray, original.params)
        network = dataclasses.replace(original.network, image_size=setting.network.image_size)
        self.setting = dataclasses.replace(setting, network=network, params=params, weights=against)
        self.module = original.module.to(self._device)
        self._images = self._on_device(self.setting.images())
        self._labels = torch.tensor(np.asarray(self.setting.labels).tolist()).to(self._device)

    def difference(self) -> float:
        """By how much the logits of the two frameworks differ, relative to the largest."""
        with self._torch.no_grad():
            theirs = self.module(self._images).cpu().numpy()
        with computing_in(peer_form(self.setting)):
            ours = np.asarray(self.setting.network.bind(self.setting.params)(self.setting.images()))
        return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))

    def attacks(self, batch: int | None = None) -> Mapping[str, Callable[[], Any]]:
        """PGD of the libraries that are installed, each a function that runs it to its end.

        Args:
            batch: another number of images.

        Raises:
            ValueError: one is installed but does not import.
        """
        found: dict[str, Callable[[], Any]] = {}
        images, labels = self._images, self._labels
        if batch is not None:
            images = self._on_device(self.setting.images(batch))
            labels = self._torch.tensor(np.asarray(self.setting.labels_of(batch)).tolist()).to(self._device)
        if torchattacks := _imported("torchattacks"):
            theirs = torchattacks.PGD(self.module, eps=EPS, alpha=STEP_SIZE, steps=PEER_STEPS, random_start=True)
            found["torchattacks PGD"] = lambda: self._waited(theirs(images, labels))
        if foolbox := _imported("foolbox"):
            model = foolbox.PyTorchModel(self.module, bounds=(0, 1), device=self._device)
            attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=PEER_STEPS, random_start=True)
            found["foolbox LinfPGD"] = lambda: self._waited(attack(model, images, labels, epsilons=EPS)[1])
        return found

    def maps(self) -> Mapping[str, Callable[[], Any]]:
        """Grad-CAM of pytorch-grad-cam, where it is installed, at the node of our maps.

        Raises:
            ValueError: it is installed but does not import, or the PyTorch module has no submodule of the node's name.
        """
        if (package := _imported("pytorch_grad_cam")) is None:
            return {}
        wanted = _imported("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
        node = self.setting.network.cam_node or self.setting.network.nodes[-1]
        modules = dict(self.module.named_modules())
        if f"inner.{node}" not in modules:
            raise ValueError(f"the PyTorch module has no submodule {node!r}, at which pytorch-grad-cam would look")
        method = package.GradCAM(model=self.module, target_layers=[modules[f"inner.{node}"]])
        targets = [wanted(int(label)) for label in self._labels]
        images = self._images.clone().requires_grad_()  # without it, and with frozen parameters, there is no gradient
        return {"pytorch-grad-cam GradCAM": lambda: method(input_tensor=images, targets=targets)}

    def _on_device(self, images: jax.Array) -> Any:
        """Images [B,C,H,W] as PyTorch has them."""
        return self._torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy()).to(self._device)

    def _waited(self, images: Any) -> Any:
        if self._device == "cuda":
            self._torch.cuda.synchronize()
        return images


def _imported(name: str) -> Any:
    """A package, or None where it is not installed."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{PACKAGES.get(name, name)} is installed but does not import: {error}") from error
