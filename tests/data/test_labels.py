import pytest
from transformers import LlamaConfig

from shadowtune.data.encoding import encode_classification
from shadowtune.data.examples import FieldNames
from shadowtune.data.labels import Labels, class_weights
from shadowtune.data.sources import Row
from shadowtune.errors import DataError
from tests.support.tokenizers import tiny_tokenizer


def encode(values, labels=None, classes=None, **fields):
    rows = [Row({"text": "a", "label": value}, "f", n, "line", classes) for n, value in enumerate(values, start=1)]
    encoded, report = encode_classification(rows, tiny_tokenizer(), FieldNames(**fields), 9, labels=labels)
    return [each["labels"] for each in encoded], report.labels


@pytest.mark.parametrize(
    ("values", "expected", "kind", "names"),
    [
        (["b", "a", "b"], [1, 0, 1], "single", ("a", "b")),
        (["1", "0", "10"], [1, 0, 10], "single", None),
        (["1", "0", "ten"], [1, 0, 2], "single", ("0", "1", "ten")),
        ([2, 0], [2, 0], "single", None),
        ([True, False], [1, 0], "single", ("false", "true")),
        ([0.5, 2], [0.5, 2.0], "regression", None),
        (["0.5", "2"], [0.5, 2.0], "regression", None),
        ([["x"], [], ["y", "x"]], [[1, 0], [0, 0], [1, 1]], "multi", ("x", "y")),
        ([[0, 2], [1]], [[1, 0, 1], [0, 1, 0]], "multi", None),
        ([[0.0, 1.0], [1.0, 1.0]], [[0, 1], [1, 1]], "multi", None),
    ],
)
def test_kinds_are_read_off_the_labels(values, expected, kind, names):
    found, labels = encode(values)
    assert found == expected
    assert labels.problem_type.startswith(kind)
    assert labels.names == names
    assert encode(values, labels)[0] == expected


def test_settings_name_kind_and_classes():
    assert encode([3, 5], problem_type="regression")[0] == [3.0, 5.0]
    assert encode(["x|y", "y"], label_separator="|")[0] == [[1.0, 1.0], [0.0, 1.0]]
    found, labels = encode(["b", "a"], label_names=("c", "b", "a"))
    assert (found, labels.count, str(labels)) == ([1, 2], 3, "3 classes (c, b, a)")
    found, labels = encode([1, 0], label_names=("no", "yes"))
    assert (found, labels.model_arguments(2)["id2label"]) == ([1, 0], {0: "no", 1: "yes"})


def test_class_names_of_a_data_set_are_kept_in_its_order_and_found_by_another_order():
    found, labels = encode([2, 0], classes={"label": ["z", "y", "a"]})
    assert (found, labels.names) == ([2, 0], ("z", "y", "a"))
    assert encode([2, 0], labels, classes={"label": ["y", "z", "a"]})[0] == [2, 1]
    with pytest.raises(DataError, match="f, line 1: the label -1 is no class of the data set"):
        encode([-1, 0], classes={"label": ["z", "y", "a"]})


@pytest.mark.parametrize(
    ("values", "message", "fields"),
    [
        (["a", 3], r"f, line 2: the label 3 is a number, those before are a text", {}),
        ([[1], "a"], r"f, line 2: the label 'a' is a text", {}),
        ([[1, "a"], [2]], "f, line 1: a label is text, a number or a list", {}),
        ([{"a": 1}, "a"], "f, line 1: a label is text", {}),
        ([-1, 0], "f, line 1: label must be the number of a class, from 0, got -1", {}),
        (["a", "a"], "all 2 labels are 'a'", {}),
        (["a", None], r"f, line 2: the label \(label\) is missing", {}),
        (["a", "bb"], r"the label 'a' is none of the 2 classes \(bb, c\).*label_names", {"label_names": ("bb", "c")}),
        (["a", "b"], "f, line 1: the label must be a finite number", {"problem_type": "regression"}),
        ([0.5, 1.5], "needs classes, got 0.5", {"problem_type": "single_label_classification"}),
        (
            ["a", "bb"],
            r"the label 'a' is none of the 2 classes \(bb, c\).*data\.label_names",
            {"label_names": ("bb", "c")},
        ),
    ],
)
def test_labels_of_another_kind_are_named(values, message, fields):
    with pytest.raises(DataError, match=message):
        encode(values, **fields)


def test_labels_are_what_a_models_config_records():
    for values in (["b", "a"], [["x"], ["y"]], [0.5, 0.7], [0, 1]):
        labels = encode(values)[1]
        count = labels.count or 2
        config = LlamaConfig(num_labels=count, **labels.model_arguments(count))
        found = Labels.of_model(config)
        assert (found.problem_type, found.names, found.count) == (labels.problem_type, labels.names, count)


def test_class_weights_are_balanced_or_by_name():
    examples, labels = [{"labels": label} for label in (0, 0, 0, 1)], encode(["a", "b"])[1]
    assert class_weights("balanced", labels, examples, 2) == (4 / 6, 4 / 2)
    assert class_weights({"b": 3.0}, labels, examples, 2) == (1.0, 3.0)
    with pytest.raises(DataError, match="class_weights has 'c', which is no class"):
        class_weights({"c": 3.0}, labels, examples, 2)
    with pytest.raises(DataError, match=r"class_weights needs one class per example, but .* numbers \(regression\)"):
        class_weights("balanced", encode([0.5])[1], examples, 1)
