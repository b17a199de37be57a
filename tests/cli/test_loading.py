from pathlib import Path

import pytest

from shadowtune.cli.loading import adapter_paths, load_adapter, load_adapters, load_run, read_adapter_source
from shadowtune.cli.main import main
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.evaluation.run import FinishedRun
from tests.support.commands import write_config
from tests.support.runs import model_directory
from tests.support.shadows import perturbed_model, tokens
from tests.support.tasks import write_task_data


def test_runs_answer_by_their_directory_or_a_name():
    found = adapter_paths(["runs/a", "runs/b/"], ["c=runs/a", "d=x=y"])
    assert found == {"a": Path("runs/a"), "b": Path("runs/b"), "c": Path("runs/a"), "d": Path("x=y")}


@pytest.mark.parametrize(
    ("runs", "named", "said"),
    [
        ([], [], "name at least one run"),
        (["x/a", "y/a"], [], "x/a and y/a would both be called 'a'; write --name OTHER=y/a"),
        (["a"], ["b"], "--name takes NAME=RUN, got 'b'"),
        (["a"], ["=b"], "--name takes NAME=RUN"),
    ],
)
def test_names_that_cannot_be_are_refused(runs, named, said):
    with pytest.raises(ConfigError, match=said):
        adapter_paths(runs, named)


def test_all_adapters_stand_on_one_base(shadow_run):
    told = []
    served = load_adapters({"one": shadow_run, "two": shadow_run / "model"}, told.append)
    (one, first), (two, second) = served.adapters["one"], served.adapters["two"]
    assert one.base is two.base is served.base and one.shadow is not two.shadow
    assert first == FinishedRun.open(shadow_run).prompt_format and second == PromptFormat()
    assert [line.split()[1] for line in told] == ["one", "two"]
    ids = tokens(1, 5)
    expected = FinishedRun.open(shadow_run).model(ids).logits
    assert one(ids).logits.equal(two(ids).logits) and one(ids).logits.equal(expected)
    assert served.tokenizer("say one")["input_ids"] == FinishedRun.open(shadow_run).tokenizer("say one")["input_ids"]


def test_a_shadow_without_a_tokenizer_has_its_bases(tmp_path):
    base = model_directory(tmp_path / "base")
    model = perturbed_model()
    model.config.base_name_or_path = base
    model.save_pretrained(tmp_path / "shadow")
    served = load_adapters({"shadow": tmp_path / "shadow"}, lambda line: None)
    assert served.tokenizer.chat_template is not None


def test_a_shadow_of_another_base_is_refused(shadow_run, tmp_path):
    other = perturbed_model("qwen2")
    other.config.base_name_or_path = "elsewhere"
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="wrong base"):
        load_adapters({"one": shadow_run, "other": tmp_path / "other"}, lambda line: None)


def test_what_has_no_shadow_that_generates_is_refused(lora_run, tmp_path):
    with pytest.raises(ConfigError, match="is a lora causal_lm run; a server needs a shadow that generates"):
        read_adapter_source(lora_run)
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_adapter_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_adapter(read_adapter_source(tmp_path))


def test_a_shadow_with_nan_is_refused(shadow_run):
    import torch

    from shadowtune.cli.loading import check_finite, load_adapter, read_adapter_source
    from shadowtune.errors import CheckpointError

    model = load_adapter(read_adapter_source(shadow_run))
    check_finite("good", model)
    with torch.no_grad():
        model.shadow.boundaries.injection_ups[0, 0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="'bad' has weights that are NaN or infinite"):
        check_finite("bad", model)


@pytest.fixture
def task_run(base, tmp_path):
    """A run on a task, whose data set has test rows."""
    write_task_data(tmp_path / "data", "squad_v2", count=5)
    config = write_config(tmp_path / "c.yaml", base, "null", tmp_path / "run")
    settings = ["data.task=squad_v2", f"data.directory={tmp_path / 'data'}", "data.max_length=100", "max_steps=1"]
    assert main(["train", str(config), "--quiet", *settings]) == 0
    return tmp_path / "run"


def test_a_run_on_a_task_is_checked_on_the_tasks_test_rows_by_the_tasks_metric(task_run):
    trained = load_run(task_run, 3)
    assert len(trained.prompts) == 3
    assert "What colour?" in trained.tokenizer.decode(trained.prompts[0])
    assert trained.score(["red", "The red!", "blue"]) == [1, 1, 0]
    assert trained.card.training["data"] == "squad_v2"


def test_rows_that_moved_leave_the_built_in_prompts(task_run, tmp_path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    trained = load_run(task_run, 3)
    assert trained.prompts
    assert trained.score is None


def test_a_run_of_one_file_is_checked_on_its_validation_rows(shadow_run, data):
    assert load_run(shadow_run, 3).score is None
    config = shadow_run / "config.yaml"
    before = config.read_text()
    config.write_text(before.replace("validation: null", f"validation: {data}"))
    try:
        trained = load_run(shadow_run, 3)
    finally:
        config.write_text(before)
    assert trained.score(["one", "two", "one"]) == [1, 1, 0]
