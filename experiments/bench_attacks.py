"""Attacks against their gradients, against torchattacks and foolbox, and how long they take to compile.

    python experiments/bench_attacks.py overhead --out results/bench.jsonl
    python experiments/bench_attacks.py quality --out results/bench.jsonl
    python experiments/bench_attacks.py compile --out results/bench.jsonl

overhead: PGD with ten steps against ten times the bare input gradient of the same loss, `jax.jit(jax.grad(...))` called
from Python, and against PGD of torchattacks and foolbox on the same weights. The attack also judges its last iterate:
the ratio to ten gradients and one forward pass is given beside. "frozen" means that the peers' parameters do not ask
for gradients; "as shipped" that they do, as those of a network just loaded do (foolbox then computes them).

quality: C&W and EAD against foolbox with the same number of search steps, steps (at most) and learning rate. Both end
a search step early where the loss stands still: foolbox looks at the loss of the whole batch after each tenth of the
steps, this package at that of each image, after each tenth of the steps ("as foolbox") or more often and with less
patience in all search steps but the last ("early": --window, --tolerance; --no-polish: in those, too). What is
compared is the time, beside success, the median of the distance, which must be within 1 % of foolbox's, and how many
gradients of single images were really computed.

compile: seconds from Python to machine code of one step of every attack, with its start and its end, against those of
one gradient, on ResNet-18; the least of three rounds. The stages of a chain are compiled as they are reached, so that
AutoAttack has one row for its first step, and one for all four attacks.

Everything of one row runs in one process and on one device, in turn (on a GPU in TF32, or in float32 with
JAX_DEFAULT_MATMUL_PRECISION=highest, for both); a ratio is the median of the ratios of the rounds. Networks have
seeded weights and images, and attack their own predictions, except cifar10_cnn: published weights on the CIFAR-10
pictures of foolbox; and in `quality` those in the folder --trained. Needs torch for the peers, and those that are
installed of torchattacks and foolbox.

Expected time: 10 minutes, 30 minutes and 12 minutes on two cores. Expected result: overhead at most 1.03; C&W and EAD
at least three times (ResNet-18: twice) as fast as foolbox's; to compile, at most 2.5 times a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import jaxinterp
from jaxinterp import attacks, data, models, precision
from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import Staged
from jaxinterp.bench.records import append, cores
from jaxinterp.bench.timing import interleaved, middle, ratios, shown, verdict
from jaxinterp.canonical import canonical
from jaxinterp.supplies import supplied
from jaxinterp.weights import seeded

EPS, STEPS = 8 / 255, 10
BATCHES = {"carlini_mnist": 16, "cifar_resnet18": 16, "resnet50": 8, "efficientnet_lite0": 8}
KEY = jax.random.key(0)


class Problem(NamedTuple):
    """A network in JAX with images that it classifies as `labels`, and how to make it in PyTorch."""

    name: str
    model: Any
    images: jax.Array
    labels: jax.Array
    tensors: dict[str, np.ndarray] | None  # None: seeded


def problem(name: str, batch: int, trained: Path | None = None, pictures: str = "mnist5k:test") -> Problem:
    """Real pictures and weights for cifar10_cnn and for what is in the folder `trained`, seeded ones for the others."""
    known = trained is not None and (trained / name).is_dir()
    if name == "cifar10_cnn" or known:
        network, params = jaxinterp.load(name, root=trained if known else None)
        crop = data.Crop(network.image_size, network.crop_pct, network.interpolation)
        spec = pictures if known else "samples:cifar10"
        source = data.open_source(spec, crop=crop, classes=network.classes)
        images = jnp.stack([jnp.asarray(source[i].image) for i in range(min(batch, len(source)))])
        tensors = {key: torch_layout(np.asarray(value)) for key, value in params.items()}
    else:
        network, tensors = models.network(name), None
        params = jax.tree.map(jnp.asarray, seeded.params(models.shapes(name)))
        images = jnp.asarray(seeded.images(batch, network.image_size, models.ARCHITECTURES[name].channels))
    model = network.bind(params)
    return Problem(name, model, images, jnp.argmax(model(images), axis=-1), tensors)


def torch_layout(tensor: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW and [in, out] -> [out, in]."""
    return tensor.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(tensor.ndim, tuple(range(tensor.ndim))))


