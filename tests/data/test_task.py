from dataclasses import replace

import pytest

from shadowtune.config.data import PARTS, RowSource, TaskConfig
from shadowtune.data.task import SHIPPED_TASKS, EvaluationTask, load_task
from shadowtune.errors import ConfigError, DataError
from shadowtune.evaluation.scoring import score_answers
from tests.support.tasks import ROWS, numbered, write_split, write_task_data

PLAIN = TaskConfig("t", "{text}:", "{number}", RowSource(""))


def task_of(tmp_path, rows, **source):
    """A task whose training split holds ``rows``."""
    write_split(tmp_path / "train.jsonl.gz", rows)
    return EvaluationTask(replace(PLAIN, rows=RowSource(str(tmp_path), **source)))


def completions(rows):
    return [row["completion"] for row in rows]


def test_the_package_has_the_tasks_of_the_paper_and_the_intents():
    assert set(SHIPPED_TASKS) == {*ROWS, "amazon"}


@pytest.mark.parametrize("name", SHIPPED_TASKS)
def test_a_shipped_task_says_what_it_corrects_and_comes_from_the_hub(name):
    config = load_task(name).config
    assert config.name == name
    assert config.notes
    assert config.rows.source.startswith("hub:")
    assert (config.local is None) == (name == "amazon")


