"""StrAttack, the structured attack (Xu et al. 2019, arXiv 1808.01664), every example on its own.

    min c f(x0 + d) + gamma ||d||_2^2 + tau sum_i ||d_Gi||_2   in the box, with ||d||_inf <= eps

where f is the hinge of Carlini and Wagner and the groups G_i are squares of pixels with all their channels. ADMM gives
each term its own copy of the perturbation z: d for the L2 norm, w for the box, y for the groups (equations 7 to 15):

    d = rho / (rho + 2 gamma) (z - u)
    w = clip(z - s, max(-x0, -eps), min(1 - x0, eps))
    y_Gi = max(1 - tau / (rho ||b_Gi||), 0) b_Gi                          b = z - v
    z <- (eta_k z + rho ((d + u) + (w + s) + (y + v)) - c grad f(x0 + z)) / (eta_k + 3 rho)
    u <- u + d - z,   s <- s + w - z,   v <- v + y - z                    eta_k = alpha sqrt(k + 1)

Groups that overlap are divided into grids of groups that do not, and every grid has its own copy y and dual v; the mean
of the copies is tested. Last, the components that the best sparse perturbation uses are refitted without the group
term, which lowers its L2 norm.

The authors' program differs from these equations in two ways, which are not repeated here: its z-step counts the copy d
twice, and it multiplies the gradient of every example by the sum of the batch's constants. It also makes 1,000
iterations more in every search step than in the one before, and takes a success that does not improve on the best one
for a failure; here all search steps are alike and the search is that of Carlini and Wagner.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxinterp.attacks import objective
from jaxinterp.attacks.attack import AttackResult, Examples, Real, Record, along, norm, per_example, select
from jaxinterp.attacks.constraint import Norm
from jaxinterp.attacks.search import Bracket, Progress, judge_if_warm, restart
from jaxinterp.canonical import canonical
from jaxinterp.pytree import pytree, static

_GROWTH = 5.0  # of the constant, before any success; and its first value in the refit, relative to that of the search
_REFIT_GAMMA = 1 / 100  # gamma of the refit, relative to that of the search
_DROPPED = 3  # percent of the components used, the smallest ones, that the refit gives up
_TINY = 1e-30


@pytree
class Admm:
    """The perturbation z of every example, and the duals of its copies; v has one for each of n grids of groups."""

    z: Float[Array, "b h w c"]
    u: Float[Array, "b h w c"]
    s: Float[Array, "b h w c"]
    v: Float[Array, "b n h w c"]


@pytree
class StrAttackState:
    """Every example's variables, bracket of the constant, place in the search, and support of the refit."""

    examples: Examples
    record: Record
    best_l2: Float[Array, " b"]
    admm: Admm
    kept: Bool[Array, "b h w c"]  # the components that the refit may change
    bracket: Bracket
    progress: Progress
    settings: StrAttack  # of every example
    done: Bool[Array, " b"]


