"""Several processes that do one job: agreement, shares, progress, and an end for all where one of them ends.

Every process computes its share of the chunks and writes them into the results directory that all share; process 0
makes the tables. What they tell each other goes through the key-value store of JAX's coordinator, which lies in
process 0, so that nothing here waits for a device. A thread in every process shows once a second that it is alive. A
process that fails says so, one that is silent for too long counts as dead; then all others end with that message.
Alone, a process agrees with itself and waits for nobody.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxinterp import precision
from jaxinterp.runs import Run, differences, machine, versions

T = TypeVar("T")
_BEAT = 1.0  # seconds
_PREFIX = "jaxinterp"
# What the libraries that exchange data say when they cannot.
_BROKEN = re.compile(r"gloo|nccl|\b(unavailable|aborted|deadline_exceeded)\b|connection (reset|closed)", re.IGNORECASE)


class Processes:
    """The processes that work on a job, seen from one of them.

    Attributes:
        index: of this process; 0 writes the tables and speaks.
        count: how many there are.
        timeout: seconds after which a silent process counts as dead, and a file that others do not see as not shared.
    """

    def __init__(self, index: int = 0, count: int = 1, *, client: Any = None, timeout: float = 60.0, again: str = ""):
        """Joins the others.

        Args:
            index: see `Processes`, like count and timeout.
            count: 1 for a process alone.
            client: of JAX's coordinator; None for a process alone.
            timeout: in seconds.
            again: the command that continues the job.
        """
        self.index, self.count, self.timeout, self._again = index, count, timeout, again
        self._client, self._settled = client, 0
        self._stage, self._done = 0, 0.0
        self._others: dict[int, tuple[int, float]] = {}  # in which stage they are, and what they have done of it
        self._ended = threading.Event()
        self.name = f"process {index} on {socket.gethostname()}"
        if client is not None:
            self._beat(0)
            threading.Thread(target=self._watch, name="jaxinterp-processes", daemon=True).start()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes tables."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every so many of the items, beginning with this process's own."""
        return list(items[self.index :: self.count])

    def settle(self, value: Any, decide: Callable[[list[Any]], T], tick: Callable[[], object] = lambda: None) -> T:
        """What process 0 decides on the values of all, for all. Every process must call this; none goes on before all.

        Args:
            value: of this process, as JSON.
            decide: called in process 0 with all values, in order; returns what can be JSON.
            tick: called now and then while others are awaited.

        Raises:
            RuntimeError: the processes settle different things, since one of them went another way; or, where process 0
                says so itself, whatever `decide` raises. In every process: nobody waits for what will not come.
        """
        if self._client is None:
            return decide([value])
        self._settled += 1
        here = f"{_PREFIX}/settled/{self._settled}"
        what = f"{decide.__module__}.{decide.__qualname__}"
        self._client.key_value_set(f"{here}/of/{self.index}", json.dumps([what, value]))
        if self.first:
            with _patience() as pause:
                while len(found := self._client.key_value_dir_get(f"{here}/of/")) < self.count:
                    pause()
                    tick()
            told = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
            try:
                if len(settled := sorted({what for what, _ in told.values()})) > 1:
                    raise RuntimeError(f"the processes are at different places of the job: {' and '.join(settled)}")
                decision = decide([told[i][1] for i in range(self.count)])
                text = json.dumps({"decision": decision})
            except Exception as error:
                text = json.dumps({"error": f"{type(error).__name__}: {error}"})
                self._client.key_value_set(f"{here}/decision", text)
                raise
            self._client.key_value_set(f"{here}/decision", text)
            return decision
        with _patience() as pause:
            while (text := self._get(f"{here}/decision")) is None:
                pause()
        answer = json.loads(text)
        if "error" in answer:
            raise RuntimeError(f"process 0 could not decide: {answer['error']}")
        return answer["decision"]

    def wait(self, tick: Callable[[], object] = lambda: None) -> None:
        """Returns when every process has called this; calls `tick` now and then until then."""
        self.settle(None, lambda values: None, tick)

    def told(self, value: T) -> T:
        """The value that process 0 has."""
        return self.settle(value if self.first else None, lambda values: values[0])

    def begin_stage(self) -> None:
        """From here on is counted anew what is done; every process must call this."""
        self._stage, self._done = self._stage + 1, 0.0

    def report(self, done: float) -> None:
        """Adds to what this process has done."""
        self._done += done

    @property
    def done(self) -> float:
        """What all processes have done in this stage, as far as process 0 knows it."""
        return self._done + sum(done for stage, done in self._others.values() if stage == self._stage)

    def fail(self, status: int, message: str) -> None:
        """Ends this process, and all others with a message; does not return unless the process is alone."""
        if self._client is None:
            return
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_PREFIX}/failed/{self.index}", f"{self.name}: {message}")
        self._leave(status)

    def yield_to_cause(self, error: BaseException) -> None:
        """Returns, unless devices of several processes could not exchange something: another process has ended then.

        The watch finds out which and why, and ends this process while it waits here.
        """
        if self._client is not None and _BROKEN.search(str(error)):
            time.sleep(self.timeout + 5 * _BEAT)

    def break_off(self, error: BaseException) -> None:
        """Ends this process and all others after an error that was not expected, or an exit; returns where alone."""
        if self._client is None:
            return
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
            self.fail(code, f"exit status {code}")
        self.yield_to_cause(error)
        traceback.print_exception(error)
        self.fail(1, f"{type(error).__name__}: {error}")

    def end(self) -> None:
        """Waits for all and stops watching; the job is done."""
        self.wait()
        self._ended.set()

    def _get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _beat(self, number: int) -> None:
        self._client.key_value_set(
            f"{_PREFIX}/alive/{self.index}", f"{number} {self._stage} {self._done} {self.name}", allow_overwrite=True
        )

    def _watch(self) -> None:
        number, last = 0, time.monotonic()
        heard = {i: ("", last, f"process {i}") for i in range(self.count)}
        while not self._ended.wait(_BEAT):
            number += 1
            try:
                self._beat(number)
                failed = [text for _, text in self._client.key_value_dir_get(f"{_PREFIX}/failed/")]
                alive = self._client.key_value_dir_get(f"{_PREFIX}/alive/") if self.first else []
            except Exception:  # the coordinator is gone, and JAX ends this process
                continue
            now = time.monotonic()
            if now - last > self.timeout / 2:  # this process has stood still, perhaps with the others
                heard = {i: (beat, now, name) for i, (beat, _, name) in heard.items()}
            last = now
            for key, text in alive:
                i, (beat, stage, done, name) = int(key.rpartition("/")[2]), text.split(" ", 3)
                if beat != heard[i][0]:
                    heard[i] = beat, now, name
                if i:
                    self._others[i] = int(stage), float(done)
            silent = [name for _, when, name in heard.values() if self.first and now - when > self.timeout]
            if silent and not failed:
                failed = [f"{name} has been silent for {self.timeout:.0f} s and counts as dead" for name in silent]
                with contextlib.suppress(Exception):
                    self._client.key_value_set(f"{_PREFIX}/failed/silent", "; ".join(failed))
            if failed and not self._ended.is_set():
                say_error(f"ended with the others: {failed[0]}; {CONTINUES}\n  {self._again}")
                self._leave(2)

    def _leave(self, status: int) -> None:
        """Ends the process at once: an ordinary end would wait for those that are gone."""
        self._ended.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_PREFIX}/left/{self.index}", "")
            deadline = time.monotonic() + 5 * _BEAT
            # The coordinator goes last: the others could not read why.
            while self.first and time.monotonic() < deadline:
                if len(self._client.key_value_dir_get(f"{_PREFIX}/left/")) >= self.count:
                    time.sleep(0.2)
                    break
                time.sleep(0.05)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


