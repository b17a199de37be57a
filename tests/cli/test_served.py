from pathlib import Path

import pytest

from shadowtune.cli.served import named_runs, open_served, open_shadow, read_source
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.evaluation.run import FinishedRun
from tests.support.runs import model_directory
from tests.support.shadows import perturbed_model, tokens


def test_runs_answer_by_their_directory_or_a_name():
    found = named_runs(["runs/a", "runs/b/"], ["c=runs/a", "d=x=y"])
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
        named_runs(runs, named)


def test_all_adapters_stand_on_one_base(shadow_run):
    told = []
    served = open_served({"one": shadow_run, "two": shadow_run / "model"}, told.append)
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
    served = open_served({"shadow": tmp_path / "shadow"}, lambda line: None)
    assert served.tokenizer.chat_template is not None


def test_a_shadow_of_another_base_is_refused(shadow_run, tmp_path):
    other = perturbed_model("qwen2")
    other.config.base_name_or_path = "elsewhere"
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="wrong base"):
        open_served({"one": shadow_run, "other": tmp_path / "other"}, lambda line: None)


def test_what_has_no_shadow_that_generates_is_refused(lora_run, tmp_path):
    with pytest.raises(ConfigError, match="is a lora causal_lm run; a server needs a shadow that generates"):
        read_source(lora_run)
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_shadow(read_source(tmp_path))


def test_a_shadow_with_nan_is_refused(shadow_run):
    import torch

    from shadowtune.cli.served import check_finite, open_shadow, read_source
    from shadowtune.errors import CheckpointError

    model = open_shadow(read_source(shadow_run))
    check_finite("good", model)
    with torch.no_grad():
        model.shadow.boundaries.injection_ups[0, 0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="'bad' has weights that are NaN or infinite"):
        check_finite("bad", model)