@pytree
class StrAttack:
    """A perturbation of few groups of pixels and small L2 norm that succeeds at confidence kappa.

    Of the successes, the one with the smallest L2 norm is returned. Defaults are the values of the authors' program.

    Attributes:
        eps: largest change of a pixel, in units of [0, 1].
        tau: weight of the groups' norms.
        gamma: weight of the squared L2 norm.
        rho: penalty on the difference of z and its copies; positive.
        alpha: proximity of successive z; the larger, the shorter the steps.
        initial_const: c of the first search step; times 5 until a success, then bisected.
        kappa: confidence, the margin of logits that counts as success.
        group: side of a group in pixels; None means 13 for images larger than 32 pixels, else 2. Groups at the border
            of the image may be smaller.
        stride: distance of neighbouring groups, at most `group`; None means `group`, so that they do not overlap.
        search_steps: number of constants that are tried.
        steps: iterations for every constant.
        refit: whether examples that succeeded are refitted.
        refit_search_steps: number of constants that the refit tries.
        refit_steps: iterations for every constant of the refit.
    """

    name: ClassVar[str] = "strattack"
    norm: ClassVar[Norm] = "linf"
    ranges: ClassVar[dict[str, str]] = {"rho": "positive"}

    eps: Real = 0.5
    tau: Real = 3.0
    gamma: Real = 2.0
    rho: Real = 15.0
    alpha: Real = 5.0
    initial_const: Real = 1.0
    kappa: Real = 0.0
    group: int | None = static(default=None)
    stride: int | None = static(default=None)
    search_steps: int = static(default=8)
    steps: int = static(default=1000)
    refit: bool = static(default=True)
    refit_search_steps: int = static(default=8)
    refit_steps: int = static(default=400)

    @property
    def iterations(self) -> int:
        """At most this many; examples without success are done before the refit."""
        return self.search_steps * self.steps + self.refit * self.refit_search_steps * self.refit_steps

    @canonical
    def init(self, model, images, labels, targets, keys, support=None) -> StrAttackState:
        """Starts at the original; an image that is adversarial already is done after the first step.

        Raises:
            ValueError: the stride is larger than the group, so that some pixels would be in none.
        """
        examples = Examples(images, labels, targets, support)
        settings = jax.tree.map(lambda leaf: per_example(leaf, images), self)
        return StrAttackState(
            examples=examples,
            record=Record.start(images),
            best_l2=per_example(jnp.inf, images),
            admm=_zero(images, self._grids(images)),
            kept=jnp.ones_like(images, bool) if support is None else support,
            bracket=Bracket.start(settings.initial_const, images),
            progress=Progress.start(images),
            settings=settings,
            done=jnp.zeros(images.shape[0], bool),
        )

    def _grids(self, images: Float[Array, "b h w c"]) -> Grids:
        group = self.group or (13 if max(images.shape[1:3]) > 32 else 2)
        return Grids(group, self.stride or group)

    @canonical
    def warm(self, state: StrAttackState, initial) -> StrAttackState:
        """Begins every problem of the search at `initial`, the refit at the best success as ever."""
        examples = dataclasses.replace(state.examples, initial=initial)
        admm = dataclasses.replace(state.admm, z=initial - examples.images)
        return dataclasses.replace(state, examples=examples, admm=admm)

    @canonical
    def step(self, model, state: StrAttackState) -> StrAttackState:
        """One iteration of ADMM for every example, in its own search step or refit."""
        state = judge_if_warm(model, state, per_example(state.settings.kappa, state.examples.images))
        examples, active, original = state.examples, ~state.done, state.examples.images
        settings, admm, grids = state.settings, state.admm, self._grids(original)
        refitting = state.progress.problem >= self.search_steps
        rho, alpha = per_example(settings.rho, original), per_example(settings.alpha, original)
        low, high = bounds(original, per_example(settings.eps, original), state.kept)

        # The search looks for the gradient at z and tests the sparse copy y, in two passes; the refit tests the copy d
        # and takes the gradient there, in one.
        gamma = settings.gamma * jnp.where(refitting, _REFIT_GAMMA, 1.0)
        d = shrink(admm.z - admm.u, gamma, rho)
        w = jnp.clip(admm.z - admm.s, low, high)
        y = shrink_groups(admm.z[:, None] - admm.v, settings.tau / rho, grids)
        # Without the group term d can take the box too, as both are separable, and is the only copy.
        d = jnp.where(along(refitting, d), jnp.clip(d, low, high), d)
        tested = _add(original, select(refitting, d, jnp.clip(grids.mean(y), low, high)))

        def hinge(logits):
            f = objective.margin(logits, examples.labels, examples.targets)
            return state.bracket.const * jnp.maximum(f + settings.kappa, 0)

        point = select(refitting, tested, original + admm.z)
        logits, _, gradient = objective.value_and_gradient(model, point, hinge)
        gradient = jnp.where(state.kept, gradient, 0)
        searching = active & ~refitting
        logits = select(refitting, logits, lax.cond(jnp.any(searching), model, lambda _: logits, tested))

        success = active & objective.succeeded(logits, examples.labels, examples.targets, settings.kappa)
        l2 = norm(tested - original)
        better = success & (l2 < state.best_l2)
        record = state.record.update(
            images=tested,
            found=success,
            better=better,
            iteration=state.progress.count,
            forward=active.astype(jnp.int32) + searching,
            backward=active,
        )
        progress, ended = state.progress.advance(
            success, l2, steps=jnp.where(refitting, self.refit_steps, self.steps), abort_early=False
        )
        moved = dataclasses.replace(
            state,
            record=record,
            best_l2=jnp.where(better, l2, state.best_l2),
            admm=select(
                refitting,
                # alpha in place of eta_k, as in the authors' program, which divides by alpha + 2 rho.
                _refit(admm, d, gradient, alpha, rho),
                consensus(admm, d, w, y, gradient, alpha * jnp.sqrt(state.progress.iteration + 1.0), rho, grids),
            ),
            progress=progress,
            done=state.done | (success & (l2 == 0)),  # nothing is nearer
        )
        return self._next_problem(select(active, moved, state), active & ended)

    def _next_problem(self, state: StrAttackState, ended: Bool[Array, " b"]) -> StrAttackState:
        """Where a problem has ended: the next constant; from the start, or in the refit from the best so far."""
        original, problem = state.examples.images, state.progress.problem + 1
        begins, refitting = problem == self.search_steps, problem >= self.search_steps
        # Without a success there is nothing to refit.
        more = self.search_steps + (self.refit_search_steps if self.refit else 0)
        done = ended & ((problem >= more) | (begins & ~state.record.success))

        def fresh():
            best = state.record.best - original
            kept = select(begins, state.kept & largest(best, _DROPPED), state.kept)
            admm = _zero(original, self._grids(original))
            z = jnp.where(along(refitting, best), jnp.where(kept, best, 0), state.examples.start - original)
            return dataclasses.replace(admm, z=z), kept

        admm, kept = restart(ended, fresh, (state.admm, state.kept))
        bracket = select(
            begins,
            Bracket.start(_GROWTH * state.settings.initial_const, original),
            state.bracket.narrow(state.progress.found, growth=_GROWTH),
        )
        return dataclasses.replace(
            state,
            admm=admm,
            kept=kept,
            bracket=select(ended, bracket, state.bracket),
            progress=select(ended, state.progress.next_problem(), state.progress),
            done=state.done | done,
        )

    @canonical
    def result(self, state: StrAttackState) -> AttackResult:
        """The success with the smallest L2 norm."""
        return state.record.result(state.examples.images)


