from dataclasses import replace

import pytest

from shadowtune.config.data import DataConfig
from shadowtune.data.dataset import Dataset
from shadowtune.data.sources import load_rows
from shadowtune.errors import ConfigError, DataError
from tests.support.commands import write_rows
from tests.support.runs import rows_file
from tests.support.tasks import write_task_data
from tests.support.tokenizers import tiny_tokenizer


@pytest.fixture
def directory(tmp_path):
    for name in ("gsm8k", "clinc150"):
        write_task_data(tmp_path, name)
    return str(tmp_path)


def of_task(name, directory, **settings):
    return Dataset.open(DataConfig(task=name, directory=directory, **settings))


def test_a_task_says_what_the_settings_leave_open(directory):
    data = of_task("gsm8k", directory)
    assert (data.max_length, data.chat_template, data.metric, data.max_new_tokens) == (768, True, "number", 320)
    assert data.num_labels is None
    data = of_task("clinc150", directory)
    assert (data.max_length, data.chat_template, data.metric, data.num_labels) == (256, False, "label", 151)
    assert data.template == "Request: {text}\nIntent:"


def test_the_settings_win_over_the_task(directory):
    data = of_task("clinc150", directory, max_length=40, chat_template=True)
    assert (data.max_length, data.chat_template) == (40, True)
    assert of_task("gsm8k", directory, chat_template=False).chat_template is False


def test_without_a_task_lengths_and_template_are_the_usual(tmp_path):
    data = Dataset.open(DataConfig(train="rows.jsonl", template="{a}"))
    assert (data.max_length, data.chat_template, data.template) == (512, True, "{a}")
    assert (data.metric, data.max_new_tokens, data.num_labels) == ("exact_match", None, None)
    assert Dataset.open(DataConfig(train="rows.jsonl", chat_template=False)).chat_template is False


def test_a_tasks_parts_are_limited_apart(directory):
    data = of_task("clinc150", directory, limit=5, validation="task", validation_limit=3)
    assert (len(data.training_rows()), len(data.validation_rows())) == (5, 3)
    assert of_task("clinc150", directory).validation_rows() is None
    assert len(data.held_out("test")) == 12
    assert len(data.held_out("test", limit=4)) == 4


def test_rows_of_a_file_are_limited_apart_and_never_held_out(tmp_path):
    file = rows_file(tmp_path / "rows.jsonl")
    data = Dataset.open(DataConfig(train=file, validation=file, limit=5, validation_limit=3))
    assert (len(data.training_rows()), len(data.validation_rows())) == (5, 3)
    with pytest.raises(DataError, match=r"holds the rows that the run was trained on; pass --data"):
        data.held_out("test")
    assert len(data.held_out("test", file)) == 12


def test_a_tenth_of_a_file_is_held_back_by_its_contents(tmp_path):
    rows = [{"prompt": f"say {number % 25}", "completion": "x"} for number in range(50)]
    data = Dataset.open(DataConfig(train=str(write_rows(tmp_path / "rows.jsonl", rows)), validation="hold_out"))
    train, held_back = data.training_rows(), data.validation_rows()
    assert len({row["prompt"] for row in held_back}) == 3, "a tenth of 25 distinct rows, rounded up"
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_back}, "equal rows stay together"
    assert sorted(row.number for row in [*train, *held_back]) == sorted(
        row.number for row in load_rows(data.settings.train, "train", None)
    )
    assert [row.number for row in train] == sorted(row.number for row in train)
    assert data.held_out("validation", source="hold_out", limit=2) == held_back[:2]
    shuffled = Dataset.open(replace(data.settings, train=str(write_rows(tmp_path / "other.jsonl", rows[::-1]))))
    assert {row["prompt"] for row in shuffled.validation_rows()} == {row["prompt"] for row in held_back}
    limited = Dataset.open(replace(data.settings, limit=4, validation_limit=2))
    assert (limited.training_rows(), limited.validation_rows()) == (train[:4], held_back[:2])


