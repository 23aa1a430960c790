"""Sizes of cells on the command line."""

import pytest
import tyro

from jaxinterp import cli, study
from jaxinterp.cellsize import CellSize, CellSizeOrPart, parse, write


@pytest.mark.parametrize(("text", "cell"), [("14", 14), ("14x28", (14, 28)), ("7x7", 7), ("0", 0)])
def test_a_side_or_height_and_width(text, cell):
    assert parse(text) == cell
    assert parse(write(cell)) == cell
    assert tyro.cli(study.Setting, args=["--cell", text]).cell == cell
    assert tyro.cli(CellSizeOrPart, args=[text]) == cell


def test_a_default_is_shown_as_it_is_given(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(CellSize, default=(14, 28), args=["--help"])
    assert "default: 14x28" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "14x", "x14", "-1", "1.5", "14x28x3", "²"])
def test_other_texts_are_refused_before_anything_is_begun(text, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"expected pixels, as 14, or HEIGHTxWIDTH, as 14x28, got"):
        parse(text)
    with pytest.raises(SystemExit):
        cli.main(["explain", f"--cell={text}", "--out", str(tmp_path / "out")])
    assert "HEIGHTxWIDTH, as 14x28" in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not (tmp_path / "out").exists()


def test_where_none_is_given_a_wrong_one_is_refused_in_the_same_words(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(CellSizeOrPart, default=None, args=["3x"])
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "Error parsing [INT|INTxINT]: expected pixels, as 14, or HEIGHTxWIDTH, as 14x28, got '3x'" in said
    assert "PrimitiveConstructorSpec" not in said
    with pytest.raises(SystemExit):
        tyro.cli(CellSizeOrPart, default=None, args=["--help"])
    assert "default: SIZE/14" in capsys.readouterr().out
    assert tyro.cli(CellSizeOrPart, default=None, args=[]) is None