# The groups


@dataclasses.dataclass(frozen=True)
class Grids:
    """Square groups at every multiple of `stride`, as grids of groups that do not overlap.

    Attributes:
        group: side of a group.
        stride: distance of neighbouring groups.
    """

    group: int
    stride: int

    def __post_init__(self):
        if self.stride > self.group:
            raise ValueError(
                f"StrAttack.stride must be at most the side of a group, {self.group}, got {self.stride}: "
                "pixels between the groups would be in none"
            )

    @property
    def period(self) -> int:
        """Distance of neighbouring groups of one grid."""
        return math.ceil(self.group / self.stride) * self.stride

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """Row and column of a group of every grid."""
        starts = range(0, self.period, self.stride)
        return [(row, column) for row in starts for column in starts]

    def covered(self, height: int, width: int) -> np.ndarray:
        """Which pixels [n,h,w,1] are in a group of each grid; every pixel is in one of some grid."""
        return np.stack(
            [
                ((np.arange(height) - row) % self.period < self.group)[:, None, None]
                & ((np.arange(width) - column) % self.period < self.group)[:, None]
                for row, column in self.offsets
            ]
        )

    def number(self, height: int, width: int) -> float | np.ndarray:
        """In how many groups every pixel is: one number where it is the same for all, or [h,w,1]."""
        found = self.covered(height, width).sum(0).astype(np.float32)
        return float(found.flat[0]) if (found == found.flat[0]).all() else found

    def total(self, copies: Float[Array, "b n h w c"]) -> Float[Array, "b h w c"]:
        """The sum of the copies of every pixel."""
        return jnp.sum(_only(self.covered(*copies.shape[2:4]), copies), axis=1)

    def mean(self, copies: Float[Array, "b n h w c"]) -> Float[Array, "b h w c"]:
        """The mean of the copies of every pixel: zero where all of them are."""
        return self.total(copies) * np.float32(1 / self.number(*copies.shape[2:4]))


def _only(inside: np.ndarray, x: Array) -> Array:
    """What is inside, else zero. A mask that keeps everything is left out: programs for several devices would not."""
    return x if inside.all() else jnp.where(inside, x, 0)


