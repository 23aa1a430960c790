"""Several processes give the files of one; whatever befalls one of them, all end in time, say why, and can go on."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxinterp import broden, models, weights
from jaxinterp.weights import checkpoint, seeded

from . import commands

TESTS = Path(__file__).parent
PROGRAM = TESTS / "commands.py"
COMMANDS = ["explain", "attack", "dissect"]
PICTURES = 3  # fewer than eight devices, and the last chunk holds one


@dataclasses.dataclass
class Ended:
    """What a process left: its exit status, its output, what it said otherwise."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints, pictures and a set in Broden's format."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for name in "abd"[:PICTURES]:
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / "pictures" / f"{name}.png")
    (root / "pictures" / "broken.png").write_bytes(b"no picture")
    for scene in ("day", "night"):
        (root / "scenes" / scene).mkdir(parents=True)
        for i in range(2):
            patches = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
            Image.fromarray(patches).save(root / "scenes" / scene / f"{scene}{i}.png")
    broden.make([], root / "broden", scenes=root / "scenes", size=32, crops=5)
    # One of twenty images is damaged: it is missing in its block, whoever reads that.
    next(path for path in sorted((root / "broden" / "images").rglob("*.*g"))).write_bytes(b"no picture")
    source = {"file": "seeded", "sha256": "0", "known": False}
    params = seeded.params(models.shapes("small_cnn"))
    checkpoint.save(params, root / "ckpts" / "small_cnn", name="small_cnn", classes=10, source=source)
    return root


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(words: list[str], devices: int, **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        **variables,
        "XLA_FLAGS": os.environ["XLA_FLAGS_OF_ONE_DEVICE"],
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(TESTS.parent),
    }
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def together(
    words: list[list[str]], devices: int, crash=None, patience: int = 8, timeout: float = 150, **variables: str
) -> list[Ended]:
    """Ends of processes that work together, each with its own words."""
    address = f"127.0.0.1:{free_port()}"
    common = ["--distributed", "--coordinator-address", address, "--num-processes", str(len(words))]
    limits = ["--peer-timeout", str(patience), "--start-timeout", "60"]
    started = [
        start([*mine, *common, "--process-id", str(i), *limits], devices, CRASH=(crash or {}).get(i, ""), **variables)
        for i, mine in enumerate(words)
    ]
    return [end(process, timeout) for process in started]


def end(process: subprocess.Popen, timeout: float = 150) -> Ended:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, out, err)


def alone(folder: Path, out: Path, devices: int, commands=COMMANDS) -> None:
    ended = end(start([str(PROGRAM), str(folder), str(out), *commands], devices))
    assert ended.status == 0, ended.err[-3000:]


def run_together(folder: Path, out: Path, devices: int, commands=COMMANDS, crash=None) -> tuple[Ended, Ended]:
    first, second = together([[str(PROGRAM), str(folder), str(out), *commands]] * 2, devices, crash)
    for ended in (first, second):
        assert "Traceback" not in ended.err
        assert "***" not in ended.err
    return first, second


class Files(dict[str, bytes]):
    """Contents by name; a failure is to name what differs, not to print it."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


def results(out: Path) -> Files:
    """All files but the records of the machine, which tell the number of devices."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "machine.json"]
    return Files({str(path.relative_to(out)): path.read_bytes() for path in files})


def of(command: str, files: Files) -> Files:
    """Those of one command."""
    return Files({name: content for name, content in files.items() if name.startswith(f"{command}/")})


def assert_same(out: Path, expected: Files) -> None:
    found = results(out)
    assert sorted(found) == sorted(expected)
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory) -> Files:
    """The files of one process with one device."""
    out = tmp_path_factory.mktemp("one") / "out"
    alone(folder, out, 1)
    found = results(out)
    assert {"explain/cells.csv", "explain/index.html", "attack/images.csv", "dissect/tally.csv"} <= found.keys()
    assert any(name.startswith("attack/adversarial") for name in found)
    assert b",true," in found["explain/images.csv"]  # a perturbation to explain: d.png reaches its target
    return found


def test_two_processes_leave_the_files_of_one(folder, expected, tmp_path):
    first, second = run_together(folder, tmp_path / "out", 2)
    assert (first.status, second.status) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert_same(tmp_path / "out", expected)
    assert "broken.png: could not be read" in first.out
    assert "16 of 16 units" in first.out
    assert f"{PICTURES}.0/{PICTURES} pictures" in first.err
    assert second.out == second.err == ""


