"""Attacks that go on where they were stopped: their state is stored in the results directory now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxinterp import attacks
from jaxinterp.attacks.attack import Attack, AttackResult, ended
from jaxinterp.network import Model
from jaxinterp.runs import Run

_PIECE = 3.0  # seconds that a piece of an attack should take,
_STORED = 30.0  # and after which the state is stored; the result does not depend on either


def run_to_end(
    attack: Attack,
    model: Model,
    images: Any,
    labels: Any,
    targets: Any,
    *,
    key: jax.Array,
    run: Run,
    part: str,
    progress: Callable[[float], None] = lambda done: None,
    store_every: float = _STORED,
) -> AttackResult:
    """Runs an attack to its end, from the state stored under `part` if there is one.

    The result is that of `attacks.run`, to the last bit, however often it was stopped, and on whatever devices it goes
    on: these may have other numbers of examples behind the first, which fill them up and mean nothing. The stored
    state stays until `run.remove_state(part)` or, harmlessly, for ever: a finished part is never attacked again.

    Args:
        attack: the attack.
        model: images -> logits.
        images: as in `attacks.run`, like labels, targets and key.
        labels: true classes.
        targets: classes to attack towards, or None.
        key: a random key.
        run: the results directory.
        part: name of the state in it.
        progress: called with the fraction of steps taken, which may jump to the end.
        store_every: seconds after which the state is stored.

    Raises:
        ValueError, TypeError: as `attacks.run`.
        OSError: the state cannot be stored.
    """
    first = attacks.start(attack, model, images, labels, targets, key=key)
    filled = {"steps": np.zeros((), np.int64), "state": ended(first)}  # nobody waits for an example that fills up
    stored = run.read_state(part, filled, padded=True)
    steps, state = (0, first) if stored is None else (int(stored["steps"]), stored["state"])
    piece, written = 1, time.monotonic()
    while steps < attack.iterations and not attacks.finished(state):
        progress(steps / attack.iterations)
        began = time.monotonic()
        state = jax.block_until_ready(attacks.advance(attack, model, state, piece))
        steps += piece
        now = time.monotonic()
        # The first pieces include compilation, so the length grows step by step.
        piece = min(2 * piece, max(1, round(piece * _PIECE / max(now - began, 1e-3))))
        if now - written >= store_every:
            run.write_state(part, {"steps": np.asarray(steps, np.int64), "state": state})
            written = now
    progress(1.0)
    return attacks.finish(attack, state)
