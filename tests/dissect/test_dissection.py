"""Whole dissections: equal to the parts, to another program, and to themselves however the work is spread."""

import csv
import dataclasses
import inspect
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxinterp import Network, dissect, models
from jaxinterp.data import Broden, DamagedImage, SegmentedArrays
from jaxinterp.dissect import counting, dissection, quantiles, shares
from jaxinterp.dissect.topimages import NONE
from jaxinterp.network import capture

PROGRAM = Path(__file__).with_name("narrow.py")
narrow = SimpleNamespace(**runpy.run_path(str(PROGRAM)))
NETWORK, PARAMS = narrow.network()
DATA = narrow.data()
CATEGORIES = DATA.concepts.category
NODES, PARTS = ("a", "b"), ("image", "planes", "scalars")
QUANTILE = 0.05


def run(node: str | tuple[str, ...] = NODES, data=DATA, **options):
    options = {"batch_size": narrow.BATCH, "quantile": QUANTILE, "memory": 1 << 30, **options}
    return dissect.dissect(NETWORK, PARAMS, node, data, **options)


@pytest.fixture(scope="module")
def found():
    """The dissection of both layers on one device, with feature maps kept."""
    return run()


def assert_same(a, b):
    a, b = narrow.arrays(a), narrow.arrays(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# Values


@pytest.mark.parametrize("union", dissect.UNIONS)
@pytest.mark.parametrize("node", NODES)
def test_values_are_those_of_the_parts(slow, found, node, union):
    items = [DATA[i] for i in range(len(DATA))]
    images, planes, scalars = (np.stack([getattr(x, name) for x in items]) for name in PARTS)
    features = np.asarray(dissection.extractor(NETWORK, (node,))(PARAMS, images)[0])
    np.testing.assert_allclose(
        features, capture(NETWORK, PARAMS, jnp.asarray(images), [node])[1][node], rtol=1e-5, atol=1e-6
    )
    one = found[node] if union == "image" else run(node, union=union)
    assert (one.node, one.quantile, one.images, one.positions) == (node, QUANTILE, 13, features.shape[1:3])
    expected = np.quantile(features.astype(np.float64), 1 - QUANTILE, axis=(0, 1, 2)).astype(np.float32)
    np.testing.assert_array_equal(one.thresholds, expected)
    wanted = slow.tally(features, expected, planes, scalars, list(CATEGORIES), union)
    for name in ("intersection", "activation", "label_area"):
        np.testing.assert_array_equal(getattr(one.tally, name), getattr(wanted, name), err_msg=name)
    np.testing.assert_array_equal(one.tally.activation_by_category[:, :3], wanted.activation_by_category)
    assert not one.tally.activation_by_category[:, 3].any()
    maxima = features.max(axis=(1, 2)).T
    order = np.argsort(-maxima, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(one.top.image, order)
    np.testing.assert_array_equal(one.top.value, np.take_along_axis(maxima, order, axis=1))
    assert wanted.intersection.sum() > 500


def test_a_dead_unit_and_a_category_without_labels(found):
    one = found["b"]
    assert one.thresholds[0] == 0
    assert (one.thresholds[1:] > 0).any()
    assert one.tally.activation[0] == 0
    assert not one.tally.intersection[0].any()
    best = dissect.best(dissect.iou(one.tally, CATEGORIES), CATEGORIES, 4)
    assert best.label[0].tolist() == [0, 0, 0, 0]
    assert best.score[0] == 0
    assert not best.label[:, 3].any()
    assert dissect.counts(best)[0].sum() > 0
    np.testing.assert_array_equal(one.top.image[0], range(9))  # of equal maxima, the lower numbers


def reference_network(folder):
    """The network of the reference arrays for images in [0, 1], with the input of the original program."""
    with np.load(folder / "tinynet.npz") as stored:
        params = {name: stored[name] for name in stored.files}
    mean = np.array([124.6901, 118.6897, 109.5388], np.float32)
    for name in ("conv1", "conv2", "conv3"):
        params[f"{name}.0.weight"] = params[f"{name}.0.weight"].transpose(2, 3, 1, 0)

    def apply(params, images, tap):
        x = (255 * images - mean) / np.float32(255 * 0.224)
        for name, p in (("conv1", 2), ("conv2", 1), ("conv3", 1)):
            x = lax.conv_general_dilated(
                x, params[f"{name}.0.weight"], (2, 2), ((p, p), (p, p)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = tap(name, jax.nn.relu(x + params[f"{name}.0.bias"]))
        return x.mean(axis=(1, 2)) @ params["fc.weight"].T + params["fc.bias"]

    return Network("tinynet", apply, ("conv1", "conv2", "conv3"), image_size=112, classes=6), params


def test_the_report_of_the_original_program(oracle):
    """From pictures to labels: the same concept for every unit that scores above 0.01."""
    network, params = reference_network(oracle)
    data = Broden(oracle / "netdissect" / "broden")
    one = dissect.dissect(
        network,
        params,
        "conv3",
        data,
        quantile=1 - 994 / 999,
        method="higher",
        union="lite",
        batch_size=40,
        memory=1 << 30,
    )
    names = data.concepts.categories
    found = dissect.best(dissect.iou(one.tally, data.concepts.category), data.concepts.category, len(names))
    with open(oracle / "netdissect" / "tally.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    compared = 0
    for row in rows:
        unit = int(row["unit"]) - 1
        assert found.score[unit] == pytest.approx(float(row["score"]), abs=1e-3)
        for c, name in enumerate(names):
            assert found.iou[unit, c] == pytest.approx(float(row[f"{name}-iou"]), abs=1e-3)
        if float(row["score"]) > 0.01:
            compared += 1
            assert data.concepts.names[found.concept[unit]] == row["label"]
            assert names[found.category[unit]] == row["category"]
    assert compared > 10
    with np.load(oracle / "netdissect" / "raw.npz") as raw:
        np.testing.assert_allclose(one.thresholds, raw["threshold"], rtol=2e-3)


# The same to the last bit


@pytest.mark.parametrize(
    ("batch_size", "memory"),
    [(3, 1 << 30), *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((1, 1 << 30), (3, 0)))],
)
def test_neither_batches_nor_memory_change_a_bit(found, batch_size, memory):
    assert_same({"b": run("b", batch_size=batch_size, memory=memory)}, {"b": found["b"]})


def test_feature_maps_computed_again_change_no_bit(found):
    assert_same(run(memory=0), found)


@pytest.mark.parametrize(
    ("devices", "memory"),
    [
        (8, 1 << 30),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((2, 1 << 30), (4, 1 << 30), (2, 0), (8, 0))),
    ],
)
def test_devices_change_no_bit(meshes, found, devices, memory):
    form = "gated" if devices == 8 else "dense"  # which is compiled faster
    assert_same({"b": run("b", mesh=meshes[devices], memory=memory, form=form)}, {"b": found["b"]})


def test_every_batch_and_device_runs_the_same_convolutions(meshes):
    """A convolution with these channels has other bits in a batch of 1, or where the compiler divides one of 8."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(3, 3, 3, 33)) * 0.2, "b": rng.normal(size=(3, 3, 33, 40)) * 0.2}

    def apply(params, x, tap):
        for name in ("a", "b"):
            x = lax.conv_general_dilated(x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = tap(name, jax.nn.relu(x))
        return x.mean(axis=(1, 2))

    network = Network("wider", apply, ("a", "b"), image_size=16, classes=40)
    params = {name: np.asarray(leaf, np.float32) for name, leaf in params.items()}
    images = rng.uniform(size=(8, 16, 16, 3)).astype(np.float32)
    alone = dissection.extractor(network, ("a", "b"))(params, images)
    spread = dissection.extractor(network, ("a", "b"), meshes[8])(
        shares.replicated(params, meshes[8]), shares.placed(images, meshes[8])
    )
    first = dissection.extractor(network, ("a", "b"))(params, images[:1])
    for one, other, single in zip(alone, spread, first, strict=True):
        assert len(other.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(one).view(np.uint32), np.asarray(other).view(np.uint32))
        np.testing.assert_array_equal(np.asarray(one[:1]).view(np.uint32), np.asarray(single).view(np.uint32))


def test_layers_at_once_are_layers_alone(found):
    for node in NODES:
        assert_same({node: run(node)}, {node: found[node]})
    turned = run(("b", "a"))
    assert list(turned) == ["b", "a"]
    assert_same({node: turned[node] for node in NODES}, found)
    # The feature maps of the top images, whose sizes are the layers' own.
    pictured = run(("b", "a"), maps=True)
    assert [pictured[node].maps.shape[2:] for node in ("b", "a")] == [(4, 4), (8, 8)]
    np.testing.assert_array_equal(pictured["b"].maps, run("b", maps=True).maps)


def test_forms_change_no_integer(found):
    assert_same(run(form="dense"), found)


@pytest.mark.parametrize("case", ["kept", "computed again", "stored", "alone"])
def test_two_processes_change_no_bit(two_processes, case):
    """Two processes of two devices each, which read disjoint shares of the images; or each works for itself."""
    expected = narrow.arrays({"b": run("b", quantile=dissect.QUANTILE)})
    for index in range(1 if case == "alone" else 2):
        with np.load(two_processes / f"{case} {index}.npz") as saved:
            assert set(saved.files) == set(expected)
            for name in saved.files:
                np.testing.assert_array_equal(saved[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of what two processes have found, see narrow.py."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"]}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROGRAM.parents[2]), environment.get("PYTHONPATH")]))
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), port, str(index), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for out, err in outputs:
        assert "finished" in out, err[-3000:]
    return folder


# What is walked through, and what is stored


class Counting:
    """A source that counts how often items are read, and whose items may be damaged."""

    def __init__(self, data, damaged=()):
        self.data, self.damaged, self.read = data, damaged, []
        self.concepts = data.concepts

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.damaged:
            raise DamagedImage(str(index), "damaged")
        return self.data[index]


@pytest.mark.parametrize(("memory", "walks"), [(1 << 30, 1), (0, 3)])
def test_what_fits_is_read_once(memory, walks):
    data, told = Counting(DATA), []
    run(data=data, memory=memory, progress=lambda what, images: told.append((what, images)))
    read = np.bincount(data.read)
    np.testing.assert_array_equal(read, walks + (np.arange(13) == 0))  # the first one for the size of the images
    steps = ["feature maps", "tally"] if memory else ["feature maps", "thresholds", "tally"]
    assert list(dict.fromkeys(what for what, _ in told)) == steps
    for step in steps:
        assert sum(images for what, images in told if what == step) == 13


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_stored_parts_are_not_computed_again(found, memory):
    store, computed = {}, []

    def memo(name, compute):
        if name not in store:
            computed.append(name)
            store[name] = compute()
        return store[name]

    assert_same(run(memo=memo, memory=memory), found)
    assert computed == ["features-00000", "features-00001"]
    assert all(isinstance(leaf, np.ndarray) for part in store.values() for leaf in part.values())
    assert {node: leaf.shape for node, leaf in store["features-00001"].items()} == {
        "a": (8, 8, 8, 5),
        "b": (8, 4, 4, 7),
    }

    def refuse(name, compute):
        return store[name] if name in store else pytest.fail(f"{name} was computed")

    assert_same(run(memo=refuse, memory=memory), found)
    # Of a run that was stopped, what is there is used and only the rest is computed.
    del store["features-00001"]
    assert_same(run(memo=memo, memory=memory), found)
    assert computed == ["features-00000", "features-00001", "features-00001"]


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_any_walk_through_the_images(found, memory):
    """In another order, with gaps between them; one that does not fit the plan is refused."""
    rows = [[7, None, 3, None, 12, 0, 1, 2], [4, 5, 6, 8, None, 11, 10, 9]]

    def walk(rows):
        for row in rows:
            items = [DATA[i if i is not None else 0] for i in row]
            batch = SimpleNamespace(
                images=np.stack([item.image for item in items]),
                planes=np.stack([item.planes for item in items]),
                scalars=np.stack([item.scalars for item in items]),
                ids=[item.id for item in items],
                mask=np.array([i is not None for i in row]),
            )
            yield np.array([i or 0 for i in row], np.int32), batch

    assert_same(run(walk=lambda: walk(rows), memory=memory), found)
    with pytest.raises(ValueError, match="walk: expected at most 2 batches of 8 images, got 8 in batch 3"):
        run(walk=lambda: walk([*rows, [None] * 8]), memory=memory)
    with pytest.raises(ValueError, match="walk: expected at most 1 batches of 16 images, got 8 in batch 1"):
        run(walk=lambda: walk(rows), batch_size=16, memory=memory)


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_images_that_could_not_be_read_do_not_count(memory):
    """Announced were more than the walk yields: the same as a set without them."""
    images, planes, scalars = (np.stack([getattr(DATA[i], name) for i in range(9)]) for name in PARTS)
    nine = SegmentedArrays(images, planes, DATA.concepts, scalars=scalars)

    def walk():
        for numbers, batch in dissection.in_order(DATA, narrow.BATCH):
            yield numbers, SimpleNamespace(**(vars(batch) | {"mask": batch.mask & (numbers < 9)}))

    assert_same(run(walk=walk, memory=memory), run(data=nine, memory=memory))


def test_labels_that_are_not_held_are_read_again(found, monkeypatch):
    monkeypatch.setattr(dissection, "_LABELS", 0)
    data = Counting(DATA)
    assert_same(run(data=data), found)
    np.testing.assert_array_equal(np.bincount(data.read), 2 + (np.arange(13) == 0))


def test_one_image():
    data = narrow.data(1)
    for memory in (1 << 30, 0):
        one = run(data=data, memory=memory)["b"]
        assert one.images == 1
        np.testing.assert_array_equal(one.top.image, [[0] + [NONE] * 8] * 7)
        features = np.asarray(dissection.extractor(NETWORK, NODES)(PARAMS, np.stack([data[0].image] * 8))[1])[:1]
        np.testing.assert_array_equal(one.top.value[:, 0], features.max(axis=(0, 1, 2)))
        expected = np.quantile(features.astype(np.float64), 1 - QUANTILE, axis=(0, 1, 2)).astype(np.float32)
        np.testing.assert_array_equal(one.thresholds, expected)
        assert one.tally.label_area.sum() > 0


def test_a_layer_without_positions_counts_as_one(found):
    one = run("mean")
    assert one.positions == (1, 1)
    items = [DATA[i] for i in range(13)]
    values = capture(NETWORK, PARAMS, jnp.asarray(np.stack([item.image for item in items])), ["mean"])[1]["mean"]
    np.testing.assert_allclose(one.thresholds, np.quantile(values, 1 - QUANTILE, axis=0), rtol=1e-5)
    firing = (np.asarray(values) > one.thresholds).sum(axis=0)
    np.testing.assert_array_equal(one.tally.activation, 256 * firing)


def test_the_quantile_and_its_method_reach_the_thresholds(found):
    for memory in (1 << 30, 0):
        higher = run(method="higher", memory=memory, quantile=0.0501)
        for node in NODES:
            features = dissection.extractor(NETWORK, (node,))(PARAMS, np.stack([DATA[i].image for i in range(13)]))
            expected = np.quantile(np.asarray(features[0]), 1 - 0.0501, axis=(0, 1, 2), method="higher")
            np.testing.assert_array_equal(higher[node].thresholds, expected)
    assert run("a", quantile=0.5).thresholds.sum() < found["a"].thresholds.sum()


# Plans


def planned(nodes=NODES, images=13, **options):
    options = {"labels": 10, "categories": 4, "batch_size": 8, **options}
    return dissect.plan(NETWORK, PARAMS, nodes, images, **options)


def test_plan_in_numbers():
    plan = planned()
    assert plan.shapes == {"a": (8, 8, 5), "b": (4, 4, 7)}
    assert (plan.images, plan.batch_size) == (13, 8)
    assert plan.features == 16 * 4 * (8 * 8 * 5 + 4 * 4 * 7)  # the second batch is filled up
    assert plan.counts == 12 * (10 + 2 * 4 + 1) * 8  # of each unit: intersections, two unions, activations
    assert (plan.keep, plan.walks) == (True, 1)
    assert plan.budget > plan.features
    multiply_adds = 8 * 8 * 5 * 27 + 4 * 4 * 7 * 45
    assert plan.flops is not None
    assert 1.6 * multiply_adds < plan.flops < 2.4 * multiply_adds
    again = planned(memory=plan.features - 1)
    assert (again.keep, again.walks, again.budget) == (False, 3, plan.features - 1)
    assert again.counts == plan.counts + 12 * 4 * 65536
    assert planned(memory=plan.features).keep
    assert planned(("a",)).features == 16 * 4 * 8 * 8 * 5


def test_plan_in_words():
    lines = planned(memory=1 << 20).lines()
    assert lines[0] == "13 images in batches of 8; layers: a (8 x 8 x 5), b (4 x 4 x 7)"
    assert lines[1].startswith("feature maps are kept in memory: 27.0 KiB of at most 1.0 MiB; counts take 1.8 KiB on ")
    again = planned(memory=1000).lines()[1]
    assert again.startswith("feature maps are computed three times, as 27.0 KiB are more than 1000 bytes; counts take ")
    assert again.endswith("TFLOP in all")
    assert " on each device, computing them about 1.1 MiB, labels 0 bytes; " in lines[1]
    assert ", labels 20.0 KiB; " in planned(memory=1 << 20, planes=(2, 16, 16), labels=255).lines()[1]


def test_memory_that_is_stated_beforehand():
    """Labels as they are held, in bytes; what programs take for a while is not less than what they say themselves."""
    plan, data = planned(planes=(2, 16, 16)), DATA
    batches = [counting.present(data[i].planes[None], data[i].scalars[None], 10, least=16) for i in range(13)]
    held = sum(leaf.nbytes for one in batches for leaf in jax.tree.leaves(one))
    assert held <= plan.labels == 16 * (2 * 16 * 16 + 3 * 4 * 64)
    assert planned(planes=(2, 16, 16), labels=300).labels == 16 * (2 * 2 * 16 * 16 + 3 * 4 * 64)
    assert planned(planes=(2, 16, 16), memory=plan.labels - 1).labels == 0
    units, size = 32, 28
    labels = counting.Present(
        jax.ShapeDtypeStruct((8, 2, size, size), np.uint8), *[jax.ShapeDtypeStruct((8, 64), np.int32)] * 3
    )
    state = jax.eval_shape(lambda: counting.init(units, 10, 4))
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((8, 4, 4, units), (units,), (10, 4))]
    for form in ("gated", "dense"):
        program = jax.jit(inspect.unwrap(counting.update), static_argnames="form")
        taken = program.lower(state, *shapes[:2], labels, shapes[2], form=form).compile().memory_analysis()
        assert taken is not None
        stated = dissection._working(8, 8, 1, (4, 4, units), (2, size, size), form, keep=False)
        assert 0.5 * stated < taken.temp_size_in_bytes + taken.output_size_in_bytes
        assert taken.temp_size_in_bytes <= stated


def test_free_memory_is_that_of_the_devices(meshes, monkeypatch):
    """By default half of it is used; devices of a CPU share the machine's."""

    def device(free):
        return SimpleNamespace(memory_stats=lambda: free and {"bytes_limit": 100 + free, "bytes_in_use": 100})

    monkeypatch.setattr(jax, "local_devices", lambda: [device(1000), device(600)])
    assert planned().budget == 500
    assert planned(mesh=meshes[2]).budget == 800
    monkeypatch.setattr(jax, "local_devices", lambda: [device(None)] * 8)
    assert 1 << 20 < planned().budget < 1 << 50


def test_feature_shapes():
    assert dissect.feature_shapes(NETWORK, PARAMS, ["mean", "a"]) == {"mean": (1, 1, 7), "a": (8, 8, 5)}


def test_one_channel(slow):
    """Grey images into a network that sees them as the narrow one sees three equal channels."""
    items = [DATA[i] for i in range(5)]
    images, planes, scalars = (np.stack([getattr(x, name) for x in items]) for name in PARTS)
    grey = SegmentedArrays(images[..., :1], planes, DATA.concepts, scalars=scalars)
    params = PARAMS | {"a": PARAMS["a"].sum(axis=2, keepdims=True)}
    one = dissect.dissect(NETWORK, params, "a", grey, quantile=QUANTILE, batch_size=5)
    maps = np.asarray(dissection.extractor(NETWORK, ("a",))(params, images[..., :1])[0])
    np.testing.assert_allclose(
        maps, dissection.extractor(NETWORK, ("a",))(PARAMS, images[..., [0, 0, 0]])[0], rtol=1e-4, atol=1e-5
    )
    limits = np.quantile(maps.astype(np.float64), 1 - QUANTILE, axis=(0, 1, 2)).astype(np.float32)
    np.testing.assert_array_equal(one.thresholds, limits)
    wanted = slow.tally(maps, limits, planes, scalars, list(CATEGORIES), "image")
    np.testing.assert_array_equal(one.tally.intersection, wanted.intersection)
    with pytest.raises(ValueError, match="data: narrow does not take images of 16 x 16 x 1: "):
        run(data=grey)
    with pytest.raises(ValueError, match="data: narrow does not take images of 16 x 16 x 3: "):
        dissect.dissect(NETWORK, params, "a", DATA, batch_size=8)
    mnist, shapes = models.network("carlini_mnist"), models.shapes("carlini_mnist")
    assert dissect.feature_shapes(mnist, shapes, mnist.nodes[:1], channels=1) == {mnist.nodes[0]: (26, 26, 32)}


def test_a_second_dissection_traces_nothing():
    traced = []

    def counted(params, images, tap):
        traced.append(1)
        return NETWORK.apply(params, images, tap)

    network = dataclasses.replace(NETWORK, name="counted", apply=counted)
    first = dissect.dissect(network, PARAMS, "b", DATA, batch_size=8)
    before = len(traced)
    again = dissect.dissect(network, PARAMS, "b", DATA, batch_size=8)
    assert len(traced) == before > 0
    np.testing.assert_array_equal(again.tally.intersection, first.tally.intersection)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node": "c"}, "node: narrow has no node 'c'"),
        ({"node": ()}, r"nodes: expected different layers, got \[\]"),
        ({"node": ("a", "a")}, "nodes: expected different layers"),
        ({"node": "rows"}, r"node: rows of narrow is float32 \[1, 4, 7\], not a feature map"),
        ({"node": "number"}, r"node: number of narrow is int32 \[1, 1\], not a feature map"),
        ({"batch_size": 0}, "batch_size: expected a multiple of the 1 devices, got 0"),
        ({"quantile": 1.0}, "quantile: expected a share between 0 and 1"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"memory": -1}, "memory: expected bytes, not negative, got -1"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form: expected one of auto, gated, dense, got 'x'"):
        inspect.unwrap(dissect.dissect)(NETWORK, PARAMS, "b", DATA, batch_size=8, form="x")  # type: ignore[arg-type]


@pytest.mark.parametrize("quantile", ["a", None, True])
def test_a_quantile_that_is_no_number_is_refused(quantile):
    with pytest.raises(TypeError, match="quantile: expected a number, got "):
        inspect.unwrap(quantiles.check)(quantile)  # without the types that only tests check


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_images_of_another_size_are_refused_before_anything_is_computed(memory):
    large = SegmentedArrays(np.zeros((3, 24, 20, 3), np.float32), np.zeros((3, 8, 8), int), DATA.concepts)
    told = []
    message = r"data: expected images of 16 x 16 x 3 for narrow, got 24 x 20 x 3; .* by Broden\(image_size=16\)"
    with pytest.raises(ValueError, match=message):
        run(data=large, memory=memory, progress=lambda *what: told.append(what))
    with pytest.raises(ValueError, match=message):  # what a walk yields need not be what the source holds
        run(walk=lambda: dissection.in_order(large, 8), memory=memory, progress=lambda *what: told.append(what))
    assert not told


def test_the_size_of_images_is_that_of_the_first_that_can_be_read():
    assert dissection.item_shapes(NETWORK, Counting(DATA, damaged=[0, 1])) == ((16, 16, 3), (2, 16, 16))
    assert dissection.item_shapes(NETWORK, Counting(DATA, damaged=range(13))) == ((16, 16, 3), (0, 0, 0))


def test_batches_that_devices_cannot_share_are_refused(meshes):
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 4 devices, got 6"):
        run(mesh=meshes[4], batch_size=6)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="data: expected at least one image"):
        run(data=Empty())

    def nothing():
        item = DATA[0]
        batch = SimpleNamespace(
            images=item.image[None],
            planes=item.planes[None],
            scalars=item.scalars[None],
            ids=[""],
            mask=np.zeros(1, bool),
        )
        yield np.zeros(1, np.int32), batch

    for memory in (1 << 30, 0):
        with pytest.raises(ValueError, match="data: expected at least one image that can be read"):
            run(walk=nothing, batch_size=1, memory=memory)


class Empty:
    concepts = DATA.concepts

    def __len__(self):
        return 0


def test_more_positions_than_are_counted_are_refused():
    assert planned(("a",), (1 << 25) - 8, memory=0).images == (1 << 25) - 8
    with pytest.raises(ValueError, match=r"data: expected at most 2147483647 positions of a, got 2147483648"):
        planned(("a",), 1 << 25, memory=0)
    assert planned(("b",), 1 << 25, memory=0).images == 1 << 25


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_nan_is_refused_and_units_are_named(memory):
    params = {**PARAMS, "b bias": np.array([0, 0, np.nan, 0, 0, np.nan, 0], np.float32)}
    with pytest.raises(ValueError, match=r"^b: NaN among the activations of 2 units: 2, 5"):
        dissect.dissect(NETWORK, params, NODES, DATA, batch_size=narrow.BATCH, memory=memory)


def test_a_damaged_image_ends_a_walk_that_does_not_leave_it_out():
    with pytest.raises(DamagedImage, match="damaged"):
        run(data=Counting(DATA, damaged=[9]))
