"""Eight virtual CPU devices, and jaxtyping's shapes checked in every public signature.

On another platform, as in `JAX_PLATFORMS=cuda,cpu python -m pytest tests/attacks`, products are computed in float32;
what holds on CPUs only fails there (README, Measured).
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

PLATFORM = os.environ.setdefault("JAX_PLATFORMS", "cpu").partition(",")[0]
if PLATFORM != "cpu":
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Programs are compiled once for all workers, commands that tests run, and later runs: small ones, too, many of which
# groups of tests have in common.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
GIVEN, DEVICES = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"
# Where optimization is off: fusions are lowered the older way, and a program is not split for cores that are busy.
QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
USUAL = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
os.environ["XLA_FLAGS"] = f"{GIVEN} {DEVICES}"

from jaxtyping import _import_hook, install_import_hook  # noqa: E402


class Transformer(_import_hook.JaxtypingTransformer):
    """Checks functions of modules and classes, but not those inside others: made anew in every call, they take long."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        body, node.body = node.body, []
        super().visit_FunctionDef(node)
        node.body = body
        return node


_import_hook.JaxtypingTransformer = Transformer  # type: ignore[misc]
install_import_hook("jaxinterp", "beartype.beartype")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

compile_options = compiler.get_compile_options


def quick_options(*args: Any, **kwargs: Any) -> Any:
    """Where optimization is off, less of everything else, too, which halves what is left of compiling."""
    options = compile_options(*args, **kwargs)
    # XLA reads its variable once, so that what a process begins with would hold for all.
    if PLATFORM == "cpu":
        changed = QUICK if jax.config.read("jax_disable_most_optimizations") else USUAL
        options.env_option_overrides = [*options.env_option_overrides, *changed.items()]
    return options


compiler.get_compile_options = quick_options


def pytest_addoption(parser: pytest.Parser) -> None:
    """--run-parity, --exhaustive."""
    parser.addoption("--exhaustive", action="store_true", help="also run the cases that take long: an hour")
    parser.addoption("--run-parity", action="store_true", help="also compare with PyTorch, which must be installed")


# Whatever takes long is begun first, so that no worker is left alone with it at the end.
LONG = ("tests/dissect/test_dissection.py", "tests/experiments/", "tests/explain/", "tests/models/test_zoo.py")
LONG += (
    "tests/test_distributed.py",
    "tests/test_docs.py",
    "tests/test_cache.py",
    "tests/robustness/",
    "tests/test_canonical.py",
    "tests/test_pictures.py",
    "tests/attacks/test_descent.py",
)


# Compiled as users have it, because whether a result depends on the batch or the number of devices is up to what the
# compiler does with loops; beside PyTorch, too, since many steps magnify rounding. Everything else asks for values, and
# is compiled in a quarter of the time without optimization, commands of several processes, too, and the rules of most
# attacks that are not the paper's. `make exhaustive` optimizes everything.
OPTIMIZED = ("tests/attacks/test_compaction.py", "tests/test_canonical.py", "tests/test_parallel.py")
OPTIMIZED += ("tests/test_windowed.py", "tests/parity/")
OPTIMIZED += tuple(
    f"tests/attacks/test_rules.py {case}"
    for case in ("ifgsm", "pgd-linf", "pgd-l2", "cw", "ead", "strattack", "square-linf", "hopskipjump-l2")
)
OPTIMIZED += ("tests/attacks/test_strattack.py::test_two_devices",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests of a group one after the other, and skips those that must be asked for."""
    for item in items:
        if item.get_closest_marker("exhaustive") and not config.getoption("--exhaustive"):
            item.add_marker(pytest.mark.skip(reason="takes long; runs with --exhaustive (make exhaustive)"))
    items.sort(key=lambda item: (not group(item.nodeid).startswith(LONG), group(item.nodeid)))
    if config.getoption("--run-parity"):
        return
    skip = pytest.mark.skip(reason="comparisons with PyTorch run with --run-parity (make parity)")
    for item in items:
        if Path(__file__).parent / "parity" in item.path.parents:
            item.add_marker(skip)


def group(nodeid: str) -> str:
    """Tests of one group share compiled programs: those of a file; in the rules of all attacks, those of an attack."""
    file, _, test = nodeid.partition("::")
    case = (
        re.search(r"\[(.+?)(-linear|-stock|-network-targeted|-ensemble-targeted)?\]", test)
        if "test_rules" in file
        else None
    )
    return f"{file} {case[1]}" if case else file


def optimizes(nodeid: str) -> bool:
    """Whether a test is compiled as users have it."""
    return group(nodeid) in OPTIMIZED or nodeid.startswith(OPTIMIZED)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of a group on one worker, in the order of the collection.

    xdist's own groups are names that it appends to node ids, which pytest 9.2 no longer lets it: without a word it then
    deals out single tests, and every worker compiles what another one has compiled.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # by the number of tests
    return Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Optimization of what a test compiles, here and in the commands that it starts."""
    optimized = PLATFORM != "cpu" or item.config.getoption("--exhaustive") or optimizes(item.nodeid)
    jax.config.update("jax_disable_most_optimizations", not optimized)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(not optimized))
    quick = "" if optimized else " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
    os.environ["XLA_FLAGS"] = f"{GIVEN} {DEVICES} {quick}"
    os.environ["XLA_FLAGS_OF_ONE_DEVICE"] = os.environ["XLA_FLAGS"].replace(DEVICES, "").strip()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets the compiled programs of a group after its last test.

    Thousands of them in one process exhaust what the system lets a process map, and the compiler then crashes.
    """
    if nextitem is not None and group(item.nodeid) != group(nextitem.nodeid):
        jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)
