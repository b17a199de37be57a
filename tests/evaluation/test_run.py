from pathlib import Path

import pytest

from shadowtune.config.training import DataConfig
from shadowtune.errors import CheckpointError, ConfigError, DataError
from shadowtune.evaluation.run import FinishedRun, read_run_config
from shadowtune.training.run import train
from tests.support.runs import run_config
from tests.support.tasks import write_task_data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = run_config(tmp_path_factory.mktemp("run"), max_steps=2)
    train(config, quiet=True)
    return FinishedRun.open(config.output)


def test_a_mode_lasts_as_long_as_its_context_even_if_it_fails(finished):
    assert finished.modes == ("attached", "detached", "base")
    with finished.mode("detached") as model:
        assert model.mode == "detached"
    with pytest.raises(KeyError), finished.mode("base"):
        raise KeyError
    assert finished.model.mode == "attached"
    with pytest.raises(ConfigError, match="no mode 'sideways'"), finished.mode("sideways"):
        pass


def test_the_training_rows_are_never_taken_for_held_out_ones(finished):
    with pytest.raises(DataError, match="pass --data"):
        finished.evaluate("attached")


def test_the_test_split_of_a_directory_is_held_out(finished, tmp_path):
    source = Path(finished.config.data.train)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(source.read_text())
    run = FinishedRun(finished.path, finished.config, finished.model, finished.tokenizer)
    result = run.evaluate("attached", source=str(tmp_path), limit=2)
    assert result.rows == 2


def test_a_run_of_files_is_measured_on_a_task(finished, tmp_path):
    for name in ("squad_v2", "sst5"):
        write_task_data(tmp_path, name)
    result = finished.evaluate("attached", source=str(tmp_path), limit=4, max_new_tokens=3, task="squad_v2")
    assert (result.rows, len(result.scores), list(result.other_scores)) == (4, 4, ["f1"])
    assert finished.evaluate("attached", source=str(tmp_path), split="train", max_new_tokens=3, task="sst5").rows == 12
    with pytest.raises(DataError, match="no part 'dev'"):
        finished.evaluate("attached", source=str(tmp_path), split="dev", task="sst5")


def test_words_go_where_the_tasks_field_was(finished):
    config = run_config(finished.path, data=DataConfig(task="clinc150"))
    assert FinishedRun(finished.path, config, None, finished.tokenizer).prompt("hi") == "Request: hi\nIntent:"


@pytest.mark.parametrize(("template", "prompt"), [(None, "hi"), ("Say {x}!", "Say hi!"), ("{{a}} {x}\n", "{a} hi\n")])
def test_words_go_where_the_rows_field_was(finished, template, prompt):
    config = run_config(finished.path, data=DataConfig(train="t", template=template))
    assert FinishedRun(finished.path, config, None, finished.tokenizer).prompt("hi") == prompt


def test_a_template_of_several_fields_needs_the_whole_prompt(finished):
    config = run_config(finished.path, data=DataConfig(train="t", template="{a} {b}"))
    with pytest.raises(DataError, match="--raw"):
        FinishedRun(finished.path, config, None, finished.tokenizer).prompt("hi")


def test_a_directory_without_config_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="not a run directory"):
        read_run_config(tmp_path)
