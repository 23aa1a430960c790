"""Eight virtual CPU devices, and jaxtyping's shapes checked in every public signature."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs are compiled once for all workers, commands that tests run, and later runs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("jaxinterp", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """--run-parity, --exhaustive."""
    parser.addoption("--exhaustive", action="store_true", help="also run the cases that take long: an hour")
    parser.addoption("--run-parity", action="store_true", help="also compare with PyTorch, which must be installed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps tests that share compiled programs on one worker, and skips tests/parity unless it is asked for.

    Those are the tests of a file; in the rules of all attacks, those of an attack.
    """
    for item in items:
        callspec = getattr(item, "callspec", None)
        case = callspec.params.get("case") if callspec and item.path.name == "test_rules.py" else None
        item.add_marker(pytest.mark.xdist_group(f"{item.path.name}-{case}" if case else str(item.path)))
        if item.get_closest_marker("exhaustive") and not config.getoption("--exhaustive"):
            item.add_marker(pytest.mark.skip(reason="takes long; runs with --exhaustive (make exhaustive)"))
    items.sort(key=lambda item: (item.path, group(item) or ""))
    if config.getoption("--run-parity"):
        return
    skip = pytest.mark.skip(reason="comparisons with PyTorch run with --run-parity (make parity)")
    for item in items:
        if Path(__file__).parent / "parity" in item.path.parents:
            item.add_marker(skip)


def group(item: pytest.Item) -> str | None:
    """The name under which `item` is kept with others on one worker."""
    marker = item.get_closest_marker("xdist_group")
    return marker.args[0] if marker else None


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets the compiled programs of a group after its last test.

    Thousands of them in one process exhaust what the system lets a process map, and the compiler then crashes.
    """
    if nextitem is not None and group(item) != group(nextitem):
        jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)