class Peers:
    """The network in PyTorch, and attacks of other libraries on it, images and results as [B,H,W,C] arrays."""

    def __init__(self, p: Problem, *, frozen: bool = True):
        import make_references
        import torch  # pyright: ignore[reportMissingImports]  # optional: only comparisons with PyTorch need it
        import torch_zoo

        torch.set_num_threads(cores())
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision.current() != "highest"
        self.torch = torch
        self.device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        inner = make_references.original(p.name, p.tensors).float()
        own = p.name in torch_zoo.NETWORKS or p.name.startswith("efficientnet_lite")  # preprocess inside
        passes = self.passes = Counter()

        class Whole(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                passes["forward"] += len(x)
                if torch.is_grad_enabled():
                    passes["backward"] += len(x)
                return self.inner(x if own else torch_zoo.NORMALIZE(x))

        self.network = Whole().eval().requires_grad_(not frozen).to(self.device)
        self.images = torch.tensor(np.asarray(p.images).transpose(0, 3, 1, 2)).to(self.device)
        self.labels = torch.tensor(np.asarray(p.labels)).long().to(self.device)

    def torchattacks(self, name: str, **settings: Any) -> Callable[[], Any]:
        """An attack of torchattacks, to be called."""
        import torchattacks  # pyright: ignore[reportMissingImports]  # optional: a peer

        attack = getattr(torchattacks, name)(self.network, **settings)
        return lambda: self._array(attack(self.images, self.labels))

    def foolbox(self, name: str, eps: float | None, **settings: Any) -> Callable[[], Any]:
        """An attack of foolbox, to be called."""
        import foolbox

        model = foolbox.PyTorchModel(self.network, bounds=(0, 1), device=self.device)
        attack = getattr(foolbox.attacks, name)(**settings)
        return lambda: self._array(attack(model, self.images, self.labels, epsilons=eps)[1])

    def _array(self, images: Any) -> np.ndarray:
        return images.detach().cpu().numpy().transpose(0, 2, 3, 1)


def installed(*packages: str) -> list[str]:
    """Which of the packages are here."""
    return [package for package in packages if importlib.util.find_spec(package)]


def device() -> str:
    """On what everything runs."""
    return jax.devices()[0].device_kind


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    return {package: importlib.metadata.version(package) for package in installed("torchattacks", "foolbox")}


def overhead(networks: tuple[str, ...] = tuple(BATCHES), rounds: int = 7, out: Path | None = None) -> None:
    """PGD against bare gradients and against peers.

    Args:
        networks: Their names.
        rounds: How often everything is timed.
        out: File to which a JSON line is appended for every network.
    """
    has_torch = bool(installed("torch"))
    for name in networks:
        p = problem(name, BATCHES.get(name, 8))

        def by_image(model, x, labels):
            return jax.grad(lambda x: objective.likelihood(model(x), labels, None).sum())(x)

        plain, rewritten = jax.jit(by_image), jax.jit(canonical(by_image))
        forward = jax.jit(canonical(lambda model, x: model(x)))
        attack = attacks.PGD(eps=EPS, steps=STEPS)

        def repeated(gradient, p=p):
            for _ in range(STEPS):
                found = gradient(p.model, p.images, p.labels)
            return jax.block_until_ready(found)

        programs: dict[str, Callable[[], Any]] = {
            "jaxinterp": lambda p=p, attack=attack: np.asarray(
                attacks.run(attack, p.model, p.images, p.labels, key=KEY).images
            ),
            "gradients": functools.partial(repeated, plain),
            "gradients, rewritten": functools.partial(repeated, rewritten),
            "forward": lambda p=p, forward=forward: jax.block_until_ready(forward(p.model, p.images)),
        }
        if has_torch:
            for kind in ("frozen", "as shipped"):
                peers = Peers(p, frozen=kind == "frozen")
                size = {"steps": STEPS, "random_start": True}
                if installed("torchattacks"):
                    programs[f"torchattacks, {kind}"] = peers.torchattacks("PGD", eps=EPS, alpha=EPS / 4, **size)
                if installed("foolbox"):
                    programs[f"foolbox, {kind}"] = peers.foolbox("LinfPGD", EPS, rel_stepsize=1 / 4, **size)
        for run in programs.values():
            run()
        times = interleaved(programs, rounds, least=0.5)
        bare = min(("gradients", "gradients, rewritten"), key=lambda which: statistics.median(times[which]))
        whole = [a + b for a, b in zip(times[bare], times["forward"], strict=True)]
        found = {
            f"over {STEPS} gradients": ratios(times["jaxinterp"], times[bare]),
            f"over {STEPS} gradients and a forward pass": ratios(times["jaxinterp"], whole),
        } | {f"over {peer}": ratios(times["jaxinterp"], times[peer]) for peer in times if ", " in peer and peer != bare}
        print(f"{name}, images {p.images.shape}, {device()}, {cores()} cores, {rounds} rounds; median (quartiles)")
        for what, values in times.items():
            print(f"  {what:40}{shown(values, 1e3):>30} ms")
        for what, values in found.items():
            target = verdict(middle(values)["median"], 1.03) if "forward" in what else ""
            print(f"  {what:40}{shown(values, digits=3):>30}  {target}", flush=True)
        row = {
            "network": name,
            "shape": p.images.shape,
            "bare": bare,
            "seconds": {what: middle(values) for what, values in times.items()},
            "ratios": {what: middle(values) for what, values in found.items()},
        }
        append(
            out,
            "attacks overhead",
            {"device": device(), "steps": STEPS, "rounds": rounds, "peers": versions(), "results": [row]},
        )


# network: images, steps of every search step
QUALITY = {"carlini_mnist": (16, 1000), "cifar10_cnn": (20, 1000), "cifar_resnet18": (8, 100)}


def quality(
    networks: tuple[str, ...] = tuple(QUALITY),
    search_steps: int = 9,
    steps: int | None = None,
    window: int = 13,
    tolerance: float = 0.01,
    polish: bool = True,
    methods: tuple[Literal["cw", "ead"], ...] = ("cw", "ead"),
    forms: tuple[Literal["early", "as foolbox"], ...] = ("early", "as foolbox"),
    trained: Path | None = None,
    pictures: str = "mnist5k:test",
    rounds: int = 2,
    out: Path | None = None,
) -> None:
    """C&W and EAD to equal quality.

    Args:
        networks: Their names.
        search_steps: Constants that are tried.
        steps: Steps of each, at most; by default 1000, on ResNet-18 100.
        window: Steps after which "early" looks at the loss.
        tolerance: Relative decrease of the loss in them with which it goes on.
        polish: Begin the last search steps of "early" at the nearest success, with more patience.
        methods: Which attacks.
        forms: Which of ours to time.
        trained: Folder of checkpoints, such as RESULTS/ckpts of `jaxinterp train`; networks in it have their weights
            from there, and are attacked on `pictures`.
        pictures: For these networks.
        rounds: How often everything is timed, after a run that compiles.
        out: File to which a JSON line is appended for every network and attack.
    """
    if trained is not None and not any((trained / name).is_dir() for name in networks):
        raise ValueError(f"--trained {trained}: expected a folder for one of {', '.join(networks)}, as ckpts/ has")
    for name in networks:
        batch, default = QUALITY.get(name, (8, 100))
        p, most = problem(name, batch, trained, pictures), steps or default
        budget: dict[str, Any] = {"search_steps": search_steps, "steps": most}
        theirs = {"binary_search_steps": search_steps, "steps": most}
        pairs = {
            "cw": (attacks.CW(**budget), "L2CarliniWagnerAttack", {}),
            "ead": (attacks.EAD(beta=0.01, **budget), "EADAttack", {"regularization": 0.01}),
        }
        for label in methods:
            attack, peer, settings = pairs[label]
            row: dict[str, Any] = {"network": name, "attack": label, **budget, "batch": len(p.images)}
            row |= {"window": window, "tolerance": tolerance, "polish": polish}
            kept: dict[str, Any] = {}

            early = dataclasses.replace(attack, window=window, tolerance=tolerance, polish=polish)
            ours: dict[str, attacks.Attack] = {"early": early, "as foolbox": attack}
            programs: dict[str, Callable[[], Any]] = {
                form: functools.partial(_ours, form, ours[form], p, kept) for form in forms
            }
            if len(installed("torch", "foolbox")) == 2:
                peers = Peers(p)
                programs["foolbox"] = functools.partial(
                    _theirs, peers, peers.foolbox(peer, None, **theirs, **settings), kept
                )
            for form in forms:
                programs[form]()  # compiles
            times = interleaved(programs, rounds)
            print(f"{name}, {label}, {len(p.images)} images, {search_steps} x {most} steps")
            for who, values in times.items():
                images = kept[who]
                success = np.asarray(jnp.argmax(p.model(jnp.asarray(images)), axis=-1)) != np.asarray(p.labels)
                delta = (images - np.asarray(p.images)).reshape(len(images), -1)[success]
                sizes = {"l2": np.linalg.norm(delta, axis=1), "l1": np.abs(delta).sum(1)}
                sizes["en"] = 0.01 * sizes["l1"] + sizes["l2"] ** 2
                row[who] = {
                    "seconds": middle(values),
                    "success": int(success.sum()),
                    "gradients": kept[f"gradients of {who}"],
                    **{f"median {k}": float(np.median(v)) if len(v) else None for k, v in sizes.items()},
                }
                print(
                    f"  {who:12}{shown(values, digits=2):>24} s  success {success.sum()}/{len(success)}, "
                    f"median l2 {row[who]['median l2'] or 0:.4f}, l1 {row[who]['median l1'] or 0:.3f}, "
                    f"elastic net {row[who]['median en'] or 0:.4f}, {row[who]['gradients']} gradients"
                )
            if "foolbox" in times:
                goal, measure = 2 if "resnet" in name else 3, "median l2" if label == "cw" else "median en"
                for who in forms:
                    faster, near = ratios(times["foolbox"], times[who]), row[who][measure] / row["foolbox"][measure]
                    equal = near <= 1.01 and row[who]["success"] >= row["foolbox"]["success"]
                    met = "met" if equal and middle(faster)["median"] >= goal else "NOT met"
                    print(f"  foolbox / {who:10} {shown(faster, digits=2)}, {measure} {near:.4f} of it", end="    ")
                    print(f"target >= {goal}: {met}" if who == "early" else "", flush=True)
                    row[who] |= {"faster": middle(faster), "distance": near}
            append(
                out, "attacks quality", {"device": device(), "rounds": rounds, "peers": versions(), "results": [row]}
            )


def _ours(name: str, attack: attacks.Attack, p: Problem, kept: dict[str, Any]) -> None:
    result = attacks.run(attack, p.model, p.images, p.labels, key=KEY)
    kept[name] = np.asarray(result.images)
    kept[f"gradients of {name}"] = int(np.sum(result.backward))


def _theirs(peers: Peers, run: Callable[[], Any], kept: dict[str, Any]) -> None:
    peers.passes.clear()
    kept["foolbox"] = run()
    kept["gradients of foolbox"] = peers.passes["backward"]


def compile_times(
    network: str = "resnet18",
    size: int = 64,
    batch: int = 4,
    names: tuple[str, ...] = tuple(attacks.ATTACKS),
    rounds: int = 3,
    out: Path | None = None,
) -> None:
    """Time from Python to machine code, of every attack against one gradient.

    The least of the rounds: there is no chance in it but other work of the machine, which can only add to it.

    Args:
        network: Its name.
        size: Side of the images, in pixels.
        batch: Images in a batch.
        names: Of attacks.
        rounds: How often all are compiled, in turn.
        out: File to which one JSON line is appended.
    """
    spent: dict[str, float] = {}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "/core/compile/" in event:
            spent[event] = spent.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    params = jax.tree.map(jnp.asarray, seeded.params(models.shapes(network)))
    images = jnp.asarray(seeded.images(batch, size, models.ARCHITECTURES[network].channels))
    model = models.network(network).bind(params)
    labels = jnp.argmax(model(images), axis=-1)

    def compiling(run: Callable[[], Any]) -> float:
        jax.clear_caches()
        spent.clear()
        jax.block_until_ready(run())
        return sum(spent.values())

    @jax.jit
    @canonical
    def gradient(model, x, labels):
        return jax.grad(lambda x: objective.likelihood(model(x), labels, None).sum())(x)

    def one_step(attack, compact=True):
        state = attacks.start(attack, model, images, labels, key=KEY)
        return attacks.finish(attack, attacks.advance(attack, model, state, 1, compact=compact))

    every = supplied({name: attacks.ATTACKS[name]() for name in names}, size)
    programs = {"one gradient": lambda: gradient(model, images, labels)}
    for name, attack in every.items():
        programs[name] = functools.partial(one_step, attack)
        if isinstance(attack, Staged):  # of which only the first stage is compiled for its first step
            programs[f"{name}, all stages"] = functools.partial(one_step, attack, compact=False)
    seconds = dict.fromkeys(programs, float("inf"))
    for _ in tqdm(range(rounds), desc="compile", unit="round", disable=None, leave=False):
        for name, program in programs.items():
            seconds[name] = min(seconds[name], compiling(program))
    reference = seconds.pop("one gradient")
    print(f"{network}, images {images.shape}: one gradient {reference:.1f} s")
    for name, least in seconds.items():
        print(f"  {name:24}{least:8.1f} s  {least / reference:6.2f}  {verdict(least / reference, 2.5)}")
    append(
        out,
        "attacks compile",
        {
            **{"device": device(), "network": network, "shape": images.shape, "rounds": rounds},
            **{"gradient": reference, "results": seconds},
        },
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"overhead": overhead, "quality": quality, "compile": compile_times},
        description=str(__doc__).partition("\n")[0],
    )
