"""What every attack is made of: the contract, the problem, the record of successes, the result.

An attack is a frozen dataclass registered as a pytree: real hyper-parameters (eps, step size, const) are leaves, so
that a sweep over them is one compiled program; those that give shapes (steps, norm) are static. Every leaf of an
attack's state has the example as its first axis, so that states can be gathered, sharded and stored by example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.attacks.objective import PullBack
from jaxinterp.network import Model
from jaxinterp.pytree import pytree

# A hyper-parameter: one number, or one for every example. It may wait for the program as an array of numpy; inside a
# program, which is what is written and checked against the types, it is one of JAX.
Real = float | Float[Array, ""] | Float[Array, " b"]
if not TYPE_CHECKING:
    Real = Real | Float[np.ndarray, ""] | Float[np.ndarray, " b"]


@runtime_checkable
class State(Protocol):
    """What the driver needs to see of an attack's state."""

    @property
    def done(self) -> Bool[Array, " b"]:
        """Examples that no further step changes."""
        ...


@runtime_checkable
class Attack(Protocol):
    """Three pure functions and the number of steps, in the manner of optax.

    An attack with fields that hold words (a norm, a rule) lists the words of each in a class variable `choices`, and
    the numbers of a field that has bounds beside zero in `ranges`, by a name of `driver.RANGES`. One with arrays that
    belong to no example but to all, such as pictures that are tried on each, lists their fields in `shared`: they are
    neither spread over devices nor gathered with the examples. Fields with an image for every example, which text
    cannot give, are listed in `arrays`. One that can begin elsewhere than
    at the originals has a method `warm(state, initial) -> state`, which the driver calls on the state that `init`
    returns, with images in the box that differ from the originals on the support only.
    """

    name: ClassVar[str]

    @property
    def iterations(self) -> int:
        """How many calls of `step` complete the attack."""
        ...

    def init(self, model: Model, images: Any, labels: Any, targets: Any, keys: Any, support: Any = None) -> Any:
        """The state before the first step; see `jaxinterp.attacks.run` for the arguments."""
        ...

    def step(self, model: Model, state: Any) -> Any:
        """The state after one more step. Examples that are done stay as they are."""
        ...

    def result(self, state: Any) -> AttackResult:
        """The result so far."""
        ...


@runtime_checkable
class Staged(Attack, Protocol):
    """An attack whose steps come in stages, so that the driver can compile the steps of each when it is reached."""

    def stage(self, state: Any) -> Int[Array, ""]:
        """The stage that the next step of the batch is of, a number from 0."""
        ...

    def step_of(self, stage: int, model: Model, state: Any) -> Any:
        """What `step` returns where the next step is of that stage."""
        ...


@runtime_checkable
class OneGradient(Attack, Protocol):
    """An attack whose step looks at every example in one point: at the logits there, and at one gradient.

        step(model, state) = update(state, *linearised(model, points(state)))

    Such attacks one after the other can share the passes of the network, by far the largest part of their programs.
    """

    @property
    def one_gradient(self) -> bool:
        """Whether the attack is of this kind as it is set."""
        ...

    def points(self, state: Any) -> Float[Array, "b h w c"]:
        """Where the next step looks."""
        ...

    def covectors(self, state: Any, logits: Float[Array, "b k"]) -> tuple[Float[Array, "b k"], Bool[Array, " b"]]:
        """What the step pulls back from the logits at the points, and which examples need that."""
        ...

    def update(self, state: Any, logits: Float[Array, "b k"], pull_back: PullBack) -> Any:
        """What `step` returns. `pull_back` is called once, with the covectors, or not at all."""
        ...


@pytree
class AttackResult:
    """What an attack found, by example.

    Attributes:
        images: the adversarial images, or the original where the attack failed.
        success: whether the returned image is adversarial at the stated confidence.
        l0: how many components of the image changed.
        l1: sum of absolute changes, in pixel units of [0, 1].
        l2: Euclidean norm of the change.
        linf: largest absolute change.
        iterations: the iteration at which the example first succeeded; -1 if it never did.
        forward: forward passes that the example paid for.
        backward: backward passes that the example paid for.
    """

    images: Float[Array, "b h w c"]
    success: Bool[Array, " b"]
    l0: Int[Array, " b"]
    l1: Float[Array, " b"]
    l2: Float[Array, " b"]
    linf: Float[Array, " b"]
    iterations: Int[Array, " b"]
    forward: Int[Array, " b"]
    backward: Int[Array, " b"]


