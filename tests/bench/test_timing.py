"""Times: in turn and waited for, medians of ratios, and compilations that are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.bench import timing


def test_every_function_is_first_in_its_turn():
    order = []
    times = timing.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_results_are_waited_for():
    waited = []

    class Late:
        def block_until_ready(self):
            waited.append(True)
            return self

    timing.interleaved({"late": Late}, 3)
    assert len(waited) == 3


def test_short_functions_are_repeated_and_their_mean_is_taken(monkeypatch):
    clock = iter(np.cumsum([0.0, 2.0, 3.0, 1.0, 0.0, 10.0]).tolist())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    calls = []
    functions = {"short": lambda: calls.append("s"), "long": lambda: calls.append("l")}
    # 2 + 3 + 1 seconds in three runs; 10 seconds in one.
    assert timing.interleaved(functions, 1, least=6.0) == {"short": [2.0], "long": [10.0]}
    assert "".join(calls) == "sssl"


def test_medians_and_ratios():
    assert timing.middle([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert timing.middle([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert timing.shown([0.001, 0.002, 0.003], 1e3) == "2.0 (1.5 to 2.5)"
    assert timing.verdict(1.5, 2) == "target <= 2: met"
    assert timing.verdict(2.5, 2) == "target <= 2: NOT met"


def test_compilations_are_counted_once_and_apart():
    @jax.jit
    def fresh(x):
        return jnp.cos(x) * 3.25 + 1

    x = jnp.ones(7)
    with timing.watching_compiler() as first:
        fresh(x)
    with timing.watching_compiler() as second:
        fresh(x)
    assert (first.programs, second.programs) == (1, 0)
    assert first.seconds > 0
    assert second.seconds == 0
    assert first.compiled == first.programs - first.cached
    fresh(jnp.ones(8))  # the listeners are gone
    assert second.programs == 0


def test_warming_runs_once():
    calls = []
    found = timing.warmed({"a": lambda: calls.append(0), "b": lambda: jax.jit(lambda x: x - 0.125)(np.float32(1))})
    assert calls == [0]
    assert found["a"].programs == 0
    assert found["b"].programs == 1


def test_a_failing_function_leaves_no_listener():
    with pytest.raises(ZeroDivisionError), timing.watching_compiler() as seen:
        raise ZeroDivisionError
    jax.jit(lambda x: x * 0.75)(np.float32(1))
    assert seen.programs == 0
