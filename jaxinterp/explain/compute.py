"""What is computed for a chunk of pictures: the attack, the effect of every cell, the maps and their scores."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp import effect, faithfulness, localize, parallel
from jaxinterp.attacks.attack import Attack
from jaxinterp.attacks.driver import example_keys
from jaxinterp.data import Batch, Source
from jaxinterp.draws import shaped
from jaxinterp.network import Model, Network, Params
from jaxinterp.pictures import Pictures, Progress, chunk_size, chunks, classify, load_chunk, part_name, silent
from jaxinterp.resumable import run_to_end
from jaxinterp.runs import Run


def map_method(network: Network, asked: str) -> str:
    """The method of class activation maps that "auto" stands for: "cam" where the network has them, else "gradcam"."""
    if asked == "auto":
        return "gradcam" if network.cam_node is None else "cam"
    return asked


def explain_batch(
    network: Network,
    params: Params,
    attack: Attack,
    batch: Batch,
    targets: np.ndarray,
    *,
    cell: effect.Cell,
    cam: str,
    seed: int,
    run: Run,
    part: str,
    definition: effect.Definition = effect.PAPER,
    faithful: bool = False,
    targeted: bool = True,
    progress: Progress = silent,
) -> dict[str, np.ndarray]:
    """Attacks one batch and explains the perturbations.

    Args:
        network: the network.
        params: its parameters.
        attack: the attack.
        batch: pictures [B,H,W,C]; rows that only pad it are dropped from the result.
        targets: [B] the class that each picture is attacked towards.
        cell: side of a cell in pixels, or its height and width.
        cam: method of the class activation maps.
        seed: of the attack's randomness and the shuffled control.
        run: where the state of a long attack is stored,
        part: and under which name.
        definition: of the effects of cells.
        faithful: also measure how faithful the maps are.
        targeted: attack towards the targets; otherwise away from the labels, and where that succeeds, the target of
            what is explained is the class that was reached.
        progress: see `Progress`.

    Returns:
        Arrays by name, the picture being their first axis.
    """
    mesh = parallel.data_mesh()
    params = parallel.replicate(params, mesh)
    model = network.bind(params)
    clean, labels, wanted = parallel.shard((batch.images, batch.labels, targets), mesh)
    key = jax.random.key(seed)
    found = run_to_end(
        attack,
        model,
        clean,
        labels,
        wanted if targeted else None,
        key=key,
        run=run,
        part=part,
        progress=lambda done: progress(f"attack {done:4.0%}", 0.0),
    )
    # Rows that only pad the batch are left unperturbed, which makes their cells free.
    mask = parallel.shard(batch.mask, mesh)
    adversarial = jnp.where(mask[:, None, None, None], found.images, clean)
    reached = classify(model, adversarial)
    if not targeted:
        wanted = jnp.where(found.success & mask, reached, wanted)
    progress("cells", 0.0)
    cells = effect.pse(
        model, clean, adversarial, labels, wanted, cell, method=definition.method, scale=definition.scale
    )
    jax.block_until_ready(cells)
    progress("maps", 0.0)
    four = localize.four_maps(network, params, clean, adversarial, labels, wanted, cam)
    delta, size = adversarial - clean, (clean.shape[1], clean.shape[2])
    keys = example_keys(key, clean)
    shuffled = localize.shuffled_score(delta, four.label_clean, keys)
    saliency = localize.adversarial_saliency(model, clean, labels, wanted)
    measured = {}
    if faithful:
        progress("faithfulness", 0.0)
        scored = {"label": (clean, labels, four.label_clean), "target": (adversarial, wanted, four.target_adversarial)}
        measured = _faithfulness(model, scored, keys)
    result = {
        "adversarial": adversarial,
        "adversarial_class": reached,
        "targets": wanted,
        **{name: getattr(found, name) for name in ("success", "l0", "l1", "l2", "linf")},
        **{name: getattr(found, name) for name in ("iterations", "forward", "backward")},
        **{name: getattr(cells, name) for name in ("suppression", "promotion", "ratio", "kind", "norm")},
        "pse_forward": cells.forward,
        **({"pse_backward": cells.backward} if definition.method == "first_order" else {}),
        "maps": four.stacked(),
        "is_label": localize.interpretability_score(delta, four.label_clean),
        "is_target": localize.interpretability_score(delta, four.target_adversarial),
        "is_null": localize.null_score(delta, four.label_clean),
        "is_shuffled": shuffled,
        "is_asm": localize.interpretability_score(delta, saliency),
        "is_asm_null": localize.null_score(delta, saliency),
        "label_map_by_kind": localize.mean_by_kind(four.label_clean, cells.kind, cell, size),
        "target_map_by_kind": localize.mean_by_kind(four.target_adversarial, cells.kind, cell, size),
        **measured,
    }
    kept = {name: np.asarray(value)[batch.mask] for name, value in result.items()}
    kept["ids"] = np.array([i for i, keep in zip(batch.ids, batch.mask, strict=True) if keep], dtype=np.str_)
    kept["labels"] = batch.labels[batch.mask]
    kept["clean"] = batch.images[batch.mask]
    return kept


def _faithfulness(
    model: Model, scored: Mapping[str, tuple[jax.Array, jax.Array, jax.Array]], keys: jax.Array
) -> dict[str, jax.Array]:
    """What `jaxinterp.faithfulness` makes of maps, and of noise in their place, their null; NaN of maps not finite.

    Args:
        model: images -> logits.
        scored: images, classes and maps by the name that ends the columns.
        keys: [B] of the noise.

    Returns:
        [B] each, by column of `jaxinterp.explain.tables.FAITHFULNESS_COLUMNS`.
    """
    found = {}
    for which, (images, classes, maps) in scored.items():
        finite = jnp.all(jnp.isfinite(maps), axis=(1, 2))
        noise = jax.vmap(functools.partial(shaped, jax.random.uniform, shape=maps.shape[1:]))(keys)
        for null, given in (("", jnp.where(finite[:, None, None], maps, 0)), ("_null", noise)):
            problem = (model, images, classes, given)
            for measure, values in (
                ("deletion", faithfulness.deletion(*problem).area),
                ("insertion", faithfulness.insertion(*problem).area),
                ("drop", faithfulness.average_drop(*problem)),
            ):
                found[f"{measure}_{which}{null}"] = jnp.where(finite, values, jnp.nan)
    return found


def parts(
    run: Run,
    network: Network,
    params: Params,
    source: Source,
    pictures: Pictures,
    chosen: Mapping[str, Attack],
    *,
    cell: effect.Cell,
    definition: effect.Definition,
    faithful: bool,
    cam: str,
    seed: int,
    batch_size: int,
    starts: Iterable[int],
    progress: Progress = silent,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The chunks with the numbers `starts`, (name of the attack, arrays as `explain_batch` gives them), computed or
    read back.

    Chunks come picture by picture, all attacks of one before the next, so that a stopped run has whole comparisons.
    """
    size, every = chunk_size(pictures, batch_size), chunks(pictures, batch_size)
    for start in starts:
        chunk = every[start]
        batch, targets = None, None
        for name, attack in chosen.items():
            part = part_name(name, start)
            arrays = run.read_part(part)
            if arrays is None:
                progress(name, 0.0)
                if batch is None or targets is None:
                    batch, targets = load_chunk(source, pictures, chunk, size)
                arrays = explain_batch(
                    network,
                    params,
                    attack,
                    batch,
                    targets,
                    cell=cell,
                    cam=cam,
                    seed=seed,
                    run=run,
                    part=part,
                    definition=definition,
                    faithful=faithful,
                    progress=lambda what, done, name=name: progress(f"{name}: {what}", done),
                )
                run.write_part(part, arrays)
                run.remove_state(part)
            yield name, arrays
            progress(name, len(chunk) / len(chosen))
