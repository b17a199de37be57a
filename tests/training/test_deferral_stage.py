import json
from pathlib import Path

import pytest
import torch

from shadowtune.cli.main import main
from shadowtune.cli.push import model_files
from shadowtune.cli.source import detached_model, open_source
from shadowtune.core.calibration_metrics import auroc
from shadowtune.core.deferral_head import DeferralHead, token_statistics
from shadowtune.data.collate import CausalCollator
from shadowtune.errors import CheckpointError, ConfigError, DataError
from shadowtune.export.deferral import add_deferral_head, folded_head
from shadowtune.export.loading import load_model
from shadowtune.model.checkpoint import tensor_checksum
from shadowtune.model.deferral_files import SavedDeferralHead, read_deferral_head, write_deferral_head
from shadowtune.serving.edge.local import LocalModel
from shadowtune.training.deferral import (
    AnsweredExample,
    DeferralHeadStage,
    answer_examples,
    fit_deferral_head,
    fit_logistic,
)
from shadowtune.training.run import train
from shadowtune.training.stages import StageContext, own_answers, stages
from shadowtune.training.training_data import set_aside
from tests.serving.edge.models import KINDS, PROMPT, answered, ask, write
from tests.support.runs import causal_rows, run_config
from tests.support.shadows import perturbed_model
from tests.support.tokenizers import tiny_tokenizer

NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def random_head(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, width), (2,), (2, 3))
    return DeferralHead(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("shape", [{}, NARROW])
def test_answers_and_differences_are_those_of_each_network_by_itself(shape):
    model, tokenizer = perturbed_model(**shape), tiny_tokenizer()
    rows = causal_rows(5)
    found = answer_examples(model, tokenizer, rows, batch_size=2)
    assert model.mode == "attached"
    for row, each in zip(rows, found, strict=True):
        begin = next(n for n, label in enumerate(row["labels"]) if n and label != -100)
        ids = row["input_ids"][:begin]
        for state, differs in zip(each.states, each.differs, strict=True):
            prompt = torch.tensor([ids])
            with torch.no_grad():
                detached = model.set_mode("detached").encode(prompt, use_cache=False)[0].last_hidden_state[0, -1]
                token = int(model(prompt).logits[0, -1].argmax())
                other = int(model.set_mode("attached")(prompt).logits[0, -1].argmax())
            torch.testing.assert_close(state, detached, rtol=1e-4, atol=1e-5)
            assert differs == (token != other)
            ids = [*ids, token]
    assert any(bool(each.differs.any()) for each in found)


def test_an_answer_helps_where_the_attached_model_alone_is_right():
    model, tokenizer = perturbed_model(), tiny_tokenizer()
    rows = causal_rows(4)
    learned = own_answers(model, tokenizer, rows)  # labels: the attached model's own answers
    differing = [bool(each.differs.any()) for each in answer_examples(model, tokenizer, learned, 4)]
    assert [each.helps for each in answer_examples(model, tokenizer, learned, 4)] == [float(each) for each in differing]
    model.set_mode("detached")
    own = own_answers(model, tokenizer, rows)
    model.set_mode("attached")
    assert [each.helps for each in answer_examples(model, tokenizer, own, 4)] == [0.0] * 4


def test_a_head_finds_what_a_direction_of_the_states_tells():
    torch.manual_seed(1)
    examples = []
    for _ in range(150):
        states = torch.randn(3, 12)
        odds = 6 * states[:, 0]
        examples.append(
            AnsweredExample(
                states, torch.randn(3, 3), (torch.rand(3) < odds.sigmoid()).float(), float(states[:, 1].mean() > 0)
            )
        )
    saved = fit_deferral_head(examples)
    assert saved.quality["differs_auroc"] > 0.85
    assert saved.quality["helps_auroc"] > 0.95
    weight = saved.head.weight
    assert int(weight[0].abs().argmax()) == 0 and int(weight[1].abs().argmax()) == 1


def test_a_head_ranks_as_the_probability_does_where_the_states_tell_nothing():
    torch.manual_seed(2)
    examples = []
    for _ in range(120):
        statistics = torch.stack([-3 * torch.rand(4), torch.rand(4), torch.rand(4)], 1)
        unsure = float(statistics[:, 0].mean() < -1.5 + 0.1 * torch.randn(()))
        examples.append(AnsweredExample(torch.randn(4, 64), statistics, torch.zeros(4), unsure))
    saved = fit_deferral_head(examples)
    plain = auroc([-float(each.statistics[:, 0].mean()) for each in examples], [each.helps for each in examples])
    assert saved.quality["helps_auroc"] > plain - 0.05 > 0.8


def test_a_head_of_the_first_schema_reads_states_alone(tmp_path):
    path, head = write("safetensors", tmp_path), random_head(32)
    write_deferral_head(SavedDeferralHead(head), path)
    file = path / "deferral_head.json"
    described = json.loads(file.read_text())
    del described["statistics_weight"]
    first = {"weight": head.weight, "bias": head.bias}
    file.write_text(json.dumps({**described, "schema": 1, "sha256": tensor_checksum(first)}))
    read = read_deferral_head(path).head
    assert torch.equal(read.weight, head.weight) and not read.statistics_weight.any()


@pytest.mark.parametrize(("label", "positive"), [(0.0, False), (1.0, True)])
def test_one_class_gives_a_constant_that_is_never_certain(label, positive):
    fit = fit_logistic(torch.randn(30, 4), torch.full((30,), label), torch.arange(30))
    assert not fit.weight.any()
    assert float(fit.bias.sigmoid()) == pytest.approx(31 / 32 if positive else 1 / 32)
    assert fit.quality["auroc"] == 0.5


def test_one_example_is_enough_to_end_without_an_error():
    saved = fit_deferral_head(
        [AnsweredExample(torch.randn(3, 4), torch.randn(3, 3), torch.tensor([0.0, 1.0, 0.0]), 1.0)]
    )
    assert bool(saved.head.weight.isfinite().all())


def test_what_the_stage_lacks_is_one_line():
    context = StageContext(perturbed_model(), causal_rows(), lambda stage, dataset: pytest.fail("trains"))
    with pytest.raises(ConfigError, match="give a tokenizer"):
        DeferralHeadStage().run(context)


def test_a_stage_beside_any_trainer_changes_no_weight():
    model = perturbed_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    context = StageContext(model, None, lambda *_: None, causal_rows(6), CausalCollator(0), tiny_tokenizer())
    assert DeferralHeadStage().run(context)["deferral_seconds"] > 0
    assert context.deferral_head.head.width == 32
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_set_aside_examples_are_no_longer_learned():
    rows = causal_rows(10)
    kept, aside = set_aside(rows, 0.3, 1)
    assert len(kept) == 7 and len(aside) == 3
    assert sorted(row["row"] for row in kept + aside) == list(range(1, 11))
    assert [row["row"] for row in kept] == sorted(row["row"] for row in kept)
    assert set_aside(rows, 0.3, 1) == (kept, aside)
    assert set_aside(rows, 0.0, 1) == (rows, None)
    with pytest.raises(DataError, match="leaves none to learn"):
        set_aside(rows, 0.99, 1)


def test_a_run_saves_its_head_and_everything_made_of_it_has_one(tmp_path):
    config = run_config(tmp_path, deferral_fraction=0.25, max_steps=2)
    assert [stage.name for stage in stages(config)] == ["joint", "deferral_head"]
    said = []
    summary = train(config, quiet=True, report=said.append)
    assert summary.deferral_seconds > 0
    assert any("3 of the examples are set aside" in line for line in said)
    saved = read_deferral_head(Path(config.output) / "model")
    assert saved.quality["helps_count"] == 3
    out = tmp_path / "small"
    assert main(["detach", config.output, "--out", str(out)]) == 0
    opened = load_model(out)
    torch.testing.assert_close(opened.deferral_head.weight, saved.head.weight)
    torch.testing.assert_close(detached_model(open_source(config.output)).deferral_head.weight, saved.head.weight)
    described = json.loads((out / "deferral_head.json").read_text())
    assert described["quality"] == dict(saved.quality)


def test_classifiers_have_none(tmp_path):
    with pytest.raises(ConfigError, match="needs prompts with answers"):
        run_config(tmp_path, deferral_fraction=0.5, task="classification")


@pytest.mark.parametrize("kind", KINDS)
def test_every_runtime_gives_what_the_states_say(kind, tmp_path):
    path, head = write(kind, tmp_path), random_head(32)
    torch_path = path if kind == "safetensors" else write("safetensors", tmp_path)
    add_deferral_head(SavedDeferralHead(head), path)
    plain = load_model(torch_path).runtime.model
    _, answer = answered(LocalModel(load_model(path), "tiny"), ask(max_tokens=4, ignore_eos=True))
    ids = plain.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    states = plain.model(ids[:, :-1]).last_hidden_state[0, len(PROMPT) - 1 :]
    statistics = token_statistics(plain(ids[:, :-1]).logits[0, len(PROMPT) - 1 :], ids[0, len(PROMPT) :])
    logits = head.with_statistics(head.logits(states), statistics).detach()
    loose = 2e-2 if kind == "gguf" else 1e-4  # llama.cpp keeps its cache in 16 bits
    assert answer.signals.agreement == pytest.approx(float((1 - logits[:, 0].sigmoid()).prod()), abs=loose)
    assert answer.signals.deferral == pytest.approx(1 - float(logits[:, 1].mean().sigmoid()), abs=loose)


def test_a_narrow_shadow_s_head_is_folded():
    model = perturbed_model(**NARROW)
    saved = SavedDeferralHead(random_head(32))
    folded = folded_head(saved, model.shadow)
    ids = torch.tensor([PROMPT])
    s0 = model.set_mode("detached").encode(ids, use_cache=False)[0].last_hidden_state
    z = model.detached().model(ids).last_hidden_state
    torch.testing.assert_close(folded.head.logits(z), saved.head.logits(s0), rtol=1e-4, atol=1e-4)
    assert folded_head(None, model.shadow) is None


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_head_of_another_model_is_refused(kind, tmp_path):
    path = write(kind, tmp_path)
    write_deferral_head(SavedDeferralHead(random_head(32)), path)
    read_deferral_head(path)
    weights = path if path.is_file() else path / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="belongs to other weights"):
        read_deferral_head(path)


@pytest.mark.parametrize("damage", [lambda text: "{", lambda text: "{}", lambda text: text.replace("[[", "[[1.5, ", 1)])
def test_a_damaged_head_is_one_line(damage, tmp_path):
    path = write("safetensors", tmp_path)
    write_deferral_head(SavedDeferralHead(random_head(32)), path)
    file = path / "deferral_head.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(CheckpointError, match="damaged"):
        read_deferral_head(path)


def test_a_head_of_another_width_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="reads states of width 8"):
        add_deferral_head(SavedDeferralHead(random_head(8)), write("safetensors", tmp_path))


def test_a_gguf_file_is_pushed_with_its_head(tmp_path):
    path = write("gguf", tmp_path)
    assert model_files(path) == {"model.gguf": path}
    write_deferral_head(SavedDeferralHead(random_head(32)), path)
    assert model_files(path) == {"model.gguf": path, "model.deferral_head.json": tmp_path / "model.deferral_head.json"}
