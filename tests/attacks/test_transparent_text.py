"""Text over images: masks against what they should cover, the search against what the model was shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxinterp import typesetting
from jaxinterp.attacks import ATTACKS, TransparentText, advance, finish, finished, lettering, run, start
from jaxinterp.attacks.driver import example_keys
from jaxinterp.attacks.spec import from_spec
from jaxinterp.typesetting import written

KEY = jax.random.key(5)


# Letters


def test_letters_scale_and_turn():
    level, large = typesetting.render("Hlg", 20), typesetting.render("Hlg", 40)
    assert level.dtype == np.uint8
    assert level.max() == 255
    for mask in (level, large):  # nothing but the ink
        assert all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    np.testing.assert_allclose(large.shape, 2 * np.array(level.shape), atol=3)
    np.testing.assert_allclose(large.sum(dtype=int) / level.sum(dtype=int), 4, rtol=0.1)
    np.testing.assert_array_equal(typesetting.render("Hlg", 20, 180.0), level[::-1, ::-1])
    assert typesetting.render("Hlg", 20, 90.0).shape == level.shape[::-1]
    slanted = typesetting.render("Hlg", 20, 30.0)
    np.testing.assert_allclose(slanted.sum(dtype=int), level.sum(dtype=int), rtol=0.05)
    assert slanted.shape[0] > level.shape[0]


@pytest.mark.parametrize(
    ("phrase", "size", "message"),
    [
        (" ", 9, "must have a character to draw, got ' '"),
        ("", 9, "must have a character"),
        ("a\nb", 9, "one line without control characters"),
        ("go 漢", 9, "no '漢'"),
        ("go", 0, "size must be at least 1"),
    ],
)
def test_text_that_cannot_be_drawn(phrase, size, message):
    with pytest.raises(ValueError, match=message):
        typesetting.render(phrase, size)


def test_a_text_that_does_not_fit_says_what_would():
    with pytest.raises(
        ValueError, match=r"'wide words' of size 30 takes \d+ pixels .* in 40 x 64; size (\d+) fits"
    ) as e:
        typesetting.bank(("wide words",), (30,), (0.0,), 40, 64)
    size = int(str(e.value).split("; size ")[1].split()[0])
    assert len(typesetting.bank(("wide words",), (size,), (0.0,), 40, 64)) == 1
    with pytest.raises(ValueError, match=r"at 0 degrees takes \d+ x \d+ pixels and does not fit"):
        typesetting.bank(("wide words",), (size + 1,), (0.0,), 40, 64)
    long = "no sign so long " * 300
    with pytest.raises(
        ValueError, match=r"'no sign so long .*…' does not fit in 40 x 64 .*; no size does, but 'no \w.*\w' would"
    ):
        typesetting.written(TransparentText(text=long), 40, 64)
    with pytest.raises(ValueError, match=r"of size 300 takes \d+ pixels and does not fit in 40 x 64; no size does"):
        typesetting.written(TransparentText(text=long, largest=900), 40, 64)
    with pytest.raises(ValueError, match=r"no size does, but 'w+' would"):
        typesetting.bank(("w" * 200,), (5,), (0.0,), 40, 64)


@pytest.mark.parametrize("period", [(20, 30), (9, 13)])
def test_a_text_stands_once_or_after_every_period(period):
    mask = typesetting.render("if", 9)
    tile = np.zeros((20, 30), np.uint8)
    tile[: mask.shape[0], : mask.shape[1]] = mask
    offset = (4, 5)
    expected = np.zeros((20 + 2 * period[0], 30 + 2 * period[1]))
    for row in range(offset[0], expected.shape[0], period[0]):
        for column in range(offset[1], expected.shape[1], period[1]):
            part = expected[row : row + mask.shape[0], column : column + mask.shape[1]]
            part[:] = mask[: part.shape[0], : part.shape[1]]
    if period != (20, 30):  # the grid begins before the image does
        expected = expected[period[0] :, period[1] :]
    placed = lettering.place(jnp.asarray(tile), jnp.asarray(period), jnp.asarray(offset))
    np.testing.assert_allclose(placed, expected[:20, :30] / 255, rtol=1e-6)


def test_blending_is_a_weighted_mean(rng):
    images, mask = rng.random((2, 4, 5, 3), np.float32), rng.random((2, 4, 5), np.float32)
    colour = jnp.asarray([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    alpha = np.array([0.3, 1.0])[:, None, None, None] * mask[..., None]
    blended = lettering.blend(jnp.asarray(images), jnp.asarray(mask), jnp.asarray([0.3, 7.0]), colour)
    np.testing.assert_allclose(blended, (1 - alpha) * images + alpha * np.asarray(colour)[:, None, None], atol=1e-6)
    np.testing.assert_array_equal(lettering.blend(jnp.asarray(images), jnp.asarray(mask), 0.0, colour), images)


# The search


def brightness(scale, threshold, x):
    """Class 1 where the weighted mean is above the threshold, else class 0."""
    value = jnp.mean(x * scale, axis=(1, 2, 3)) - threshold
    return 100 * jnp.stack([-value, value], axis=1)


SEEN = []
DRAW = jax.jit(TransparentText.drawn, static_argnums=3)


def recording(model, x):
    jax.debug.callback(lambda x: SEEN.append(np.array(x)), x)
    return model(x)


def shown_to(model, attack, images, labels):
    """The result, and the images [B,n,H,W,C] that the model was shown, in their order."""
    SEEN.clear()
    watched = Partial(recording, model)
    state = start(attack, watched, images, labels, key=KEY)
    while not finished(state):
        state = advance(attack, watched, state, 1)
        jax.effects_barrier()
    steps = [x.reshape(len(images), -1, *x.shape[1:]) for x in SEEN]
    return finish(attack, state), np.concatenate(steps, axis=1)


@pytest.fixture
def images(rng):
    return rng.uniform(0.2, 0.4, (4, 24, 32, 3)).astype(np.float32)


SEARCH = written(
    TransparentText(opacity=0.4, text="go|no", layout="single", colour="white", queries=99, population=8), 24, 32
)


def test_queries_are_those_of_the_search_one_by_one(images):
    weights = np.random.default_rng(1).uniform(0, 1, (24, 32, 3)).astype(np.float32)
    clean = (images * weights).mean((1, 2, 3))
    model = Partial(brightness, jnp.asarray(weights), jnp.float32(np.median(clean) + 0.0035))
    result, shown = shown_to(model, SEARCH, images, np.zeros(4, np.int32))
    np.testing.assert_array_equal(shown[:, 0], images)
    logits = np.stack([model(jnp.asarray(each[:100])) for each in shown])
    adversarial = logits.argmax(-1) == 1
    success, first = adversarial.any(1), adversarial.argmax(1)
    assert 0 < success.sum() < 4
    np.testing.assert_array_equal(result.success, success)
    np.testing.assert_array_equal(result.forward, np.where(success, first + 1, 100))
    np.testing.assert_array_equal(result.iterations, np.where(success, first, -1))
    np.testing.assert_array_equal(result.backward, 0)
    for i in range(4):
        np.testing.assert_array_equal(result.images[i], shown[i, first[i]] if success[i] else images[i])
    # As long as nothing has been learnt, every overlay is one of those drawn without feedback.
    drawn = DRAW(SEARCH, jnp.asarray(images), example_keys(KEY, jnp.asarray(images)), 7)
    np.testing.assert_allclose(shown[:, 1:8], drawn, atol=1e-6)


def test_the_search_finds_the_place_that_counts(images):
    """Only the part that is brightest under the best text counts: half of what is tried stays near it."""
    weights = np.zeros((24, 32, 3), np.float32)
    weights[14:, 20:] = 6.4
    model = Partial(brightness, jnp.asarray(weights), jnp.float32(0.9))  # out of reach: the search goes on
    result, shown = shown_to(model, SEARCH, images, np.zeros(4, np.int32))
    assert not np.asarray(result.success).any()
    gain = ((shown - images[:, None]) * weights).mean((2, 3, 4))
    random = DRAW(SEARCH, jnp.asarray(images), example_keys(KEY, jnp.asarray(images)), 99)
    chance = ((random - images[:, None]) * weights).mean((2, 3, 4))
    assert (gain[:, 50:100].mean(1) > 1.5 * chance.mean(1)).all()


def test_colours_layouts_and_opacity_mean_what_they_say(images):
    labels = np.zeros(4, np.int32)
    clean = images.mean((1, 2, 3))

    def success(threshold=0.0, **settings):
        model = Partial(brightness, jnp.ones((24, 32, 3)), jnp.float32(clean.max() + threshold))
        attack = TransparentText(**{"text": "go", "queries": 30, "opacity": 0.5, **settings})
        return run(written(attack, 24, 32), model, images, labels, key=KEY)

    assert np.asarray(success(0.005, colour="white").success).all()
    assert not np.asarray(success(0.005, colour="black").success).any()
    grid, single = (success(0.025, colour="white", largest=8, layout=layout) for layout in ("grid", "single"))
    assert np.asarray(grid.success).all()
    assert not np.asarray(single.success).any()
    values = jnp.asarray([0.0, 0.01, 0.5, 1.0])
    result = success(0.005, colour="white", opacity=values)
    assert not np.asarray(result.success)[0]
    np.testing.assert_array_equal(result.images[0], images[0])
    assert np.asarray(result.success)[2:].all()
    assert float(result.linf[1]) <= 0.01
    delta = np.asarray(success(0.005, colour="white").images) - images
    assert (delta >= 0).all()
    assert (delta <= 0.5 * (1 - images) + 1e-6).all()


def test_the_opacity_is_searched_too():
    """The faintest success of all that were shown, near the least opacity that can succeed, for all queries."""
    images, labels = np.full((4, 24, 32, 3), 0.2, np.float32), np.array([0, 0, 0, 1], np.int32)
    attack = written(
        TransparentText(
            opacity=jnp.asarray([0.9, 0.5, 0.001, 0.9]),
            faintest=0.01,
            text="go|no",
            layout="single",
            colour="white",
            queries=399,
            population=20,
        ),
        24,
        32,
    )
    model = Partial(brightness, jnp.ones((24, 32, 3)), jnp.float32(0.205))
    result, shown = shown_to(model, attack, images, labels)
    np.testing.assert_array_equal(result.success, [True, True, False, True])
    np.testing.assert_array_equal(result.forward, [400, 400, 400, 1])
    np.testing.assert_array_equal(result.images[2:], images[2:])
    assert attack.bank is not None
    coverage = np.asarray(attack.bank.tiles).mean((1, 2)).max() / 255
    least = 0.005 / (coverage * 0.8)
    for i in range(2):
        opacity = (shown[i, :400] - images[i]).max((1, 2, 3)) / 0.8
        adversarial = np.asarray(model(jnp.asarray(shown[i, :400]))).argmax(-1) == 1
        found = (np.asarray(result.images[i]) - images[i]).max() / 0.8
        assert found == pytest.approx(opacity[adversarial].min())
        assert least * 0.999 <= found <= least * 1.05
    # As long as nothing is found, it is the search for any success.
    first = int(np.asarray(result.iterations)[1])
    only = TransparentText(**{**vars(attack), "faintest": None})
    np.testing.assert_array_equal(shown_to(model, only, images, labels)[1][1, : first + 1], shown[1, : first + 1])


def test_support_and_targets(images):
    labels = np.zeros(2, np.int32)
    support = np.zeros((1, 24, 32, 1), bool)
    support[:, :, :16] = True
    model = Partial(brightness, jnp.ones((24, 32, 3)), jnp.float32(images[:2].mean((1, 2, 3)).max() + 0.004))
    attack = written(TransparentText(text="go", queries=30, opacity=0.5), 24, 32)
    result = run(attack, model, images[:2], labels, 1 - labels, key=KEY, support=support)
    assert np.asarray(result.success).all()
    delta = np.asarray(result.images) - images[:2]
    assert not delta[:, :, 16:].any()
    assert delta[:, :, :16].any(axis=(1, 2, 3)).all()


def test_ids_and_keys_decide_what_is_tried(images):
    same = jnp.asarray(np.repeat(images[:1], 4, 0))
    drawn = np.asarray(DRAW(SEARCH, same, example_keys(KEY, same, np.array([4, 4, 5, 6])), 7))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    for other in drawn[2:]:
        assert (drawn[0] != other).any(axis=(1, 2, 3)).sum() >= 5
    assert len({each.tobytes() for each in drawn[0]}) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text": "much too long a text for such a picture"},
            "does not fit in 24 x 32 pixels at a size that can be read",
        ),
        ({"text": "go|", "smallest": 4}, "text must have a character"),
        (
            {"text": "go", "largest": 60},
            r"'go' of size \d+ at .* does not fit in 24 x 32; size \d+ fits at every angle",
        ),
        ({"text": "go", "smallest": 9, "largest": 8}, "smallest must be at most the largest size 8, got 9"),
        ({"text": "go", "queries": 0}, "TransparentText.queries must be at least 1"),
        ({"text": "go", "opacity": -0.1}, "TransparentText.opacity must be finite and not negative"),
    ],
)
def test_bad_settings(images, settings, message):
    model = Partial(brightness, jnp.ones((24, 32, 3)), jnp.float32(0.5))
    with pytest.raises(ValueError, match=message):
        run(written(TransparentText(**settings), 24, 32), model, images, np.zeros(4, np.int32), key=KEY)


def test_texts_must_be_there_and_of_the_images_size(images):
    model, labels = Partial(brightness, jnp.ones((24, 32, 3)), jnp.float32(0.5)), np.zeros(4, np.int32)
    with pytest.raises(ValueError, match=r"bank must hold the texts, got none; jaxinterp\.typesetting\.written"):
        run(TransparentText(text="go"), model, images, labels, key=KEY)
    with pytest.raises(ValueError, match="bank must be for images of 24 x 32 pixels, got texts for 32 x 24"):
        run(written(TransparentText(text="go"), 32, 24), model, images, labels, key=KEY)


def test_grey_images_have_no_hues(images):
    attack = TransparentText(text="go", colour="hues")
    assert len(attack.palette(3)) == 6
    with pytest.raises(ValueError, match="'hues' needs images of 3 channels, got 1"):
        attack.palette(1)
    np.testing.assert_array_equal(TransparentText(colour="any").palette(1), [[0], [1]])


def test_a_spec_keeps_the_case_of_the_text():
    attack = from_spec("transparent-text:text=Do not Copy|OK,layout=GRID,queries=9", ATTACKS)
    assert attack == TransparentText(text="Do not Copy|OK", layout="grid", queries=9)