CONTINUES = "what was finished is kept; the same command on every host, on as many as you like, continues from there:"


def say_error(message: str) -> None:
    """A line on the standard error."""
    print(f"\njaxinterp: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _patience() -> Iterator[Callable[[], None]]:
    """Pauses that grow from a hundredth of a second to half a second."""
    length = 0.01

    def pause() -> None:
        nonlocal length
        time.sleep(length)
        length = min(0.5, 1.5 * length)

    yield pause


_current = Processes()


def current() -> Processes:
    """The processes that this one works with: itself alone, unless `join` was called."""
    return _current


def join(*, timeout: float, again: str) -> Processes:
    """Joins the other processes of JAX, which has been started (`jaxinterp.parallel.initialize`).

    Only process 0 speaks from here on: what others print is dropped, their progress bars are not shown.

    Args:
        timeout: see `Processes`.
        again: the command that continues the job.
    """
    global _current
    from jax._src import distributed  # its key-value store has no public name
    from tqdm import tqdm

    state = distributed.global_state
    _current = Processes(state.process_id, state.num_processes, client=state.client, timeout=timeout, again=again)
    if not _current.first:
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]  # bars of any caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    return _current


def open_run(directory: str | os.PathLike, config: Mapping[str, Any]) -> Run:
    """The results directory of all processes, with a record of the machine.

    Args:
        directory: as `Run` takes it, like config.
        config: must be that of all processes. The precision of matrix products joins it.

    Raises:
        ValueError: as `Run`; configs or versions differ between processes; they do not share the directory.
        OSError: it cannot be written.
    """
    group = current()
    config = {**config, "matmul_precision": precision.current()}
    problem = group.settle(
        {
            "name": group.name,
            "options": {"--num-processes": group.count},
            "config": json.loads(json.dumps(config)),
            "versions": versions(),
        },
        _disagreement,
    )
    if problem:
        raise ValueError(problem)
    run = Run(directory, config) if group.first else None
    _check_shared(group, Path(directory))
    run = run or Run(directory, config)
    if group.first:
        run.remove_left_over()
        run.write_json("machine.json", machine())
    return run