def shrink_groups(
    copies: Float[Array, "b n h w c"], threshold: Float[Array, " b"], grids: Grids
) -> Float[Array, "b n h w c"]:
    """Block soft threshold: every group shrinks in norm by `threshold`, or to zero. Zero outside groups."""
    period, (height, width) = grids.period, copies.shape[2:4]
    inside = np.arange(period) < grids.group
    inside = inside[:, None, None, None] & inside[:, None]

    def shrink_grid(b, offset):
        pads = [
            ((-start) % period, (start - side) % period) for start, side in zip(offset, (height, width), strict=True)
        ]
        padded = jnp.pad(b, ((0, 0), *pads, (0, 0)))
        tiles = padded.reshape(b.shape[0], padded.shape[1] // period, period, padded.shape[2] // period, period, -1)
        size = jnp.sqrt(jnp.sum(_only(inside, jnp.square(tiles)), axis=(2, 4, 5), keepdims=True))
        factor = jnp.maximum(1 - along(threshold, tiles) / jnp.maximum(size, _TINY), 0)
        shrunk = _only(inside, factor * tiles).reshape(padded.shape)
        return lax.slice(
            shrunk, (0, pads[0][0], pads[1][0], 0), (b.shape[0], pads[0][0] + height, pads[1][0] + width, b.shape[3])
        )

    return jnp.stack([shrink_grid(copies[:, i], offset) for i, offset in enumerate(grids.offsets)], axis=1)


# The other steps of ADMM


def shrink(x: Float[Array, "b h w c"], gamma: Float[Array, " b"], rho: Float[Array, " b"]) -> Float[Array, "b h w c"]:
    """argmin_d gamma ||d||^2 + rho / 2 ||d - x||^2."""
    return along(rho / (rho + 2 * gamma), x) * x


def bounds(
    original: Float[Array, "b h w c"], eps: Float[Array, " b"], kept: Bool[Array, "b h w c"]
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """The smallest and the largest perturbation in the box and within eps, both zero off the support."""
    radius = along(eps, original)
    low, high = jnp.maximum(-original, -radius), jnp.minimum(1 - original, radius)
    return jnp.where(kept, low, 0), jnp.where(kept, high, 0)


def consensus(
    admm: Admm,
    d: Float[Array, "b h w c"],
    w: Float[Array, "b h w c"],
    y: Float[Array, "b n h w c"],
    gradient: Float[Array, "b h w c"],
    eta: Float[Array, " b"],
    rho: Float[Array, " b"],
    grids: Grids,
) -> Admm:
    """The new z, for which c f is taken as linear and z tied to the last one by eta / 2 ||z - z_k||^2, then the duals.

    Args:
        admm: z and the duals before.
        d: the copy for the L2 norm.
        w: the copy for the box.
        y: the copies for the groups.
        gradient: of c f at the last z.
        eta: proximity to the last z.
        rho: penalty on the difference of z and its copies.
        grids: the groups.
    """
    eta, rho = along(eta, d), along(rho, d)
    copies = (d + admm.u) + (w + admm.s) + grids.total(y + admm.v)
    z = (eta * admm.z + rho * copies - gradient) / (eta + (2 + grids.number(*d.shape[1:3])) * rho)
    v = _only(grids.covered(*d.shape[1:3]), admm.v + y - z[:, None])
    return Admm(z=z, u=admm.u + d - z, s=admm.s + w - z, v=v)


def _refit(admm, d, gradient, eta, rho):
    """The same with the one copy d."""
    eta, rho = along(eta, d), along(rho, d)
    z = (eta * admm.z + rho * (d + admm.u) - gradient) / (eta + rho)
    return dataclasses.replace(admm, z=z, u=admm.u + d - z)


def largest(delta: Float[Array, "b h w c"], percent: int) -> Bool[Array, "b h w c"]:
    """Components whose size exceeds that percentile of the sizes of the example's components that are not zero."""
    sizes = jnp.sort(jnp.abs(delta).reshape(delta.shape[0], -1), axis=1)
    used = jnp.sum(sizes > 0, axis=1, dtype=jnp.int32)
    # The percentile lies at this rank or between it and the next one, so the same components exceed it.
    rank = sizes.shape[1] - used + percent * jnp.maximum(used - 1, 0) // 100
    limit = jnp.take_along_axis(sizes, jnp.minimum(rank, sizes.shape[1] - 1)[:, None], axis=1)[:, 0]
    return jnp.abs(delta) > along(limit, delta)


def _zero(images, grids):
    zero = jnp.zeros_like(images)
    return Admm(zero, zero, zero, jnp.zeros((images.shape[0], len(grids.offsets), *images.shape[1:]), images.dtype))


def _add(original, delta):
    return jnp.where(delta == 0, original, jnp.clip(original + delta, 0.0, 1.0))
