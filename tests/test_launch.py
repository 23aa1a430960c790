"""The options of several processes among others, and how a process agrees with itself."""

import pytest

from jaxinterp import launch, processes
from jaxinterp.launch import Options


@pytest.mark.parametrize(
    ("words", "options", "rest"),
    [
        ("attack a --cell 3", None, "attack a --cell 3"),
        ("--distributed attack a", Options(), "attack a"),
        ("attack --distributed a --process-id 1 --num_processes=2", Options(None, 2, 1), "attack a"),
        ("--distributed --coordinator-address h:1 --peer-timeout 3 b", Options("h:1", peer_timeout=3), "b"),
        ("attack --distributed -- --process-id x", Options(), "attack -- --process-id x"),
    ],
)
def test_options_are_taken_out_wherever_they_stand(words, options, rest):
    assert launch.options(words.split()) == (options, rest.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distributed --process-id", "--process-id: expected a value"),
        ("--distributed --process-id one", "--process-id: expected a whole number, got 'one'"),
        ("--distributed --peer-timeout 0", "--peer-timeout must be at least 1, got 0"),
        ("--process-id 1", "--process-id goes with --distributed"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(ValueError, match=message):
        launch.options(words.split())


def test_a_process_alone_agrees_with_itself():
    group = processes.current()
    assert (group.index, group.count, group.first) == (0, 1, True)
    assert group.share(range(3)) == [0, 1, 2]
    assert group.settle(4, lambda values: values) == [4]
    group.wait()
    group.fail(2, "nobody hears that")
    group.end()


def test_shares_are_whole_and_disjoint():
    shares = [processes.Processes(i, 3).share("abcdefgh") for i in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e", "h"], ["c", "f"]]


def test_disagreements_are_named():
    one = {"name": "process 0 on a", "config": {"cell": 14}, "versions": {"jax": "1"}}
    two = {"name": "process 1 on b", "config": {"cell": 14}, "versions": {"jax": "2"}}
    assert processes._disagreement([one, one]) == ""
    assert processes._disagreement([one, two]) == (
        'the processes were not given the same: versions.jax: "1" process 0 on a, "2" process 1 on b'
    )