def read_part(run: Run, name: str, *, without: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of a chunk that one of the processes has written, as `Run.read_part`.

    File systems of networks may show a file late to a host that has looked for it before; that is waited for.

    Raises:
        OSError: the chunk is missing or damaged.
    """
    group = current()
    deadline = time.monotonic() + (group.timeout if group.count > 1 else 0)
    with _patience() as pause:
        while (arrays := run.read_part(name, without=without)) is None:
            if time.monotonic() >= deadline:
                raise OSError(f"{name} in {run.directory} is missing or damaged; the same command makes it again")
            pause()
    return arrays


def _disagreement(values: list[Any]) -> str:
    """How the other processes differ from process 0, in words; empty where they do not."""
    if not all(isinstance(value, dict) and "config" in value for value in values):
        return "the processes were not given the same command"
    first = values[0]
    for other in values[1:]:
        for what in ("options", "config", "versions"):
            differing = differences(first[what], other[what], what, there=first["name"], asked=other["name"])
            if differing:
                return "the processes were not given the same: " + "; ".join(differing)
    return ""


def _check_shared(group: Processes, directory: Path) -> None:
    """Raises ValueError, in every process, where one of them does not see a file that process 0 has written."""
    if group.count == 1:
        return
    token = group.told(f".shared-{secrets.token_hex(8)}")
    if group.first:
        (directory / token).write_text("")
    group.wait()
    deadline = time.monotonic() + group.timeout
    with _patience() as pause:
        while not (seen := (directory / token).exists()) and time.monotonic() < deadline:
            pause()
    blind = group.settle("" if seen else group.name, lambda values: [name for name in values if name])
    if group.first:
        (directory / token).unlink(missing_ok=True)
    if blind:
        raise ValueError(
            f"{directory} is not the same directory for all: {', '.join(blind)} does not see what process 0 writes "
            "there; choose one on a file system that all hosts share"
        )
