"""What attacks are given beside numbers: texts and pictures of the images' size, also to attacks inside of others."""

import numpy as np
import pytest

from jaxinterp.attacks import PGD, Chain, Smoothed, TransparentText, Watermark
from jaxinterp.attacks.lettering import Bank
from jaxinterp.supplies import supplied
from jaxinterp.watermarks import Watermarks

MARKS = Watermarks(np.zeros((3, 16, 16, 3), np.float32), (1, 2), ("a", "b"), ("a/1", "b/1", "b/2"))


def test_texts_and_pictures_go_to_whoever_places_them():
    text, mark = TransparentText(text="go"), Watermark(transform="dct")
    chain = Chain((PGD(), text, Smoothed(mark)))
    found = supplied({"pgd": PGD(), "text": text, "chain": chain}, 16, MARKS)
    assert found["pgd"] == PGD()
    assert isinstance(found["text"], TransparentText)
    assert isinstance(found["text"].bank, Bank)
    assert found["text"].bank.tiles.shape[1:] == (16, 16)
    assert isinstance(found["chain"], Chain)
    first, second, third = found["chain"].stages
    assert first == PGD()
    assert second.bank is not None
    assert third.base.folders == (1, 2)
    np.testing.assert_array_equal(third.base.watermarks, MARKS.images)
    assert third.base.transform == "dct"
    assert text.bank is None
    assert supplied({"mark": mark}, 16)["mark"] == mark  # embeds noise


def test_what_cannot_be_supplied():
    with pytest.raises(ValueError, match="--watermarks goes with the attack watermark, got text, pgd"):
        supplied({"text": TransparentText(text="go"), "pgd": PGD()}, 16, MARKS)
    with pytest.raises(ValueError, match="'confidential' does not fit in 16 x 16 pixels"):
        supplied({"text": TransparentText()}, 16)
    odd = {"chain": Chain((PGD(), Watermark(transform="haar")))}
    with pytest.raises(ValueError, match="the Haar transform needs sides that two divides, got 299 x 299 pixels"):
        supplied(odd, 299)
    assert supplied({"dct": Watermark(transform="dct")}, 299)
