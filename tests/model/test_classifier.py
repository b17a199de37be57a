import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from shadowtune import ShadowConfig, ShadowForSequenceClassification
from shadowtune.errors import ConfigError
from shadowtune.model.classifier import last_token
from tests.support.bases import CONFIGS, tiny_base, tiny_classifier, tiny_config
from tests.support.shadows import perturb, tokens

KNOWN = [
    kind
    for kind in CONFIGS
    if type(AutoConfig.for_model(kind)) in AutoModelForSequenceClassification._model_mapping  # some have no classifier
]


def made(kind="llama", base=None, **settings):
    torch.manual_seed(0)
    config = ShadowConfig(**{"rank": 4, "update_width": 3, "alpha": 0.7, "shadow_loss_weight": 0.3, **settings})
    model = ShadowForSequenceClassification.from_base(tiny_classifier(kind) if base is None else base, config)
    perturb(model)
    with torch.no_grad():
        model.shadow_score.weight.mul_(-0.5)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(autouse=True)
def restored(model):
    yield
    model.eval().set_mode("attached")


@pytest.mark.parametrize("kind", KNOWN)
@torch.no_grad()
def test_at_the_start_attached_equals_base_bit_for_bit_and_later_all_modes_differ(kind):
    base, ids = tiny_classifier(kind), tokens(3, 9)
    plain = base(ids).logits
    model = ShadowForSequenceClassification.from_base(base, ShadowConfig(rank=4, update_width=3)).eval()
    assert torch.equal(model(ids).logits, plain)
    perturb(model)
    logits = [model.set_mode(mode)(ids).logits for mode in ("attached", "detached", "base")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (logits[one] - logits[other]).abs().max() > 1e-2
    assert logits[0].shape == (3, 3)


def test_both_heads_and_the_shadow_are_trained_and_nothing_else(model):
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = {"score.weight", "shadow_score.weight"}
    assert names == heads | {f"shadow.{name}" for name, _ in model.shadow.named_parameters()}
    ids = tokens(3, 9)
    model.train()(ids, labels=torch.tensor([0, 2, 1])).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    model.zero_grad()


def test_both_heads_start_as_the_bases_and_leave_it_alone():
    base = tiny_classifier()
    before = base.score.weight.clone()
    model = ShadowForSequenceClassification.from_base(base)
    for head in (model.score, model.shadow_score):
        assert torch.equal(head.weight, before)
        head.weight.data.zero_()
    assert torch.equal(base.score.weight, before)


def test_classifiers_share_a_base_and_keep_their_own_heads():
    base, ids = tiny_classifier(), tokens(3, 9)
    one = made(base=base)
    before = one(ids).logits
    two = made(base=base)
    perturb(two, seed=5)
    assert torch.equal(one(ids).logits, before)
    assert not torch.equal(two(ids).logits, before)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem_type"),
    [
        (3, torch.tensor([0, 2, 1]), None),
        (1, torch.tensor([0.5, -1.0, 2.0]), None),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]]), None),
        (3, torch.tensor([[1.0, 0, 1], [0, 5, 0], [1, 1, 1]]), "regression"),
    ],
    ids=["one_class", "regression", "several_classes", "several_numbers"],
)
def test_losses_equal_the_bases_own_and_add_up(num_labels, labels, problem_type):
    base = tiny_classifier(num_labels=num_labels, problem_type=problem_type)
    ids = tokens(3, 9)
    model = ShadowForSequenceClassification.from_base(base, ShadowConfig(shadow_loss_weight=0.3)).eval()
    output = model(ids, labels=labels)
    torch.testing.assert_close(output.base_loss, base(ids, labels=labels).loss)
    torch.testing.assert_close(output.loss, output.base_loss + 0.3 * output.shadow_loss)
    detached = model.set_mode("detached")(ids, labels=labels)
    torch.testing.assert_close(detached.loss, output.shadow_loss)
    assert detached.base_loss is None
    torch.testing.assert_close(model.set_mode("base")(ids, labels=labels).loss, output.base_loss)
    model.set_mode("attached")
    rows = [(ids[i : i + 1], labels[i : i + 1]) for i in range(3)]
    parts = [model(row, labels=label, num_items_in_batch=labels.numel()).loss for row, label in rows]
    torch.testing.assert_close(sum(parts), output.loss)


ROWS = [tokens(1, length, seed=length)[0] for length in (3, 11, 7)]


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
@pytest.mark.parametrize(("side", "masked"), [("left", True), ("right", True), ("right", False)])
@torch.no_grad()
def test_padding_on_either_side_leaves_the_classes_alone(model, side, masked, mode):
    ids, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for index, row in enumerate(ROWS):
        place = slice(13 - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if masked else {}
    together = model.set_mode(mode)(ids, **inputs).logits
    alone = torch.cat([model(row[None]).logits for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_last_token():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert last_token(mask, None, None, 4).tolist() == [3, 1, 3, 0, 1]
    assert last_token(torch.ones(2, 9), None, None, 4).tolist() == [3, 3]  # a mask over past tokens too
    assert last_token(None, torch.tensor([[5, 6, 0], [0, 7, 8], [5, 0, 6]]), 0, 3).tolist() == [1, 2, 2]
    assert last_token(None, torch.tensor([[5, 0]]), None, 2) == -1
    assert last_token(None, None, 0, 2) == -1


def test_a_base_without_a_classification_head_is_an_error():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no linear head 'score'"):
        ShadowForSequenceClassification.from_base(tiny_base())


@torch.no_grad()
def test_other_forms_of_input(model):
    ids = tokens(3, 9)
    expected = model(ids).logits
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected, rtol=0, atol=1e-6)
    assert torch.equal(model(ids, return_dict=False)[0], expected)


def test_settings_of_the_task_are_the_bases():
    base = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=2, id2label={0: "no", 1: "yes"}))
    model = ShadowForSequenceClassification.from_base(base)
    assert (model.config.id2label, model.config.num_labels, model.num_labels) == ({0: "no", 1: "yes"}, 2, 2)


HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("base_dtype", "dtype"), [(HALF, WHOLE), (WHOLE, HALF), (HALF, HALF)], ids=str)
def test_precisions_mix(base_dtype, dtype):
    base = tiny_classifier().to(base_dtype)
    model = ShadowForSequenceClassification.from_base(base, ShadowConfig(rank=4), dtype=dtype)
    exact = ShadowForSequenceClassification.from_base(tiny_classifier(), ShadowConfig(rank=4))
    exact.load_state_dict(model.state_dict())
    ids, labels = tokens(3, 9), torch.tensor([0, 2, 1])
    for mode in ("attached", "detached", "base"):
        found, expected = (m.eval().set_mode(mode)(ids).logits.float() for m in (model, exact))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    loss = model.set_mode("attached").train()(ids, labels=labels).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert {head.weight.dtype for head in (model.score, model.shadow_score)} == {dtype}
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
