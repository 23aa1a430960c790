"""The set of real and generated squares: recipes against closed forms, and nothing of a picture on both sides."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxinterp import data
from jaxinterp.training import generated

RNG = np.random.default_rng(0)
SQUARE = RNG.integers(0, 256, (32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in "abcd":
        Image.fromarray(RNG.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "set"
    return out, generated.make(out, pictures=pictures, crops=4, held_out_crops=3, epochs=1)


def test_pictures_are_divided_by_their_names_alone():
    names = [f"{i}.png" for i in range(30)]
    train, test = generated.divided(names)
    assert len(test) == 10
    assert set(train) | set(test) == set(names)
    assert not set(train) & set(test)
    assert generated.divided(names[::-1]) == (train, test)
    for wrong in (["a", "b"], ["a", "a", "b", "c"]):
        with pytest.raises(ValueError, match="expected at least three, of different names"):
            generated.divided(wrong)


def test_squares_lie_in_the_picture_and_are_not_flat():
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 150:] = RNG.integers(0, 256, (100, 50, 3), np.uint8)
    squares = generated.cut(pixels, 20, [0])
    assert squares.shape == (20, 32, 32, 3)
    assert (squares.std(axis=(1, 2)).mean(-1) > 0).mean() > 0.9
    np.testing.assert_array_equal(squares, generated.cut(pixels, 20, [0]))
    with pytest.raises(ValueError, match="at least 32 x 32 pixels, got 31 x 200"):
        generated.cut(pixels[:31], 1, [0])


def test_a_splice_is_an_ellipse_of_the_donor():
    donor = np.full((50, 60, 3), 7, np.uint8)
    for seed in range(5):
        made = generated.splice(np.full_like(SQUARE, 200), donor, np.random.default_rng(seed))
        inside = (made == 7).all(-1)
        assert ((made == 200).all(-1) | inside).all()
        assert np.pi * (32 / 6) ** 2 * 0.7 < inside.sum() < np.pi * (32 / 3) ** 2 * 1.05
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert len(rows) == np.ptp(rows) + 1  # connected
        assert len(columns) == np.ptp(columns) + 1


def test_a_transposed_convolution_leaves_a_checkerboard():
    made = generated.transposed(np.full((5, 6, 3), 90, np.uint8))
    box = 4 / 9  # of one tap; the bilinear taps add up to one everywhere
    for rows, columns, taps in ((0, 0, 1), (0, 1, 2), (1, 0, 2), (1, 1, 4)):
        expected = round(90 * (0.8 + 0.2 * box * taps))
        assert (made[rows::2, columns::2] == expected).all()


@pytest.mark.parametrize("filter", generated.FILTERS)
def test_resampling_takes_detail_and_keeps_the_mean(filter):
    made = generated.resampled(SQUARE, filter, np.random.default_rng(0))
    assert made.shape == SQUARE.shape
    assert made.std() < 0.75 * SQUARE.std()
    assert abs(made.mean() - SQUARE.mean()) < 3


def test_every_square_is_there_as_real_and_as_generated(made):
    _, found = made
    for squares, crops in ((found.train, 4), (found.test, 3)):
        count = len(set(squares.pictures))
        assert len(squares.labels) == 2 * crops * count
        np.testing.assert_array_equal(squares.labels[::2], 0)
        np.testing.assert_array_equal(squares.labels[1::2], 1)
        assert set(squares.recipes[::2]) == {"real"}
        assert squares.recipes[1:6:2] == generated.RECIPES
        assert (squares.images[::2] != squares.images[1::2]).any(axis=(1, 2, 3)).all()
    assert len(set(found.train.pictures)) == 3
    assert not set(found.train.pictures) & set(found.test.pictures)
    assert 0 < found.psnr < 20  # of an autoencoder that has hardly been trained


def test_the_set_is_read_again_and_is_a_source(made, pictures, tmp_path):
    out, found = made
    again = generated.make(out, pictures=pictures, crops=4, held_out_crops=3, epochs=1)
    for one, other in ((found.train, again.train), (found.test, again.test)):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    source = data.open_source(out / "test.npz", crop=data.Crop(32), classes=("real", "generated"))
    assert source[1].label == 1
    np.testing.assert_allclose(source[1].image * 255, found.test.images[1], atol=1e-3)
    with pytest.raises(ValueError, match=r"holds results of another config.*epochs"):
        generated.make(out, pictures=pictures, crops=4, held_out_crops=3, epochs=2)
    for path in pictures:
        shutil.copy(path, tmp_path)
    Image.fromarray(RNG.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"holds results of another config.*pictures"):
        generated.make(out, pictures=sorted(tmp_path.iterdir()), crops=4, held_out_crops=3, epochs=1)
    with pytest.raises(ValueError, match="crops must be at least 1, got 0"):
        generated.make(out, pictures=pictures, crops=0)
