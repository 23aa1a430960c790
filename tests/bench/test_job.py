"""jaxinterp bench on the smallest network: every subject from the command line to records and figures; bad input."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import attacks, cli
from jaxinterp.bench import attacks as attack_bench
from jaxinterp.bench import device, job, scaling
from jaxinterp.bench.cost import Cost
from jaxinterp.bench.device import Peak

SMALL = ("--model", "small_cnn", "--weights", "seeded", "--size", "8", "--batch", "2", "--rounds", "2")


@pytest.fixture(autouse=True)
def peaks(monkeypatch):
    """Peaks that are known, so that shares of them can be computed again; nothing tells energy."""
    monkeypatch.setattr("jaxinterp.bench.setting._peak", lambda form: Peak(1e11, 1e10, "measured"))
    monkeypatch.setattr(device, "energy_meter", lambda number: None)


def bench(out: Path, *arguments: str) -> list[dict]:
    assert cli.main(["bench", *arguments, *SMALL, "--out", str(out)]) == 0
    found = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    for record in found:
        assert {"time", "cpu", "cores", "versions", "matmul_precision", "device", "command"} <= set(record)
        assert (record["network"], record["weights"], record["size"], record["batch"]) == ("small_cnn", "seeded", 8, 2)
        for row in record.get("results", []):
            seconds = row["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert row["per_second"] == pytest.approx(row["work"] / seconds["median"])
            assert row["memory"]["peak"] > 1e7
            if "flops" in row:
                reached = row["flops"] / seconds["median"]
                assert row["flops_per_second"] == pytest.approx(reached)
                assert row["share_of_peak"] == pytest.approx(reached / 1e11)  # devices of a CPU share it
                assert row["bound"] == ("memory" if row["flops"] / row["bytes"] < 10 else "compute")
    return found


def drawn(path: Path) -> None:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


def test_attacks_and_models(tmp_path, capsys):
    specs = ("--attack", "ifgsm:steps=2,eps=1")
    formats = ("--formats", "float32", "bf16")
    found = bench(tmp_path, "attacks", "models", *specs, *formats, "--sweep", "--largest", "2")
    printed = capsys.readouterr().out
    assert [record["benchmark"] for record in found] == [
        "bench attacks", "bench attacks, batches", "bench models", "bench models, batches",
    ]  # fmt: skip
    sweeps, found = found[1::2], found[::2]
    one, two = ({row["name"]: row for row in record["results"]} for record in found)
    assert set(one) == {
        f"{what} {form}" for what in ("gradient", "ifgsm:steps=2,eps=1") for form in ("float32", "bf16")
    }
    attack = one["ifgsm:steps=2,eps=1 float32"]
    # Two steps of two images. The program of a step computes about what a gradient does; its loop counts once.
    assert attack["work"] == 4
    assert attack["unit"] == "image steps"
    assert attack["flops"] == pytest.approx(2 * one["gradient float32"]["flops"], rel=0.3)
    assert attack["network_flops"] == pytest.approx(2 * one["gradient float32"]["network_flops"])
    assert attack["network_flops"] == pytest.approx(2 * two["gradient float32"]["network_flops"])
    assert two["gradient float32"]["network_flops"] > 1.5 * two["forward float32"]["network_flops"]
    assert attack["compile"]["programs"] >= 3
    assert attack["over gradients"] > 0
    change = found[0]["changes"]["bf16"]
    assert not change["same bits"]
    assert 0.8 < change["gradient signs that agree"] < 1
    expected = attacks.run(attacks.IFGSM(steps=2, eps=1.0), *problem(), key=jax.random.key(0)).success
    assert attack["success"] == pytest.approx(float(np.mean(expected)))
    assert change["ifgsm:steps=2,eps=1"]["success in float32"] == attack["success"]
    assert 0 < found[1]["changes"]["bf16"]["logits, largest difference over largest"] < 0.05
    assert [record["swept"] for record in sweeps] == ["ifgsm:steps=2,eps=1", "gradient"]
    assert {record["swept format"] for record in sweeps} == {"float32"}
    for row in sweeps[0]["sweep"]["rows"]:  # two steps of every image, as in the table
        assert row["per_second"] == pytest.approx(2 * row["batch"] / row["seconds"]["median"])
    for record in sweeps:
        assert [row["batch"] for row in record["sweep"]["rows"]] == [1, 2]
        assert record["sweep"]["ended"] == "largest"
        assert record["sweep"]["predicted"] > 1000
    assert "what bf16 changes, compared with float32:" in printed
    assert "energy: this device does not tell" in printed
    for name in ("attacks-roofline", "attacks-batches", "models-roofline", "models-batches"):
        drawn(tmp_path / f"{name}.png")


def problem():
    setting = job.prepare("small_cnn", weights="seeded", size=8, batch=2, rounds=1, forms=("float32",), seed=0)
    return setting.network.bind(setting.params), setting.images(), setting.labels


def test_train(tmp_path):
    [found] = bench(tmp_path, "train")
    rows = {row["name"]: row for row in found["results"]}
    assert set(rows) == {f"{what} float32" for what in ("forward", "standard", "adversarial", "consistent")}
    assert {row["work"] for row in rows.values()} == {2}
    # x* and a batch twice as large.
    assert rows["adversarial float32"]["flops"] > 2 * rows["standard float32"]["flops"]
    assert all(row["memory"]["program"] > 0 for row in rows.values())


def test_effect_cam_and_dissect(tmp_path, capsys):
    found = bench(tmp_path, "effect", "cam", "dissect", "--cell", "4x8", "--images", "5", "--node", "conv3")
    effects, maps, units = ({row["name"]: row for row in record["results"]} for record in found)
    assert (found[0]["cell"], found[0]["cells"]) == ([4, 8], 2)
    assert set(effects) == {"forward float32", "effects, whole passes float32", "effects, windows float32"}
    whole = effects["effects, whole passes float32"]
    assert whole["work"] == 2 * (2 + 1)  # images x (cells and the whole)
    assert whole["network_flops"] == pytest.approx(3 * effects["forward float32"]["network_flops"])
    assert whole["over"]["times"] == 3
    assert whole["over"]["what"] == "forward float32"
    assert {"cam float32", "gradcam float32", "eigencam float32"} <= set(maps)
    assert not {"scorecam float32"} & set(maps)
    assert maps["cam float32"]["over"]["median"] > 0
    assert set(units) == {
        f"{what} float32" for what in ("feature maps", "whole dissection", "thresholds", "tally, gated", "tally, dense")
    }
    assert units.pop("whole dissection float32")["work"] == 5  # the last batch is not full
    assert {row["work"] for row in units.values()} == {4}
    printed = capsys.readouterr().out
    assert "windows and whole passes give 100.00% of the cells the same kind" in printed
    assert "gated and dense tallies are equal integers: True" in printed


def test_scaling(tmp_path, capsys):
    [found] = bench(tmp_path, "scaling", "--devices", "2", "--attack", "ifgsm:steps=2")
    rows = {(row["kind"], row["devices"]): row for row in found["results"]}
    assert set(rows) == {(kind, number) for kind in ("strong", "weak") for number in (1, 2)}
    assert {key: row["batch"] for key, row in rows.items()} == {
        ("strong", 1): 2, ("strong", 2): 2, ("weak", 1): 1, ("weak", 2): 2,
    }  # fmt: skip
    for (kind, number), row in rows.items():
        assert (row["collectives"], row["collectives in loops"]) == (0, 0)
        assert row["work"] == 2 * row["batch"]
        assert row["speedup"] == pytest.approx(row["per_second"] / rows[kind, 1]["per_second"])
        assert row["efficiency"] == pytest.approx(row["speedup"] / number)
    assert "in loops" in capsys.readouterr().out
    drawn(tmp_path / "scaling-devices.png")


def test_numbers_of_devices():
    assert [scaling.numbers(most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_comparing(tmp_path, capsys):
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, seconds in ((one, 1.0), (two, 0.5)):
        rows = [{"name": "pgd float32", "seconds": {"median": seconds, "low": seconds, "high": seconds}}]
        path.write_text(json.dumps({"benchmark": "bench attacks", "results": rows}) + "\n")
    assert cli.main(["bench", "--compare", str(one), str(two)]) == 0
    assert "x 0.50   faster" in capsys.readouterr().out
    assert cli.main(["bench", "attacks", "--compare", str(one), str(two)]) == 2
    assert "--compare goes without subjects" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attaks"], "unknown subject 'attaks'; did you mean 'attacks'"),
        (["models", "--model", "smal_cnn"], "unknown model 'smal_cnn'; did you mean 'small_cnn'"),
        (["models", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["models", "--rounds", "0"], "--rounds must be at least 1"),
        (["models", "--size", "0"], "--size must be at least 1"),
        (["models", "--seed", "-1"], "--seed must be from 0"),
        (["models", "--formats", "fp16"], "--formats: unknown format 'fp16'"),
        (["models", "--weights", "converted"], "run: jaxinterp convert small_cnn"),
        (["models", "--model", "carlini_mnist", "--size", "20"], "cannot take images of 20 x 20 pixels"),
        (["models", "--sweep", "--largest", "0"], "--largest must be at least 1"),
        (["models", "--sweep", "--memory", "0"], "--memory must be positive"),
        (["models", "--patience", "nan"], "--patience must be positive, got nan"),
        (["models", "dissect", "--images", "0"], "--images must be at least --batch, 8, got 0"),
        (["dissect", "--sweep"], "--sweep goes with attacks, effect, cam, models, not with dissect"),
        (["attacks", "--attack", "pdg"], "unknown attack 'pdg'; did you mean 'pgd'"),
        (["attacks", "--attack", "pgd:eps=-1"], "PGD.eps must be finite and not negative"),
        (["effect", "--cell", "40"], "from 1 pixel to the image's 32 x 32 pixels, got 40 x 40"),
        (["dissect", "--batch", "2", "--images", "1"], "--images must be at least --batch, 2, got 1"),
        (["models", "--sweep", "--batches", "0"], "--batches must be at least 1"),
        (["models", "--batches", "4"], "--batches goes with --sweep"),
        (["models", "--sweep", "--batches", "8", "16", "--largest", "4"], "--batches: none is as small as --largest 4"),
        (["dissect", "--node", "conv9"], "--node: small_cnn has no node 'conv9'"),
        (["scaling", "--devices", "99"], "--devices: there are 8, got 99"),
        (["scaling", "--devices", "0"], "--devices must be at least 1, got 0"),
        (["models", "--precision", "highest"], "--precision: bench has --formats"),
        (["models", "--peers"], "--peers goes with attacks and cam, not with models"),
        (["--compare", "/none.jsonl", "/none.jsonl"], "/none.jsonl"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXINTERP_CKPTS", str(tmp_path / "nowhere"))
    out = tmp_path / "out"
    given = arguments if "--model" in arguments else [*arguments, "--model", "small_cnn"]
    assert cli.main(["bench", *given, "--out", str(out)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not out.exists()


def test_memory_of_a_device_that_gives_out(monkeypatch, tmp_path, capsys):
    def give_out(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.")

    monkeypatch.setattr("jaxinterp.bench.models.bench", give_out)
    assert cli.main(["bench", "models", *SMALL, "--out", str(tmp_path)]) == 2
    assert "out of memory; a smaller batch" in capsys.readouterr().err


def test_steps_are_what_examples_paid_for():
    model, images, labels = problem()
    result = attacks.run(attacks.FGSM(), model, images, labels, key=jax.random.key(0))
    counts = {"forward": jnp.array([5, 3], jnp.int32), "backward": jnp.array([4, 0], jnp.int32)}
    assert attack_bench.steps_taken(dataclasses.replace(result, **counts)) == 4 + 3


def test_operations_of_an_attack_whose_iterations_hold_many_passes():
    """SPSA looks at several points in one iteration, and each of them is a pass that was paid for."""
    assert attack_bench.iterations(20, Cost(100.0, 1), Cost(105.0, 1)) == 20
    assert attack_bench.iterations(20, Cost(410.0, 1), Cost(100.0, 1)) == 5
    assert attack_bench.iterations(20, None, Cost(1.0, 1)) == 20
    model, images, labels = problem()
    setting = job.prepare("small_cnn", weights="seeded", size=8, batch=2, rounds=1, forms=("float32",), seed=0)
    attack = attacks.SPSA(steps=2, samples=16, chunk=4)
    result = attacks.run(attack, model, images, labels, key=jax.random.key(0))
    found = attack_bench._account(setting, attack, model, "float32", lambda: result)
    assert found.work == int(np.sum(result.forward))
    step, written = attack_bench.costs_of_step(model, images, labels, result)
    assert found.cost is not None
    assert found.network is not None
    assert step is not None
    assert written is not None
    passes = found.work / 2  # of the batch
    assert found.cost.flops == pytest.approx(passes * step.flops, rel=0.35)
    assert found.network.flops == pytest.approx(passes * written.flops)


def test_peers_that_are_missing_are_named(monkeypatch, tmp_path, capsys):
    find_spec = importlib.util.find_spec
    away = ("torch", "torchattacks", "foolbox", "pytorch_grad_cam")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in away else find_spec(name))
    [found] = bench(tmp_path, "attacks", "--attack", "fgsm", "--peers")
    printed = capsys.readouterr().out
    for package in ("torch", "torchattacks", "foolbox", "grad-cam"):
        assert f"peer {package}: not installed; run: pip install {package}" in printed
    assert "measured without any" in printed
    assert {row["name"] for row in found["results"]} == {"gradient float32", "fgsm float32"}
    assert "peers" not in found


def test_batch_sizes_of_effects_and_maps(tmp_path, capsys):
    found = bench(tmp_path, "effect", "cam", "--cell", "4", "--sweep", "--largest", "2")
    printed = capsys.readouterr().out
    sweeps = found[1::2]
    assert [record["swept"] for record in sweeps] == ["effects of 4 cells", "cam"]
    for record in sweeps:
        first, second = record["sweep"]["rows"]
        assert (first["batch"], second["batch"], record["sweep"]["ended"]) == (1, 2, "largest")
        assert 0 < first["program"] < second["program"]
        for row in (first, second):
            assert row["per_second"] == pytest.approx(row["batch"] / row["seconds"]["median"])
    for name in ("effect", "cam"):
        drawn(tmp_path / f"{name}-batches.png")
    assert printed.count("ended by the largest batch asked for") == 2
    assert cli.main(["bench", "cam", *SMALL, "--sweep", "--memory", "1e-7", "--out", str(tmp_path / "none")]) == 2
    assert "--memory: not even a batch of one fits" in capsys.readouterr().err
