import pytest
from safetensors.torch import load_file

from shadowtune.errors import CheckpointError
from shadowtune.evaluation.inspection import describe
from shadowtune.training.run import train
from tests.model.formats.third_party import peft_adapter, shadow_peft_adapter
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


@pytest.mark.parametrize(
    ("save", "library", "rank"),
    [
        (shadow_peft_adapter, "shadow-peft", "injection_hidden_size"),
        (
            lambda directory, **settings: peft_adapter(directory, directory / "base", **settings),
            "Hugging Face PEFT",
            "r",
        ),
    ],
    ids=("shadow-peft", "peft"),
)
def test_an_adapter_of_another_library_is_described_in_its_own_words(tmp_path, save, library, rank):
    save(tmp_path, **{rank: 5})
    facts = describe(tmp_path)
    assert (facts["library"], facts["task"], facts[rank]) == (library, "causal_lm", 5)
    (file,) = tmp_path.glob("*adapter*.safetensors")
    assert facts["tensors_total"] == sum(tensor.numel() for tensor in load_file(file).values())
    assert facts["tensors_total"] == sum(count for name, count in facts.items() if name.startswith("tensors_")) / 2


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory"):
        describe(tmp_path)
