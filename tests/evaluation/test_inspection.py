import pytest

from shadowtune.errors import CheckpointError
from shadowtune.evaluation.inspection import describe
from shadowtune.training.run import train
from tests.support.runs import run_config
from tests.support.shadows import perturbed_model


def test_a_saved_shadow_is_described_by_its_config_and_tensors(tmp_path):
    model = perturbed_model(rank=5)
    model.save_pretrained(tmp_path)
    facts = describe(tmp_path)
    assert (facts["architecture"], facts["base_blocks"], facts["base_width"]) == ("llama", 4, 32)
    assert (facts["shadow_blocks"], facts["rank"], facts["dtype"]) == (1, 5, "float32")
    assert facts["tensors_total"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_run_says_whether_it_has_finished(tmp_path):
    config = run_config(tmp_path, max_steps=2, save_steps=1)
    train(config, quiet=True)
    facts = describe(config.output)
    assert facts["finished"] is True
    assert facts["steps"] == 2
    (tmp_path / "run" / "summary.json").unlink()
    facts = describe(config.output)
    assert facts["finished"] is False
    assert facts["last_checkpoint"].endswith("checkpoint-2")


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory"):
        describe(tmp_path)
