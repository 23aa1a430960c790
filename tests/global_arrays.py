"""Attacks, effects and maps of images that two processes share: python global_arrays.py PORT PROCESS KIND-OF-AXES

Each prints how its part of every result compares with the result of a process that has all images.
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PROCESSES, DEVICES, BATCH = 2, 2, 8


def main(port: str, index: int, axes: str) -> None:
    """What the module says."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=PROCESSES, process_id=index)
    from jaxinterp import attacks, attribution, effect

    mesh = jax.make_mesh((PROCESSES * DEVICES,), ("data",), axis_types=(AxisType[axes],))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    mine = slice(index * BATCH // PROCESSES, (index + 1) * BATCH // PROCESSES)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(48, 5)).astype(np.float32)
    images = rng.uniform(size=(BATCH, 4, 4, 3)).astype(np.float32)
    support = rng.uniform(size=(BATCH, 4, 4, 1)) < 0.8
    eps = np.linspace(0.01, 0.2, BATCH, dtype=np.float32)
    key = jax.random.key(0)

    def model(x):
        return x.reshape(len(x), -1) @ weight

    labels = np.asarray(model(images)).argmax(-1)
    targets = (labels + 1) % 5

    def together(x):
        return jax.make_array_from_process_local_data(spread, x[mine])

    def of(array):
        if array.is_fully_replicated:  # as effects are
            return np.asarray(array)[mine]
        parts = sorted(array.addressable_shards, key=lambda part: part.index[0].start or 0)
        return np.concatenate([np.asarray(part.data) for part in parts])

    def attacked(attack, put, **more):
        return attacks.run(attack, model, put(images), put(labels), key=key, **more)

    def explained(put):
        adversarial = np.clip(images + 0.05, 0, 1)
        return effect.pse(model, put(images), put(adversarial), put(labels), put(targets), cells=2)

    both = {
        "pgd": lambda put: attacked(attacks.PGD(eps=put(eps), steps=3), put, support=put(support)),
        "cw": lambda put: attacked(attacks.CW(steps=70, search_steps=2), put, targets=put(targets)),
        "ids": lambda put: attacked(attacks.PGD(eps=0.1, steps=3), put, ids=put(np.arange(BATCH))),
        "pse": explained,
        "gradients": lambda put: attribution.integrated_gradients(model, put(images), put(labels), steps=4),
    }
    for name, result in both.items():
        shared, whole = (jax.tree.leaves(result(put)) for put in (together, np.asarray))
        same = all(
            np.array_equal(of(x), np.asarray(y)[mine], equal_nan=True) for x, y in zip(shared, whole, strict=True)
        )
        print(f"found: {name}: {'same' if same else 'different'}")
    print("found: findings:", len(attacks.diagnose(model, together(images), together(labels), key=key)))
    wrong = {
        "images": (together(images) * 2, together(labels), None),
        "labels": (together(images), together(labels) + 5, None),
        "targets": (together(images), together(labels), together(labels)),
    }
    for name, (x, y, t) in wrong.items():
        try:
            attacks.run(attacks.PGD(), model, x, y, t, key=key)
        except ValueError as error:
            print(f"found: wrong {name}: {error}")
    here = jax.device_put(weight, jax.local_devices()[0])
    committed = jax.tree_util.Partial(lambda w, x: x.reshape(len(x), -1) @ w, here)
    try:
        attacks.run(attacks.PGD(), committed, together(images), together(labels), key=key)
    except ValueError as error:
        print(f"found: wrong devices: {error}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
