import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from shadowtune.cli.main import main
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.training.adaptation import adaptation_settings
from tests.support.commands import WORDS, write_config, write_rows


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    rows = [{"prompt": f"say {word}", "completion": word[::-1]} for word in WORDS]
    return write_rows(tmp_path_factory.mktemp("private") / "private.jsonl", rows)


@pytest.fixture(scope="module")
def stateless_run(base, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stateless")
    config = write_config(folder / "c.yaml", base, data, folder / "run", "deferral_fraction: 0.25\n")
    assert main(["train", str(config), "shadow.variant=stateless", "shadow.hidden_size=16", "--quiet"]) == 0
    return folder / "run"


def adapted(run, private, out, *more):
    return main(["adapt", str(run), "--data", str(private), "--output", str(out), "--epochs", "2", "--quiet", *more])


def tensors(run):
    return load_file(run / "model" / "model.safetensors")


def test_the_shadow_learns_alone_and_the_attached_model_stays(stateless_run, private, tmp_path):
    before = tensors(stateless_run)
    assert adapted(stateless_run, private, tmp_path / "mine", "--json", str(tmp_path / "r.json")) == 0
    after = tensors(tmp_path / "mine")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        learned = name.startswith(("shadow.backbone.", "shadow.projection.", "shadow.input_projection."))
        assert torch.equal(tensor, after[name]) != learned, name
    assert all(torch.equal(tensor, tensors(stateless_run)[name]) for name, tensor in before.items())
    models = [ShadowForCausalLM.from_pretrained(run / "model") for run in (stateless_run, tmp_path / "mine")]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    attached = [model(ids).logits for model in models]
    detached = [model.set_mode("detached")(ids).logits for model in models]
    assert torch.equal(*attached) and not torch.equal(*detached)
    assert (stateless_run / "model" / "deferral_head.json").exists()
    assert not (tmp_path / "mine" / "model" / "deferral_head.json").exists()
    assert json.loads((tmp_path / "r.json").read_text())["command"] == "adapt"
    assert main(["detach", str(tmp_path / "mine"), "--out", str(tmp_path / "small")]) == 0
    assert adapted(stateless_run, private, tmp_path / "mine") == 2
    assert adapted(stateless_run, private, tmp_path / "mine", "--overwrite") == 0


def test_boundaries_of_the_paper_stay_too(shadow_run, private, tmp_path):
    assert adapted(shadow_run, private, tmp_path / "mine") == 0
    before, after = tensors(shadow_run), tensors(tmp_path / "mine")
    assert all(torch.equal(before[name], after[name]) for name in before if ".boundaries." in name)


def test_the_run_of_a_task_reads_prompts_and_answers_in_its_format(stateless_run, private, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(stateless_run, copied)
    file = copied / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["data"] = {"task": "clinc150", "max_length": 64, "validation": None}
    file.write_text(yaml.safe_dump(config))
    data = adaptation_settings(copied, str(private), tmp_path / "mine", 1.0, 1e-3).data
    form = PromptFormat.load(copied / "model")
    assert (data.train, data.task, data.max_length) == (str(private), None, 64)
    assert (data.template, data.chat_template) == (form.template, form.chat_template)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("lora", [], "only a shadow that generates learns alone"),
        ("none", [], "is no finished run"),
        ("shadow", ["--epochs", "0"], "--epochs must be above 0"),
        ("shadow", ["--output", "RUN"], "is the run that is adapted"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(kind, more, said, shadow_run, lora_run, private, tmp_path, capsys):
    run = {"lora": lora_run, "none": tmp_path, "shadow": shadow_run}[kind]
    words = [word.replace("RUN", str(shadow_run)) for word in more]
    assert adapted(run, private, tmp_path / "out", *words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
