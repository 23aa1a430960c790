"""Verdicts of `validate`: small differences pass, wrong ones fail, and what cannot be compared is said."""

from importlib.util import find_spec

import numpy as np
import pytest

from jaxinterp import cli, models
from jaxinterp.weights import validation
from jaxinterp.weights.validation import Comparison, against_references, compare


def test_compare_in_closed_form():
    found = compare("logits", [1.0, 2.0, 4.0], [1.0, 2.0, 5.0])
    assert found.difference == pytest.approx(1 / 5)
    assert found.cosine == pytest.approx(25 / np.sqrt(21 * 30))
    assert not found.passed
    assert compare("logits", [1.0, 5.0], [1.0, 5.00004]).passed
    assert not compare("logits", [1.0, 5.0], [1.0, 5.0001]).passed
    assert compare("layer1", [1.0, 5.0], [1.0, 5.0004]).passed  # maps: 1e-4
    assert compare("gradient", [0.1], [0.2], largest=1e9).passed  # a sample of something larger
    assert not compare("logits", [np.nan], [1.0]).passed
    assert compare("layer1", [0.0, 0.0], [0.0, 0.0]).passed


def test_a_network_equals_its_original_and_a_wrong_one_does_not():
    assert all(each.passed for each in against_references("small_cnn"))
    wrong = dict(validation._stored())
    wrong["small_cnn/logits"] = wrong["small_cnn/logits"] * np.float32(1.0001)
    failed = [each.what for each in against_references("small_cnn", wrong) if not each.passed]
    assert failed == ["logits"]


def test_the_command_prints_a_table_and_a_record(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert cli.main(["validate", "small_cnn", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 5
    assert "FAIL" not in printed
    assert '"passed": true' in out.read_text()


def test_nodes_that_were_not_compared_are_listed_with_the_reason():
    nodes = models.network("efficientnet_lite0").nodes
    compared = [Comparison(node, 0.0, 1.0, 1e-4) for node in nodes if node not in ("_conv_stem", "_blocks.3")]
    skipped = validation.left_out("efficientnet_lite0", compared, live=True)
    assert skipped == {
        "_conv_stem": "the original's module of this name ends before batch norm and activation",
        "_blocks.3": "the original has no module of this name",
    }
    *_, first, second = validation.lines(compared, skipped)
    assert first == f"not compared, as {skipped['_conv_stem']}: _conv_stem"
    assert second == f"not compared, as {skipped['_blocks.3']}: _blocks.3"
    assert validation.left_out("efficientnet_lite0", [], live=False)["_conv_stem"] == "no reference output is stored"
    complete = [Comparison(node, 0.0, 1.0, 1e-4) for node in nodes]
    assert validation.left_out("efficientnet_lite0", complete, live=True) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smal_cnn"], "did you mean 'small_cnn'"),
        (["small_cnn", "--against", "missing.py:make"], "compar" if find_spec("torch") is None else "existing file"),
        ([], "name at least one network"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert cli.main(["validate", *arguments]) == 2
    assert message in capsys.readouterr().err
