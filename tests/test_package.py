"""What `import jaxinterp` loads, and which way imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxinterp

PACKAGE = Path(jaxinterp.__file__).parent
LATE = ("optax", "orbax", "matplotlib", "PIL", "tyro", "tensorflow_datasets", "tqdm", "torch", "tensorflow", "jinja2")
CORE = (
    *(
        "network",
        "canonical",
        "hoisting",
        "models",
        "attacks",
        "effect",
        "cam",
        "attribution",
        "faithfulness",
        "localize",
    ),
    *("pytree", "sharding", "draws", "windowed", "jpeg", "similarity", "ensemble"),
)
SHELL = {
    path.stem if path.is_file() else path.name
    for path in PACKAGE.iterdir()
    if path.suffix == ".py" or (path / "__init__.py").is_file()
} - {*CORE, "__init__"}
CORE_FILES = sorted(
    file
    for name in CORE
    for file in ([PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").is_file() else (PACKAGE / name).rglob("*.py"))
)


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after `code` ran in a fresh interpreter."""
    code += "; import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_import_is_light():
    modules = loaded("import jaxinterp")
    assert {"jaxinterp", "jax", "numpy"} <= modules
    assert modules.isdisjoint(LATE), modules & set(LATE)


def test_core_is_light():
    """With every module of the core loaded; flax brings what it likes, so its own imports do not count."""
    core = loaded("import " + ", ".join(f"jaxinterp.{name}" for name in CORE))
    assert (core - loaded("import flax.nnx")).isdisjoint(LATE)


def imported(file: Path) -> set[str]:
    """The modules of this package, by first name, that a file imports anywhere; relative imports resolved."""
    inside = ["jaxinterp", *file.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*inside[: len(inside) - node.level + 1]] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("jaxinterp.")}


@pytest.mark.parametrize("file", CORE_FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_core_does_not_import_the_shell(file):
    assert imported(file).isdisjoint(SHELL), imported(file) & SHELL


def test_the_check_sees_imports():
    assert {"weights", "data"} <= SHELL
    assert len(CORE_FILES) > len(CORE)
    assert "network" in imported(PACKAGE / "cam.py")
    assert "data" in imported(PACKAGE / "data" / "samples.py")


def test_public_names():
    for name in jaxinterp.__all__:
        assert getattr(jaxinterp, name) is not None
        assert name in dir(jaxinterp)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jaxinterp.nothing  # noqa: B018  # type: ignore[attr-defined]
