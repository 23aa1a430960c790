"""`--distributed`: one of several processes, started, watched and ended with a message whatever befalls it.

The command runs in a child of the process that the user starts. JAX ends a process whose coordinator has died with an
abort, and a system that is out of memory kills it; the parent then says so, and how to go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO, Any

from jaxinterp.processes import CONTINUES, say_error

_WORKER = "_JAXINTERP_WORKER"
HELP = """With --distributed, before or after COMMAND, one of several processes, on one host or on many, which share \
the work and one results directory; the same command is started for each. Options: --coordinator-address HOST:PORT (of \
process 0), --num-processes N, --process-id I; what is not given is taken from Slurm, Open MPI, Kubernetes or a TPU's \
metadata. --start-timeout 300: seconds in which all must have come; --peer-timeout 60: seconds after which a silent \
one counts as dead and the others end. See docs/pods.md."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How this process finds the others; None where JAX looks into the environment."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    peer_timeout: int = 60


def options(words: Sequence[str]) -> tuple[Options | None, list[str]]:
    """Takes the options of `--distributed` out of a command line; None where there are none.

    Raises:
        ValueError: an option without its value, or with one that is no whole number.
    """
    kinds = {field.name: str if field.name == "coordinator_address" else int for field in dataclasses.fields(Options)}
    given: dict[str, Any] = {}
    rest, distributed, left = [], False, list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if word == "--":
            return (Options(**given) if distributed else None), [*rest, word, *left]
        if word == "--distributed":
            distributed = True
        elif key in kinds:
            if not equals and not left:
                raise ValueError(f"{name}: expected a value")
            value = value if equals else left.pop(0)
            try:
                given[key] = kinds[key](value)
            except ValueError:
                raise ValueError(f"{name}: expected a whole number, got {value!r}") from None
            if key.endswith("timeout") and given[key] < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        else:
            rest.append(word)
    if given and not distributed:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} goes with --distributed")
    return (Options(**given) if distributed else None), rest


def is_worker() -> bool:
    """Whether this process is the child in which the command runs."""
    return _WORKER in os.environ


def supervise(command: Sequence[str]) -> int:
    """Runs the command in a child; returns its exit status, 2 where it was aborted or killed.

    Args:
        command: the program and its arguments.
    """
    with tempfile.TemporaryFile() as log:
        read, write = os.pipe()  # closes when this process ends, however it does
        speaking = os.dup(2)
        child = subprocess.Popen(
            command,
            env={**os.environ, _WORKER: f"{read} {speaking}"},
            stderr=log,
            pass_fds=(read, speaking),
            process_group=0,
        )
        os.close(read)
        os.close(speaking)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: child.send_signal(number))
        status = child.wait()
        os.close(write)
        if status < 0:
            say_error(f"{_last_words(status, log)}; {CONTINUES}\n  {restart(command)}")
            return 2
        if status not in (0, 2, 130):
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
        return status


def restart(command: Sequence[str]) -> str:
    """The command as it is typed."""
    return shlex.join(command)


def work(given: Options, command: Sequence[str]) -> None:
    """Starts JAX in the child and joins the others. Errors are those of `jaxinterp.parallel.initialize`."""
    read, speaking = map(int, os.environ[_WORKER].split())
    # What the runtime's libraries print goes to the log that the parent looks into, not between our lines.
    sys.stderr = os.fdopen(speaking, "w", buffering=1, errors="backslashreplace")
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, errors="backslashreplace")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(read,), daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)

    from jaxinterp import parallel, processes

    parallel.initialize(
        given.coordinator_address,
        given.num_processes,
        given.process_id,
        start_timeout=given.start_timeout,
        heartbeat_timeout=2 * given.peer_timeout + 10,  # a death is noticed, and said, here before JAX aborts
    )
    processes.join(timeout=given.peer_timeout, again=restart(command))


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end_with_parent(read: int) -> None:
    with contextlib.suppress(OSError):
        os.read(read, 1)
    os._exit(1)


def _last_words(status: int, log: IO[bytes]) -> str:
    """Why the child ended: what JAX's runtime said last, or the signal."""
    log.seek(0)
    text = log.read().decode(errors="replace")
    name = signal.Signals(-status).name
    if status == -signal.SIGKILL:
        return "this process was killed (SIGKILL), by a person or for want of memory"
    if status == -signal.SIGABRT and "coordination" in text:
        if "RegisterTask" in text or "Connect()" in text:
            return "the processes did not come together within the time limit: are all of them running?"
        return "another process, most likely number 0, which coordinates, has died or cannot be reached any more"
    found = re.findall(r"^F.*?\] (.*)$", text, re.MULTILINE)
    return f"this process was ended by {name}: {(found or [text.strip()])[-1][-400:]}"
