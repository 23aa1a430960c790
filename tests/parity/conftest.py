"""The reference implementations in experiments/, for comparisons with PyTorch."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch."""
    if importlib.util.find_spec("torch") is None:
        pytest.fail('--run-parity needs torch: pip install "jaxinterp[torch]"')
    return importlib.import_module("torch")


@pytest.fixture(scope="session")
def torch_reference(torch: ModuleType) -> ModuleType:
    """experiments/torch_reference.py, which is a script's neighbour and in no package."""
    path = Path(__file__).resolve().parents[2] / "experiments" / "torch_reference.py"
    spec = importlib.util.spec_from_file_location("torch_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