@pytree
class Examples:
    """The problem: images, their true classes, the targets of a targeted attack, where the images may change.

    A search begins at the images themselves, or at `initial` where it is warm-started.
    """

    images: Float[Array, "b h w c"]
    labels: Int[Array, " b"]
    targets: Int[Array, " b"] | None
    support: Bool[Array, "b h w c"] | None
    initial: Float[Array, "b h w c"] | None = None

    @property
    def start(self) -> Float[Array, "b h w c"]:
        """Where every problem of a search begins."""
        return self.images if self.initial is None else self.initial


@pytree
class Record:
    """The best adversarial image seen so far, when the first one was seen, and what the search has cost."""

    best: Float[Array, "b h w c"]
    success: Bool[Array, " b"]
    iterations: Int[Array, " b"]
    forward: Int[Array, " b"]
    backward: Int[Array, " b"]

    @classmethod
    def start(cls, images: Float[Array, "b h w c"]) -> Record:
        """No success yet; the best image is the original."""
        zeros = jnp.zeros(images.shape[0], jnp.int32)
        return cls(images, zeros.astype(bool), zeros - 1, zeros, zeros)

    def update(
        self,
        *,
        images: Float[Array, "b h w c"],
        found: Bool[Array, " b"],
        better: Bool[Array, " b"],
        iteration: Int[Array, " b"],
        forward: Bool[Array, " b"] | Int[Array, " b"],
        backward: Bool[Array, " b"] | Int[Array, " b"],
    ) -> Record:
        """The record after one evaluation.

        Args:
            images: the images that were evaluated.
            found: which of them are adversarial (and belong to examples not done).
            better: which of those replace the best so far.
            iteration: number of the evaluation, from 0.
            forward: who paid for a forward pass, or how many each paid for.
            backward: the same of backward passes.
        """
        return Record(
            best=select(better, images, self.best),
            success=self.success | found,
            iterations=jnp.where(found & (self.iterations < 0), iteration, self.iterations),
            forward=self.forward + forward.astype(jnp.int32),
            backward=self.backward + backward.astype(jnp.int32),
        )

    def result(self, original: Float[Array, "b h w c"]) -> AttackResult:
        """The result, with distances measured on the returned images."""
        delta = self.best - original
        axes = tuple(range(1, delta.ndim))
        # One sum for both is half as much to compile.
        l1, squared = jax.vmap(lambda x: jnp.sum(x, axis=axes))(jnp.stack([jnp.abs(delta), jnp.square(delta)]))
        return AttackResult(
            images=self.best,
            success=self.success,
            l0=jnp.sum(delta != 0, axis=axes, dtype=jnp.int32),
            l1=l1,
            l2=jnp.sqrt(squared),
            linf=jnp.max(jnp.abs(delta), axis=axes),
            iterations=self.iterations,
            forward=self.forward,
            backward=self.backward,
        )


def ended(state: Any) -> Any:
    """The state with every example done, in the states that it holds as well: steps leave it as it is."""

    def done(path, leaf):
        return leaf | True if isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "done" else leaf

    return jax.tree_util.tree_map_with_path(done, state)


def along(values: Array, images: Array) -> Array:
    """Values [B] or [] shaped to broadcast against images [B,...]."""
    return jnp.reshape(values, jnp.shape(values) + (1,) * (images.ndim - 1)) if jnp.ndim(values) else values


def norm(delta: Float[Array, "b ..."]) -> Float[Array, " b"]:
    """Euclidean norm of every example."""
    return jnp.sqrt(jnp.sum(jnp.square(delta), axis=tuple(range(1, delta.ndim))))


def select(condition: Bool[Array, " b"], new: Any, old: Any) -> Any:
    """The pytree `new` for examples where `condition` holds, `old` for the others."""
    return jax.tree.map(lambda a, b: b if a is b else jnp.where(along(condition, a), a, b), new, old)


def per_example(value: Any, images: Array) -> Float[Array, " b"]:
    """A hyper-parameter, one number or one an example, as float32 [B]."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), images.shape[:1])
