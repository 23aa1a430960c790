"""`validate --against` with live modules: every kind of preprocessing, and maps that no submodule gives."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from jaxinterp import cli
from jaxinterp.weights import seeded, validation

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"

# Modules for preprocessed images, as published code has them. Normalization is taken out of those of torch_zoo.
FACTORIES = '''
import sys

import torch

sys.path.insert(0, {experiments!r})
import torch_reference
import torch_zoo


class Bare(torch.nn.Module):
    """What a network does behind its preprocessing: images pass through its inverse first."""

    def __init__(self, network, inverse):
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)
        self.whole, self.inverse = [network], inverse

    def forward(self, x):
        return self.whole[0](self.inverse(x))


def cifar_resnet18():
    return torch_zoo.CifarResNet((64, 128, 256, 512), 2, "B", torch.nn.Identity())


def cifar_resnet20():
    return torch_zoo.CifarResNet((16, 32, 64), 3, "A", torch.nn.Identity())


def carlini_mnist():
    return torch.nn.Sequential(*torch_zoo.NETWORKS["carlini_mnist"]())


def small_cnn():
    return torch_zoo.SmallCNN()


def seven_classes():
    network = torch_zoo.SmallCNN()
    network.fc = torch.nn.Linear(32, 7)
    return network


def wrong():
    network = torch_zoo.SmallCNN()
    network.conv2[1] = torch.nn.LeakyReLU()
    return network


def cifar10_cnn():
    return Bare(torch_zoo.Cifar10CNN(), lambda x: x / 255)


def caffe_squeezenet1_1():
    means = torch.tensor((104.0, 117.0, 123.0)).view(1, 3, 1, 1)
    return Bare(torch_zoo.CaffeSqueezeNet(), lambda x: (x + means.to(x)).flip(1) / 255)


def efficientnet_lite0():
    return Bare(torch_reference.EfficientNetLite(0), lambda x: (128 * x + 127) / 255)
'''


@pytest.fixture
def factories(torch, tmp_path) -> Path:
    torch.manual_seed(0)
    (tmp_path / "factories.py").write_text(FACTORIES.format(experiments=str(EXPERIMENTS)))
    return tmp_path / "factories.py"


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("cifar_resnet18", 9),
        ("cifar_resnet20", 10),
        ("carlini_mnist", 4),
        ("small_cnn", 3),
        ("cifar10_cnn", 0),
        ("caffe_squeezenet1_1", 9),
        ("efficientnet_lite0", 16),
    ],
)
def test_a_module_from_a_file(factories, name, maps):
    """Preprocessing is the network's, and no map is compared with one that is not the same."""
    found = validation.against_torch(name, f"{factories}:{name}")
    assert [each.what for each in found][maps:] == ["logits", "gradient"]
    assert {each.what: each.difference for each in found if not each.passed} == {}


def test_another_number_of_classes(factories):
    assert all(each.passed for each in validation.against_torch("small_cnn", f"{factories}:seven_classes"))


def test_torchvision(torch):
    """Seeded weights in both; the number of classes is that of the last layer, whatever the order of names."""
    try:
        validation.torchvision_models()
    except ValueError as error:
        pytest.skip(str(error))
    for name in ("resnet18", "squeezenet1_1"):
        images = np.random.default_rng(0).random((2, 64, 64, 3), np.float32)
        found = validation.against_torch(name, "torchvision", images)
        assert {each.what: each.difference for each in found if not each.passed} == {}
        assert found[-1].difference > 0  # SqueezeNet's logits end in a ReLU: that of a wrong class has no gradient


def test_a_different_network_fails(factories, capsys):
    assert cli.main(["validate", "small_cnn", "--against", f"{factories}:wrong"]) == 2
    printed = capsys.readouterr()
    assert "differs from its original: small_cnn" in printed.err
    rows = {line.split()[0]: line.split()[-1] for line in printed.out.splitlines() if line.endswith(("PASS", "FAIL"))}
    assert rows == {"conv1": "PASS", "conv2": "FAIL", "conv3": "FAIL", "logits": "FAIL", "gradient": "FAIL"}


def test_benchmarks_compare_the_same_thing(torch, monkeypatch):
    """The programs of bench_zoo give the same logits and gradients in both frameworks."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    bench = importlib.import_module("bench_zoo")
    for name in ("small_cnn", "efficientnet_lite0"):
        images = seeded.images(1, 32)
        ours, theirs = bench.jax_programs(name, images), bench.torch_programs(name, images)
        for what, run in theirs.items():
            expected = run()
            for form in ours[what].values():
                difference = np.abs(np.asarray(form()) - expected).max() / np.abs(expected).max()
                assert difference <= (1e-5 if what == "forward" else 1e-2)  # of a ReLU in float32
