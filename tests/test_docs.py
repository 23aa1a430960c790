"""What the documentation shows, run: every block of Python, every command on a small network; other options exist.

The blocks of a page run from top to bottom, in one folder: Python in one namespace, commands by `cli.main`. A block
behind the comment "needs torch" runs where torch is installed.
"""

import functools
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxinterp
from jaxinterp import Network, attacks, cli, launch
from jaxinterp.weights import seeded

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("concepts.md", "models.md", "validate.md", "attacks.md", "services.md", "training.md")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    comment: str

    def commands(self) -> list[list[str]]:
        """The arguments of the lines that begin with jaxinterp (behind a $, in a console)."""
        lines = [line.removeprefix("$ ") for line in self.text.replace("\\\n", " ").splitlines()]
        return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("jaxinterp ")]


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"(?:^<!-- (.*?) -->\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[2], m[3], text[: m.start(3)].count("\n") + 1, m[1] or "") for m in found]


def execute(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)  # our own pages


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder, where nothing was converted yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path / "ckpts"))
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_pages(name, place):
    page, namespace = ROOT / "docs" / name, {"__name__": "page"}
    found = blocks(page)
    assert {block.language for block in found} <= {"python", "console"}
    for block in found:
        if block.language == "python":
            execute(block, page, namespace)
            continue
        assert block.commands(), block
        if block.comment != "needs torch" or importlib.util.find_spec("torch") is not None:
            for command in block.commands():
                assert cli.main(command) == 0, command


def stand_in() -> tuple[Network, dict[str, jax.Array]]:
    """A network with the names, the image size and the classes that the README's blocks suppose, but a narrow one."""
    key = jax.random.key(0)
    params = {
        "stem": 0.2 * jax.random.normal(key, (8, 8, 3, 8)),
        "head": jax.random.normal(jax.random.fold_in(key, 1), (8, 10)),
    }

    def apply(params, images, tap):
        x = jax.lax.conv_general_dilated(
            images - 0.5, params["stem"], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = tap("_blocks.9", jax.nn.relu(x))
        x = tap("_conv_head", x[:, ::4, ::4])
        return x.mean((1, 2)) @ params["head"]

    return Network("stand-in", apply, ("_blocks.9", "_conv_head"), 224, 10, "_conv_head"), params


def test_readme(place, monkeypatch):
    """Its Python, with a narrow network in place of the one that is loaded, and few steps where there are thousands."""
    monkeypatch.setattr("jaxinterp.weights.load", lambda name: stand_in())
    monkeypatch.setattr(attacks, "CW", functools.partial(attacks.CW, search_steps=1, steps=3))
    network, params = stand_in()
    model, images = network.bind(params), jnp.asarray(seeded.images(2, 224))
    labels = jnp.argmax(model(images), -1)
    namespace: dict[str, Any] = {
        "__name__": "readme",
        "images": images,
        "labels": labels,
        "targets": (labels + 1) % 10,
        "key": jax.random.key(0),
        "attack": attacks.IFGSM(eps=0.1, steps=2),
        "jnp": jnp,
        "conv": lambda x, w: jax.lax.conv(x.transpose(0, 3, 1, 2), w, (1, 1), "SAME").transpose(0, 2, 3, 1),
    }
    found = [block for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert len(found) >= 5
    ran = 0
    for block in found:
        if "source" in block.text:  # dissection: a page and tests/dissect run it
            continue
        execute(block, ROOT / "README.md", namespace)
        ran += 1
        namespace |= {"network": network, "params": params} if "def apply" in block.text else {}
    assert ran >= 4
    assert namespace["cells"].kind.shape == (2, 16, 16)
    assert isinstance(namespace["success"], jax.Array)


def test_diagnostics(capsys):
    """Its block on a model whose softmax is a part of it."""
    network, params = stand_in()
    images = jnp.asarray(seeded.images(2, 224))
    namespace = {"model": lambda x: jax.nn.softmax(network.bind(params)(x)), "images": images, "key": jax.random.key(0)}
    namespace["labels"] = jnp.argmax(namespace["model"](images), -1)
    page = ROOT / "docs" / "diagnostics.md"
    [block] = [block for block in blocks(page) if block.language == "python"]
    execute(block, page, namespace)
    assert "probabilities" in capsys.readouterr().out


def test_pods(monkeypatch):
    """Its block, with a narrow network whose kernels and last layer are spread over eight devices as the page says."""
    loaded = {}

    def load(name, placement):
        key = jax.random.key(0)
        params = {"conv1.weight": jax.random.normal(key, (8, 8, 3, 8)), "fc.weight": jax.random.normal(key, (8, 10))}

        def apply(params, images, tap):
            x = jax.lax.conv_general_dilated(
                images - 0.5, params["conv1.weight"], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return jax.nn.relu(x).mean((1, 2)) @ params["fc.weight"]

        loaded.update({name: jax.device_put(leaf, placement(name, leaf.shape)) for name, leaf in params.items()})
        return Network(name, apply, (), 32, 10), loaded

    monkeypatch.setattr("jaxinterp.weights.load", load)
    images, labels = jnp.asarray(seeded.images(2, 32)), jnp.array([0, 1])
    namespace: dict[str, Any] = {"images": images, "labels": labels, "key": jax.random.key(0)}
    page = ROOT / "docs" / "pods.md"
    [block] = [block for block in blocks(page) if block.language == "python"]
    execute(block, page, namespace)
    assert [leaf.addressable_shards[0].data.shape for leaf in loaded.values()] == [(8, 8, 3, 1), (1, 10)]
    assert namespace["result"].images.shape == (2, 32, 32, 3)
    assert 0 < jnp.abs(namespace["result"].images - images).max() <= attacks.PGD().eps + 1e-6


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_commands_have_the_options_that_are_shown(page, monkeypatch):
    """All commands of all pages, with jobs that do nothing."""
    called = []

    def nothing(function):
        @functools.wraps(function)
        def instead(*args, **kwargs):
            called.append(function.__name__)

        return instead

    for name in ("explain", "attack", "dissect", "convert", "models", "validate", "bench", "serve", "train"):
        monkeypatch.setattr(cli, name, nothing(getattr(cli, name)))
    shown = [command for block in blocks(page) for command in block.commands() if block.language in ("sh", "console")]
    for command in shown:
        if command[0] in ("COMMAND", "broden"):
            continue
        before = len(called)
        _, words = launch.options(command)  # several processes: tests/test_distributed.py starts them
        assert cli.main(words) == 0, command
        assert len(called) == before + 1, command


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files of the tree, and sections of pages."""
    for target in re.findall(r"\]\(([^)#\s]*(?:#[\w-]+)?)\)", page.read_text(encoding="utf-8")):
        path, _, section = target.partition("#")
        if path.startswith("http"):
            continue
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        if section:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text or f"(docs/{page.name}#" in text, page.name
    assert jaxinterp.__version__
