"""jaxinterp bench --peers: the same weights in both frameworks, and rows for every peer that is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinterp import cli
from jaxinterp.bench import job, peers

FACTORY = """
from torch import nn

class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        for i, (a, b) in enumerate(((3, 8), (8, 16), (16, 32))):
            conv = nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            setattr(self, f"conv{i + 1}", nn.Sequential(conv, nn.ReLU()))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.conv3(self.conv2(self.conv1(x))).mean((2, 3)))

def network():
    return SmallCNN()
"""


@pytest.fixture
def against(torch, tmp_path) -> str:
    (tmp_path / "small_torch.py").write_text(FACTORY)
    torch.manual_seed(0)
    return f"{tmp_path / 'small_torch.py'}:network"


def test_both_compute_the_same(against):
    setting = job.prepare("small_cnn", weights="seeded", size=16, batch=3, rounds=1, forms=("float32",), seed=0)
    both = peers.Peers(setting, against)
    assert both.difference() < 1e-5
    assert both.setting.weights == against
    clean = np.asarray(both.setting.images()).transpose(0, 3, 1, 2)
    assert set(both.attacks()) == {
        name for name, package in (("torchattacks PGD", "torchattacks"), ("foolbox LinfPGD", "foolbox"))
        if importlib.util.find_spec(package)
    }  # fmt: skip
    for run in both.attacks().values():
        found = run().detach().numpy()
        assert found.shape == clean.shape
        assert 0 < np.abs(found - clean).max() <= peers.EPS + 1e-6
    for run in both.maps().values():
        assert run().shape == (3, 16, 16)


def test_rows_of_peers(against, tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--model", "small_cnn", "--size", "16", "--batch", "2", "--rounds", "2", "--attack", "ifgsm:steps=2"]
    assert cli.main(["bench", "attacks", "cam", *small, "--peers", "--against", against, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    attacks, maps = map(json.loads, Path(out / "bench.jsonl").read_text().splitlines())
    for package in peers.missing():
        assert f"peer {package}: not installed; run: pip install {package}" in printed
    rows = {row["name"]: row for row in attacks["results"]}
    ours = rows["ours, pgd:eps=8/255,step_size=2/255,steps=10"]
    for name, package in (("torchattacks PGD", "torchattacks"), ("foolbox LinfPGD", "foolbox")):
        if importlib.util.find_spec(package) is None:
            continue
        assert package in attacks["peers"]
        assert rows[name]["work"] == ours["work"] == 20
        assert rows[name]["over"]["what"] == ours["name"]
        assert 0 < rows[name]["over"]["low"] <= rows[name]["over"]["high"]
    if importlib.util.find_spec("pytorch_grad_cam") is not None:
        [row] = [row for row in maps["results"] if row["name"] == "pytorch-grad-cam GradCAM"]
        assert row["over"]["what"] == "gradcam float32"
    assert attacks["weights"] == against


def test_an_original_that_does_not_fit(torch, tmp_path, capsys):
    (tmp_path / "other.py").write_text("from torch import nn\ndef network():\n    return nn.Linear(3, 4)\n")
    given = ["bench", "attacks", "--model", "small_cnn", "--peers", "--against"]
    for against, message in (
        (f"{tmp_path / 'other.py'}:network", "does not fit the network"),
        (f"{tmp_path / 'none.py'}:network", "an existing file"),
    ):
        assert cli.main([*given, against, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_peer_that_does_not_import(monkeypatch, tmp_path):
    (tmp_path / "torchattacks.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchattacks", raising=False)
    with pytest.raises(ValueError, match="torchattacks is installed but does not import: No module named 'no_such"):
        peers._imported("torchattacks")
    assert peers._imported("no_such_package") is None
