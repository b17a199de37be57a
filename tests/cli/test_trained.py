import pytest

from shadowtune.cli.main import main
from shadowtune.cli.trained import open_trained
from tests.support.commands import write_config
from tests.support.tasks import write_task_data


@pytest.fixture
def task_run(base, tmp_path):
    """A run on a task, whose data set has test rows."""
    write_task_data(tmp_path / "data", "squad_v2", count=5)
    config = write_config(tmp_path / "c.yaml", base, "null", tmp_path / "run")
    settings = ["data.task=squad_v2", f"data.directory={tmp_path / 'data'}", "data.max_length=100", "max_steps=1"]
    assert main(["train", str(config), "--quiet", *settings]) == 0
    return tmp_path / "run"


def test_a_run_on_a_task_is_checked_on_the_tasks_test_rows_by_the_tasks_metric(task_run):
    trained = open_trained(task_run, 3)
    assert len(trained.prompts) == 3
    assert "What colour?" in trained.tokenizer.decode(trained.prompts[0])
    assert trained.score(["red", "The red!", "blue"]) == [1, 1, 0]
    assert trained.card.training["data"] == "squad_v2"


def test_rows_that_moved_leave_the_built_in_prompts(task_run, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    trained = open_trained(task_run, 3)
    assert trained.prompts
    assert trained.score is None


def test_a_run_of_one_file_is_checked_on_its_validation_rows(shadow_run, data):
    assert open_trained(shadow_run, 3).score is None
    config = shadow_run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("validation: null", f"validation: {data}"))
    try:
        trained = open_trained(shadow_run, 3)
    finally:
        config.write_text(before)
    assert trained.score(["one", "two", "one"]) == [1, 1, 0]
