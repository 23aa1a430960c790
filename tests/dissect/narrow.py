"""A narrow network and labelled images for tests of whole dissections; as a program, one of two processes.

python narrow.py PORT INDEX FOLDER
"""

import sys
from pathlib import Path

import numpy as np

BATCH = 8  # a multiple of eight devices; the images fill one batch and a half


def network():
    """Two convolutions, a mean over positions and a linear layer; unit 0 of `b` never fires."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from jaxinterp import Network

    def apply(params, images, tap):
        x = images * 2 - 1
        for name in ("a", "b"):
            x = lax.conv_general_dilated(
                x, params[name], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = tap(name, jax.nn.relu(x + params[f"{name} bias"]))
        x = tap("rows", x.mean(axis=1))
        x = tap("mean", x.mean(axis=1))
        return tap("number", jnp.argmax(x @ params["fc"], axis=-1)[:, None]) + x @ params["fc"]

    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(3, 3, 3, 5)) * 0.3,
        "a bias": np.full(5, -0.1),
        "b": rng.normal(size=(3, 3, 5, 7)) * 0.3,
        "b bias": np.array([-100, 0.05, 0, 0, 0, 0, 0]),
        "fc": rng.normal(size=(7, 4)),
    }
    params = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
    return Network("narrow", apply, ("a", "b", "rows", "mean", "number"), image_size=16, classes=4), params


def data(count=13):
    """Images of coloured blocks; the blocks are the labels, in two channels. The last category has no label at all."""
    from jaxinterp.data import SegmentedArrays
    from jaxinterp.data.segmentation import Concepts

    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 5, (count, 4, 4))
    colours = rng.uniform(size=(5, 3))
    images = np.kron(colours[blocks], np.ones((1, 4, 4, 1))) * 0.8 + rng.uniform(size=(count, 16, 16, 3)) * 0.2
    planes = np.kron(blocks, np.ones((1, 4, 4), int))
    planes = np.stack([planes, np.where(planes > 2, planes + 2, 0)], axis=1)
    planes[0, 1, 0, :9] = range(1, 10)  # more labels than in any other image, of which one process knows
    scalars = rng.integers(7, 10, (count, 1))
    planes[4:5], scalars[4:5] = 0, 0
    concepts = Concepts(
        ("", *(f"label {i}" for i in range(1, 10))),
        ("colour", "part", "scene", "nothing"),
        np.array([-1, 0, 0, 0, 0, 1, 1, 2, 2, -1]),
    )
    return SegmentedArrays(images.astype(np.float32), planes, concepts, scalars=scalars)


def arrays(found):
    """Everything in the dissections of several layers, by name."""
    whole = {}
    for node, one in found.items():
        named = {
            "thresholds": one.thresholds.view(np.uint32),
            "intersection": one.tally.intersection,
            "activation": one.tally.activation,
            "by category": one.tally.activation_by_category,
            "area": one.tally.label_area,
            "value": np.asarray(one.top.value).view(np.uint32),
            "image": np.asarray(one.top.image),
            "images": np.array(one.images),
            "positions": np.array(one.positions),
        }
        whole |= {f"{node} {name}": array for name, array in named.items()}
    return whole


def main(port: str, index: int, folder: Path) -> None:
    """Dissects in one of two processes of two devices and saves what it found."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    from jaxinterp.dissect import dissect, dissection

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    net, params = network()
    store: dict[str, dict[str, np.ndarray]] = {}

    def memo(name, compute):
        if name not in store:
            store[name] = compute()
        return store[name]

    def save(case, **options):
        lines = []
        found = dissect(
            net,
            params,
            ("b",),
            data(),
            batch_size=BATCH,
            form="dense",
            progress=lambda *what: lines.append(what),
            **options,
        )
        assert lines, "progress was told"
        np.savez(folder / f"{case} {index}.npz", **arrays(found))

    save("kept", mesh=mesh, memory=1 << 30)
    # The processes disagree about free memory: what fits in the smaller one counts.
    dissection._free = lambda mesh: (3 << 40) + 2 * (1 - index)
    plan = dissection.plan(net, params, ("b",), 13, labels=10, categories=4, batch_size=BATCH, mesh=mesh)
    assert plan.budget == 3 << 39, plan
    dissection._free = lambda mesh: 0 if index else 1 << 40
    save("computed again", mesh=mesh)
    save("stored", mesh=mesh, memory=0, memo=memo)
    assert {leaf.shape[0] for part in store.values() for leaf in part.values()} == {BATCH // 2}
    if index == 0:
        save("alone")
    print("finished")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
