import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from shadowtune import ShadowConfig, ShadowForCausalLM, ShadowForSequenceClassification
from shadowtune.errors import ShadowtuneError
from shadowtune.export import detaching
from shadowtune.export.card import Card, measured_accuracy
from shadowtune.export.detaching import built_in_prompts, write_detached
from shadowtune.model.checkpoint import read_tensors
from tests.export.support import NARROW
from tests.support.bases import tiny_base, tiny_classifier
from tests.support.shadows import perturb, perturbed_model
from tests.support.tokenizers import tiny_tokenizer

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
ALONE = (
    "import sys, json, torch\n"
    "import transformers\n"
    "model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1]).eval()\n"
    "tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
    "assert tokenizer('the sea')['input_ids']\n"
    "logits = model(torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist()\n"
    "assert 'shadowtune' not in sys.modules\n"
    "print(json.dumps(logits))"
)


@pytest.mark.parametrize("sizes", [{}, NARROW], ids=["same_width", "other_width"])
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_it_loads_without_this_library_and_computes_what_detached_mode_does(tmp_path, task, sizes):
    if task == "causal_lm":
        model, name = perturbed_model(**sizes), "AutoModelForCausalLM"
    else:
        classifier = ShadowForSequenceClassification.from_base(tiny_classifier(), ShadowConfig(**sizes))
        model, name = perturb(classifier).eval(), "AutoModelForSequenceClassification"
    write_detached(model, tiny_tokenizer(), tmp_path / "out", Card("tiny", task), PROMPTS)
    assert model.mode == "attached"
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with torch.no_grad():
        expected = model.set_mode("detached")(torch.tensor([PROMPTS[0]])).logits.flatten()
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("tied", "sizes", "stored_once"), [(True, {}, True), (True, NARROW, False), (False, {}, False)]
)
def test_a_tied_head_is_stored_once_where_it_still_is_the_embedding(tmp_path, tied, sizes, stored_once):
    base = tiny_base(tie_word_embeddings=tied)
    model = perturb(ShadowForCausalLM.from_base(base, ShadowConfig(**sizes))).eval()
    loaded = write_detached(model, tiny_tokenizer(), tmp_path, Card("tiny"), PROMPTS)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" not in file.keys()) == stored_once  # noqa: SIM118 - not a mapping
    assert loaded.config.tie_word_embeddings == stored_once


def test_the_directory_is_complete_and_its_weights_carry_a_checksum(tmp_path):
    card = Card("tiny", training={"epochs": "2"}, measured={"accuracy, detached": "0.5 | on 4 rows"})
    write_detached(perturbed_model(), tiny_tokenizer(), tmp_path / "small", card, PROMPTS)
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert read_tensors(str(tmp_path / "small"))
    text = (tmp_path / "small" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained('small')" in text
    assert "| epochs | 2 |" in text
    assert "0.5 \\| on 4 rows" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_written_in_the_dtype_asked_for(tmp_path, dtype):
    loaded = write_detached(perturbed_model(), tiny_tokenizer(), tmp_path, Card("tiny"), PROMPTS, dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert {tensor.dtype for tensor in read_tensors(str(tmp_path)).values()} == {dtype}


def test_files_that_compute_something_else_are_not_kept(tmp_path, monkeypatch):
    def damaged(model, directory):
        with torch.no_grad():
            model.get_input_embeddings().weight[5] += 0.01
        whole(model, directory)
        with torch.no_grad():
            model.get_input_embeddings().weight[5] -= 0.01

    whole = detaching.write_plain
    monkeypatch.setattr(detaching, "write_plain", damaged)
    with pytest.raises(ShadowtuneError, match=r"differ by .* in the logits of prompt 1"):
        write_detached(perturbed_model(), tiny_tokenizer(), tmp_path / "out", Card("tiny"), PROMPTS)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ShadowtuneError, match="exists already"):
        write_detached(perturbed_model(), tiny_tokenizer(), tmp_path, Card("tiny"), PROMPTS)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_built_in_prompts_are_of_text_that_the_tokenizer_knows():
    assert all(prompts for prompts in built_in_prompts(tiny_tokenizer()))


def test_a_report_becomes_a_row_of_the_card_and_a_damaged_one_none():
    row = {"rows": 300, "accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8}
    found = measured_accuracy("detached", json.dumps({"rows": [row]}))
    assert found == {"accuracy, detached": "0.750 on 300 rows (95 % interval 0.700 to 0.800)"}
    assert measured_accuracy("detached", "{") == {}