EXPECTED = {
    "gsm8k": ("Question: How much is 2 and 3?\nAnswer:", ["2 + 3 = <<2+3=5>>5\n#### 5"], None),
    "mmlu": ("1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer with the letter of the right choice only.\nAnswer:", ["B"], None),
    "squad_v2": (
        "Answer the question with words copied from the context. If the context does not answer it, write "
        "unanswerable.\nContext: It is red.\nQuestion: What colour?\nAnswer:",
        ["red", "is red"],
        None,
    ),
    "sst5": ("Review: good film\nSentiment:", ["positive"], 3),
    "news20": ("Post: the puck\n\nNewsgroup:", ["rec.sport.hockey"], 10),
    "clinc150": ("Request: hi there\nIntent:", ["greeting"], 82),
    "banking77": ("Question: where is my card?\nIntent:", ["card arrival"], 11),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("part", PARTS)
def test_a_row_of_a_directory_becomes_prompt_answer_and_references(name, part, tmp_path):
    write_task_data(tmp_path, name)
    task = load_task(name)
    row = task.rows(part, str(tmp_path))[0]
    prompt, references, label = EXPECTED[name]
    assert (row["prompt"], row["completion"], row["references"]) == (prompt, references[0], references)
    assert row.get("label") == label
    assert score_answers(task.config.metric, [row["completion"]], [references])[0] == [1]


def test_out_of_scope_is_written_in_words(tmp_path):
    write_split(tmp_path / "clinc150" / "test.jsonl.gz", [{"text": "what?", "intent": "oos"}])
    (row,) = load_task("clinc150").rows("test", str(tmp_path))
    assert (row["completion"], row["label"]) == ("out of scope", 42)
    assert len(load_task("clinc150").config.labels) == 151
    assert len(load_task("banking77").config.labels) == 77


def test_a_split_that_the_data_has_is_taken_as_it_is(tmp_path):
    task = task_of(tmp_path, numbered({"text": "a"}, 20), validation="dev")
    write_split(tmp_path / "dev.jsonl.gz", [{"text": "b", "number": 77}])
    write_split(tmp_path / "test.jsonl.gz", [{"text": "b", "number": 88}])
    assert sorted(completions(task.rows("train"))) == sorted(map(str, range(20)))
    assert completions(task.rows("validation")) == ["77"]
    assert completions(task.rows("test")) == ["88"]


def test_missing_validation_rows_are_a_tenth_of_the_training_rows_and_never_of_the_test(tmp_path):
    task = task_of(tmp_path, numbered({"text": "a"}, 40))
    write_split(tmp_path / "test.jsonl.gz", numbered({"text": "b"}, 40))
    train, validation = task.rows("train"), task.rows("validation")
    assert len(validation) == 4
    assert sorted(completions([*train, *validation]), key=int) == [str(number) for number in range(40)]
    assert {row["prompt"] for row in validation} == {"a:"}
    assert len(task.rows("test")) == 40


def test_a_single_file_gives_all_three_parts_and_shares_no_row_between_them(tmp_path):
    write_split(tmp_path / "rows.jsonl.gz", numbered({"text": "a"}, 30))
    task = EvaluationTask(replace(PLAIN, rows=RowSource(str(tmp_path / "rows.jsonl.gz"), test=None)))
    parts = [completions(task.rows(part)) for part in PARTS]
    assert [len(part) for part in parts] == [24, 3, 3]
    assert sorted((row for part in parts for row in part), key=int) == [str(number) for number in range(30)]


def test_a_single_file_is_never_for_training_and_testing_at_once(tmp_path):
    write_split(tmp_path / "rows.jsonl.gz", numbered({"text": "a"}, 30))
    task = EvaluationTask(replace(PLAIN, rows=RowSource(str(tmp_path / "rows.jsonl.gz"))))
    for part in PARTS:
        with pytest.raises(ConfigError, match=r"single file.*set its validation and test to null"):
            task.rows(part)


def test_equal_rows_stay_together(tmp_path):
    task = task_of(tmp_path, numbered({"text": "a"}, 10) * 3)
    (kept,) = set(completions(task.rows("validation")))
    assert len(task.rows("validation")) == 3
    assert kept not in completions(task.rows("train"))


def test_what_is_kept_for_validation_depends_on_the_rows_alone_not_on_their_order(tmp_path):
    rows = numbered({"text": "a"}, 50)
    before = completions(task_of(tmp_path, rows).rows("validation"))
    after = completions(task_of(tmp_path, [dict(reversed(row.items())) for row in reversed(rows)]).rows("validation"))
    assert before == after
    assert before != [str(number) for number in range(5)]


def test_a_limit_takes_a_sample_of_rows_sorted_by_class_and_a_larger_one_contains_it(tmp_path):
    rows = [{"text": f"{number}", "number": number // 100} for number in range(400)]
    task = task_of(tmp_path, rows, validation="train2")
    few, more = task.rows("train", limit=40), task.rows("train", limit=80)
    assert few == more[:40] == task.rows("train")[:40]
    counts = [completions(few).count(str(number)) for number in range(4)]
    assert sum(counts) == 40
    assert min(counts) >= 4


def test_a_row_keeps_the_place_it_comes_from(tmp_path):
    rows = task_of(tmp_path, numbered({"text": "a"}, 10)).rows("train")
    assert all(row.number == int(row["completion"]) + 1 for row in rows)
    with pytest.raises(DataError, match=r"train.jsonl.gz, line 1: no field 'number'"):
        task_of(tmp_path, [{"text": "a"}], validation="v").rows("train")


@pytest.mark.parametrize("references", [None, [], ["a", 1], "a"])
def test_references_that_are_no_list_of_texts_are_named(references, tmp_path):
    task = task_of(tmp_path, [{"text": "a", "number": 1, "all": references}], validation="v")
    with pytest.raises(DataError, match=r"line 1: all must be a list of texts"):
        EvaluationTask(replace(task.config, references="all")).rows("train")


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (("tset",), DataError, r"no part 'tset' \(did you mean test\?\); it has train, validation, test"),
        (("train", None, 0), DataError, "limit of rows must be at least 1"),
        (("train", "somewhere"), ConfigError, "not from a directory of data sets; leave out the directory somewhere"),
        (("test",), DataError, "has no split 'test'"),
    ],
)
def test_what_cannot_be_given_is_said(arguments, kind, said, tmp_path):
    with pytest.raises(kind, match=said):
        task_of(tmp_path, numbered({"text": "a"}, 5)).rows(*arguments)


def test_too_few_rows_to_share_are_an_error(tmp_path):
    with pytest.raises(DataError, match="too few rows for the part 'train' of task t"):
        task_of(tmp_path, [{"text": "a", "number": 1}]).rows("train")


def test_an_unknown_task_is_named_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"no task 'gsm8' \(did you mean gsm8k\?\); .*\.yaml file of your own"):
        load_task("gsm8")
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.yaml"):
        load_task("nowhere.yaml")
    (tmp_path / "t.yaml").write_text("name: t\npromt: '{text}'\n")
    with pytest.raises(ConfigError, match=r"unknown key promt \(did you mean prompt\?\).*missing key rows"):
        load_task(str(tmp_path / "t.yaml"))


def test_a_task_can_use_the_rows_of_some_classes_alone(tmp_path):
    """sst5 in two classes, as the comparisons use it."""
    file = "configs/compare/tasks/sst2.yaml"
    rows = [{"text": f"film {number}", "label": number % 5} for number in range(20)]
    write_split(tmp_path / "sst5" / "train.jsonl.gz", rows)
    found = load_task(file).rows("train", str(tmp_path))
    assert len(found) == 16
    assert {row["completion"] for row in found} == {"negative", "positive"}
    assert {row["label"] for row in found} == {0, 1, 3, 4}
    assert len(load_task(file).rows("train", str(tmp_path), 10)) == 10


def test_classes_to_use_are_those_of_the_task():
    with pytest.raises(ConfigError, match="only_labels has good, which labels does not"):
        replace(PLAIN, labels=["bad"], only_labels=["good"])