def test_a_file_of_one_row_has_none_to_hold_back(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    data = Dataset.open(DataConfig(train=str(file), validation="hold_out"))
    with pytest.raises(DataError, match=r"rows\.jsonl has too few rows to hold some back for validation"):
        data.training_rows()


def test_of_a_task_its_own_rows_are_held_back(directory):
    own = of_task("clinc150", directory, validation="task").validation_rows()
    assert of_task("clinc150", directory, validation="hold_out").validation_rows() == own


def test_held_out_rows_of_a_task_may_come_from_another_directory(directory, tmp_path):
    write_task_data(tmp_path / "other", "clinc150", count=3)
    assert len(of_task("clinc150", directory).held_out("test", str(tmp_path / "other"))) == 3


def test_another_task_takes_directory_length_and_template_from_the_run_and_nothing_else(directory):
    data = of_task("clinc150", directory, limit=5, max_length=99, chat_template=True).of_task("gsm8k")
    assert data.settings == DataConfig(task="gsm8k", directory=directory, max_length=99, chat_template=True)
    assert data.metric == "number"


def test_prompts_and_answers_of_a_task_are_encoded_the_tasks_way(directory):
    data, tokenizer = of_task("clinc150", directory), tiny_tokenizer()
    rows = data.held_out("test", limit=2)
    (encoded, _), prompts = data.encode(rows, tokenizer, classify=False), data.encode_prompts(rows, tokenizer)
    assert tokenizer.decode(prompts[0].input_ids) == "Request: hi there\nIntent:"
    assert tokenizer.decode(encoded[0]["input_ids"]) == "Request: hi there\nIntent: greeting<|im_end|>"
    assert data.references(rows, prompts) == [["greeting"]] * 2
    asked = of_task("clinc150", directory, chat_template=True).encode_prompts(rows, tokenizer)
    assert tokenizer.decode(asked[0].input_ids).startswith("<|im_start|>user\nRequest")


def test_a_task_with_labels_gives_classes(directory):
    data, tokenizer = of_task("clinc150", directory), tiny_tokenizer()
    encoded, _ = data.encode(data.training_rows(), tokenizer, classify=True)
    assert {row["labels"] for row in encoded} == {82}
    assert tokenizer.decode(encoded[0]["input_ids"]) == "Request: hi there\nIntent:"


def test_a_task_without_labels_has_no_classes_to_predict(directory):
    data = of_task("gsm8k", directory)
    with pytest.raises(ConfigError, match="task gsm8k has no classes to predict; set task=causal_lm"):
        data.encode(data.training_rows(), tiny_tokenizer(), classify=True)


def test_what_is_only_for_training_leaves_evaluation_alone(tmp_path):
    file, tokenizer = rows_file(tmp_path / "rows.jsonl"), tiny_tokenizer()
    data = Dataset.open(
        DataConfig(train=file, max_length=14, overlong="drop", completion_only=False, chat_template=False)
    )
    rows = data.training_rows()
    trained, _ = data.encode(rows, tokenizer, classify=False, training=True)
    measured, _ = data.encode(rows, tokenizer, classify=False)
    assert len(trained) < len(measured) == len(rows)
    assert -100 not in trained[0]["labels"]
    assert -100 in measured[0]["labels"]
    references = data.references(rows, data.encode_prompts(rows, tokenizer))
    assert references[3] == ["12"]


def test_texts_are_cut_into_blocks_in_training(tmp_path):
    file = rows_file(tmp_path / "texts.jsonl", task="classification")
    data = Dataset.open(DataConfig(train=file, block_size=8))
    encoded, report = data.encode(data.training_rows(), tiny_tokenizer(), classify=False, training=True)
    assert len(encoded[0]["input_ids"]) == report.block_size == 8
    with pytest.raises(ConfigError, match="no task 'x'"):
        Dataset.open(replace(data.settings, train=None, block_size=None, task="x"))


def test_validation_rows_can_be_learned_and_are_then_not_measured(directory):
    plain = of_task("gsm8k", directory, limit=5, validation="task", validation_limit=3)
    learned = Dataset(replace(plain.settings, learn_validation=True), plain.task)
    assert learned.validation_rows() is None
    assert learned.training_rows() == [*plain.training_rows(), *plain.validation_rows()]
    assert len(learned.training_rows()) > 5


def test_validation_rows_that_are_not_there_cannot_be_learned():
    with pytest.raises(ConfigError, match="learn_validation=true needs validation rows"):
        DataConfig(train="rows.jsonl", learn_validation=True)