def test_a_killed_run_goes_on_with_other_devices(folder, expected, tmp_path):
    """Process 1 of two is killed before it has stored its chunk; one process with eight devices goes on."""
    out = tmp_path / "out"
    first, second = run_together(folder, out, 1, ["explain"], {1: "explain/ifgsm:kill"})
    assert (first.status, second.status) == (2, 2)
    assert "has been silent for 8 s and counts as dead" in first.err
    assert "was killed (SIGKILL)" in second.err
    for ended in (first, second):
        assert "continues from there:\n" in ended.err
        assert str(PROGRAM) in ended.err.splitlines()[-1]
    assert not (out / "explain" / "images.csv").exists()
    [chunk] = out.rglob("parts/ifgsm*.npz")
    finished = chunk.stat().st_mtime_ns
    alone(folder, out, 8, ["explain"])
    assert_same(out, of("explain", expected))
    assert chunk.stat().st_mtime_ns == finished


def test_the_death_of_process_0_and_a_full_disk(folder, expected, tmp_path):
    """Stopped twice in dissection, by what may befall either; then two processes end the run."""
    out, command = tmp_path / "out", ["dissect"]
    first, second = run_together(folder, out, 1, command, {0: "dissect/features-00002:kill"})
    assert (first.status, second.status) == (2, 2)
    assert "another process, most likely number 0, which coordinates, has died" in second.err
    stored = {path: path.stat().st_mtime_ns for path in out.rglob("parts/features-*.npz")}
    assert {"features-00000", "features-00001"} <= {path.stem for path in stored}
    first, second = run_together(folder, out, 1, command, {0: "dissect/features:full"})
    assert (first.status, second.status) == (2, 2)
    assert "No space left on device" in first.err
    assert "ended with the others: process 0 on " in second.err
    assert "No space left on device" in second.err
    assert all(path.stat().st_mtime_ns == when for path, when in stored.items())
    first, second = run_together(folder, out, 2, command)
    assert (first.status, second.status) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert_same(out, of("dissect", expected))


STUDIES = {
    "pse_statistics": [],
    "cam_localization": [],
    "cell_size": ["--sizes", "16", "8"],
    "definitions": [],
    "refined_attacks": ["--fractions", "0.5"],
    "untargeted_and_strength": ["--strengths", "8", "64"],
    "smooth_attacks": ["--steps", "2", "--search-steps", "2", "--search-iterations", "4", "--drawn", "1"],
    "compare_all": ["--passes", "4", "--queries", "9"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", STUDIES)
def test_two_processes_leave_the_answers_of_one(folder, tmp_path, name):
    """An experiment on three pictures, two of them at once, so that each process has a chunk."""
    attacks = [] if name in ("smooth_attacks", "untargeted_and_strength") else ["--attack", "ifgsm"]
    words = [str(TESTS.parent / "experiments" / f"{name}.py"), str(folder / "pictures"), "--model", "small_cnn"]
    words += ["--cell", "16", "--batch-size", "2", "--labels", "predicted", *attacks, *STUDIES[name]]
    variables = {"JAXINTERP_CKPTS": str(folder / "ckpts")}
    ended = end(start([*words, "--out", str(tmp_path / "one")], 1, **variables), timeout=600)
    assert ended.status == 0, ended.err[-3000:]
    expected = results(tmp_path / "one")
    assert f"{name}/answers.json" in expected or "answers.json" in expected
    pair = together([[*words, "--out", str(tmp_path / "two")]] * 2, 2, timeout=600, patience=60, **variables)
    assert [each.status for each in pair] == [0, 0], pair[0].err[-2000:] + pair[1].err[-2000:]
    assert pair[1].out == ""
    if name == "compare_all":  # the rest of its files tell seconds
        found = results(tmp_path / "two")
        assert sorted(found) == sorted(expected)
        assert all(found[file] == expected[file] for file in ("table.md", "comparison.png"))
    else:
        assert_same(tmp_path / "two", expected)


def test_training_is_shared(folder, tmp_path, monkeypatch):
    """Two processes train as one does, but for rounding, and leave a checkpoint; more devices find nothing to do."""
    rng = np.random.default_rng(1)
    for face in range(10):
        (folder / "faces" / f"{face}").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / "faces" / f"{face}" / "a.png")
    (folder / "faces" / "3" / "b.png").write_bytes(b"no picture")
    first, second = run_together(folder, tmp_path / "two", 1, ["train"])
    assert (first.status, second.status) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert "b.png: could not be read" in first.out
    monkeypatch.setenv("JAXINTERP_CKPTS", "")
    commands.train(folder, tmp_path / "one")
    two, one = (
        np.genfromtxt(tmp_path / n / "train" / "training.csv", delimiter=",", names=True) for n in ("two", "one")
    )
    assert two.dtype.names == one.dtype.names
    assert two.dtype.names is not None
    for name in two.dtype.names:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3, err_msg=name)
    left = results(tmp_path / "two")
    (a, b) = (weights.load("small_cnn", root=tmp_path / n / "train" / "ckpts")[1] for n in ("two", "one"))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-3, err_msg=name)
    commands.train(folder, tmp_path / "two")
    same = results(tmp_path / "two")
    assert same["train/training.csv"] == left["train/training.csv"]
    assert all(
        np.array_equal(x, a[n]) for n, x in weights.load("small_cnn", root=tmp_path / "two/train/ckpts")[1].items()
    )


