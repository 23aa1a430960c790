"""The options of several processes among others, and how a process agrees with itself."""

import itertools
import threading
from typing import Any

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
    one = {"name": "process 0 on a", "options": {}, "config": {"cell": 14}, "versions": {"jax": "1"}}
    two = {"name": "process 1 on b", "options": {}, "config": {"cell": 14}, "versions": {"jax": "2"}}
    assert (
        processes._disagreement([one, "a value of another command"]) == "the processes were not given the same command"
    )
    assert processes._disagreement([one, one]) == ""
    assert processes._disagreement([one, two]) == (
        'the processes were not given the same: versions.jax: "1" process 0 on a, "2" process 1 on b'
    )


class Store:
    """The key-value store of JAX's coordinator, in memory."""

    def __init__(self):
        self.kept: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_try_get(self, key):
        if key not in self.kept:
            raise RuntimeError("NOT_FOUND")
        return self.kept[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.kept.items()) if key.startswith(prefix)]


def together(*jobs):
    """What jobs return or raise, each in a thread with processes of its own that share a store."""
    store, found = Store(), list[Any](jobs)
    groups = [processes.Processes(i, len(jobs), client=store) for i in range(len(jobs))]

    def run(i):
        try:
            found[i] = jobs[i](groups[i])
        except Exception as error:
            found[i] = f"{type(error).__name__}: {error}"

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    for group in groups:
        group._ended.set()
    return found


def test_what_is_settled_is_the_same_for_all():
    assert together(*[lambda group: group.settle([group.index], sum_of)] * 3) == [[0, 1, 2]] * 3


def sum_of(lists):
    return list(itertools.chain(*lists))


def test_nobody_waits_for_what_will_not_come():
    """Process 1 has left a stage early and is at the next one; or process 0 cannot decide."""
    first, second = together(lambda group: group.settle(1, sum_of), lambda group: group.wait())
    assert "RuntimeError: the processes are at different places of the job: " in first
    assert "test_launch" in first
    assert "Processes.wait" in first
    assert second.startswith("RuntimeError: process 0 could not decide: RuntimeError: the processes are at different")
    first, second = together(*[lambda group: group.settle(1, sum_of)] * 2)
    assert first.startswith("TypeError: ")
    assert second.startswith("RuntimeError: process 0 could not decide: TypeError: ")