# What is refused, in programs that compute nothing

OPEN = """
import sys
from jaxinterp import cli, processes
from jaxinterp.processes import current, open_run

def main(words):
    if len(words) > 2:
        processes.versions = lambda: {"jax": words[2]}
    open_run(words[0], {"seed": int(words[1]), "attacks": {"pgd": {"steps": 3}}})
    print(current().settle(current().index, sum))

sys.exit(cli.guarded(main))
"""


@pytest.fixture(scope="module")
def opening(tmp_path_factory) -> str:
    """A program that opens a results directory."""
    path = tmp_path_factory.mktemp("program") / "opening.py"
    path.write_text(OPEN)
    return str(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([["0"], ["1"]], "config.seed: 0 process 0 on "),
        ([["0", "0.10.2"], ["0", "0.11.0"]], 'versions.jax: "0.10.2" process 0 on '),
    ],
)
def test_another_config_or_version_is_refused_by_all(opening, tmp_path, words, message):
    for ended in together([[opening, str(tmp_path / "out"), *mine] for mine in words], 1):
        assert ended.status == 2
        assert f"the processes were not given the same: {message}" in ended.err
        assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_other_numbers_of_processes_are_refused_by_all(opening, tmp_path):
    """Each would take a share of its own making: some chunks twice, others never."""
    address = f"127.0.0.1:{free_port()}"
    common = ["--distributed", "--coordinator-address", address, "--peer-timeout", "8", "--start-timeout", "60"]
    words = [str(opening), str(tmp_path / "out"), "0", *common]
    started = [start([*words, "--num-processes", str(2 + i), "--process-id", str(i)], 1) for i in range(2)]
    for ended in map(end, started):
        assert ended.status == 2
        assert "the processes were not given the same: options.--num-processes: 2 " in ended.err
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_shared_is_refused_by_all(opening, tmp_path):
    for ended in together([[opening, str(tmp_path / name), "0"] for name in ("one", "two")], 1, patience=2):
        assert ended.status == 2
        assert "is not the same directory for all: process 1 on " in ended.err
    assert not (tmp_path / "two").exists()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["config.json"]


def test_bad_arguments_of_one_end_all(opening, tmp_path):
    first, second = together([[opening, str(tmp_path / "out"), "0"], [opening, str(tmp_path / "out"), "x"]], 1)
    assert (first.status, second.status) == (2, 2)
    assert "invalid literal" in second.err
    assert "ended with the others: process 1 on " in first.err


def test_an_address_where_nobody_answers(opening, tmp_path):
    given = ["--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id", "1"]
    ended = end(start([opening, str(tmp_path / "out"), "0", "--distributed", *given, "--start-timeout", "1"], 1), 60)
    assert ended.status == 2
    assert "nobody answered at 127.0.0.1:" in ended.err
    assert "Traceback" not in ended.err


def test_no_cluster(opening, tmp_path):
    ended = end(start([opening, str(tmp_path / "out"), "0", "--distributed"], 1), 60)
    assert ended.status == 2
    assert "no cluster was found" in ended.err
    assert "--coordinator-address, --num-processes, --process-id" in ended.err


def test_processes_that_never_come(opening, tmp_path):
    given = ["--distributed", "--coordinator-address", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    ended = end(
        start([opening, str(tmp_path / "out"), "0", *given, "--process-id", "0", "--start-timeout", "3"], 1), 90
    )
    assert ended.status == 2
    assert "the processes did not come together" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_images_of_several_processes_are_one_array(axes):
    """What a process holds of every result has the bits of a run on all images, and errors come to all processes."""
    words = [str(TESTS / "global_arrays.py"), str(free_port())]
    processes = [start([*words, str(index), axes], devices=2) for index in range(2)]
    for ended in list(map(end, processes)):
        assert ended.status == 0, ended.err[-3000:]
        lines = [line.removeprefix("found: ") for line in ended.out.splitlines() if line.startswith("found: ")]
        assert lines == [
            *(f"{name}: same" for name in ("pgd", "cw", "ids", "pse", "gradients")),
            "findings: 0",
            "wrong images: images must be finite and in [0, 1], got values from 0.00060138 to 1.999",
            "wrong labels: labels must be classes from 0 to 4, but example 0 has 9",
            "wrong targets: targets must differ from labels, but example 0 has both 4",
            "wrong devices: images are on 4 devices and parameters of the model on 1, not the same: put the parameters "
            "where the images are, with jaxinterp.parallel.replicate(params, mesh)",
        ]
