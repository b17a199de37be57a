from dataclasses import replace

import pytest
import torch

from shadowtune import ShadowConfig
from shadowtune.attach import ARCHITECTURES
from shadowtune.config.training import DataConfig
from shadowtune.data.collate import CausalCollator, ClassificationCollator, PackedCollator
from shadowtune.errors import CheckpointError, ConfigError, DataError
from shadowtune.model.methods import make_trainable
from shadowtune.training.run import train
from shadowtune.training.training_data import check_data, load_tokenizer, load_training_data
from tests.support.bases import tiny_base
from tests.support.runs import rows_file, run_config
from tests.support.tasks import write_task_data
from tests.support.tokenizers import tiny_tokenizer


def test_rows_of_both_splits_are_encoded(tmp_path):
    config = run_config(tmp_path)
    config = replace(config, data=replace(config.data, validation=rows_file(tmp_path / "v.jsonl", count=3), limit=5))
    rows = load_training_data(config)
    assert (len(rows.train), len(rows.validation), rows.num_labels) == (5, 3, None)
    assert isinstance(rows.collate, CausalCollator)
    assert rows.report.examples == 5
    answer = [label for label in rows.train[4]["labels"] if label != -100]
    assert rows.tokenizer.decode(answer) == "20<|im_end|>"


@pytest.mark.parametrize(("num_labels", "expected"), [(None, 3), (5, 5)])
def test_classes_are_counted_unless_told(num_labels, expected, tmp_path):
    rows = load_training_data(run_config(tmp_path, "classification", num_labels=num_labels))
    assert rows.num_labels == expected
    assert isinstance(rows.collate, ClassificationCollator)


def test_a_task_gives_rows_validation_rows_and_the_number_of_classes(tmp_path):
    write_task_data(tmp_path / "data", "sst5")
    data = DataConfig(task="sst5", directory=str(tmp_path / "data"), limit=5, validation="task", validation_limit=2)
    rows = load_training_data(replace(run_config(tmp_path), data=data))
    assert (len(rows.train), len(rows.validation), rows.num_labels) == (5, 2, None)
    assert rows.tokenizer.decode(rows.train[0]["input_ids"]) == "Review: good film\nSentiment: positive<|im_end|>"
    config = run_config(tmp_path, "classification")
    assert load_training_data(replace(config, data=data)).num_labels == 5
    assert load_training_data(replace(config, data=data, num_labels=9)).num_labels == 9


def test_the_settings_of_the_data_arrive(tmp_path):
    config = run_config(tmp_path)
    data = DataConfig(train=config.data.train, completion_only=False, chat_template=False, template="{prompt}:")
    rows = load_training_data(replace(config, data=data))
    assert rows.train[3]["labels"] == rows.train[3]["input_ids"]
    assert rows.tokenizer.decode(rows.train[3]["input_ids"]) == "add 3 and 9: 12<|im_end|>"


def test_too_long_rows_are_an_error_if_asked(tmp_path):
    config = run_config(tmp_path)
    with pytest.raises(DataError, match=r"line 1: .* data.max_length allows 8"):
        load_training_data(replace(config, data=replace(config.data, max_length=8, overlong="error")))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == tokenizer.eos_token


def test_a_tokenizer_with_neither_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a padding nor an end token"):
        load_tokenizer(str(tmp_path))


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"cannot load a tokenizer from {tmp_path}"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_knows_no_padding_learns_it_from_the_tokenizer(tmp_path):
    rows = load_training_data(run_config(tmp_path))
    model = tiny_base(pad_token_id=None)
    check_data(rows, model)
    assert model.config.pad_token_id == rows.tokenizer.pad_token_id


@pytest.mark.parametrize("method", ["shadow", "lora", "full"])
def test_rows_are_packed_if_asked_and_the_model_keeps_documents_apart(method, tmp_path):
    rows = load_training_data(run_config(tmp_path, padding_free=True))
    assert isinstance(rows.collate, PackedCollator)
    check_data(rows, make_trainable(tiny_base(), method))
    with pytest.raises(ConfigError, match=r"^padding_free=true does not work with opt, .*padding_free=false$"):
        check_data(rows, make_trainable(tiny_base("opt"), method))


def test_packing_is_refused_for_a_shadow_whose_own_backbone_mixes_documents(tmp_path):
    rows = load_training_data(run_config(tmp_path, padding_free=True))
    tiny_base("opt").save_pretrained(tmp_path / "small")
    model = make_trainable(tiny_base(), "shadow", shadow=ShadowConfig(backbone=str(tmp_path / "small")))
    with pytest.raises(ConfigError, match="padding_free=true does not work with opt"):
        check_data(rows, model)
    check_data(replace(rows, collate=CausalCollator(0)), model)


def test_packing_is_refused_for_an_unknown_architecture(tmp_path, monkeypatch):
    rows = load_training_data(run_config(tmp_path, padding_free=True))
    monkeypatch.delitem(ARCHITECTURES, "llama")
    with pytest.raises(ConfigError, match="padding_free=true does not work with llama"):
        check_data(rows, tiny_base())


def test_rows_without_labels_are_named_in_either_split(tmp_path):
    rows = load_training_data(run_config(tmp_path))
    bad = [dict(row, labels=[-100] * len(row["labels"])) for row in rows.train[:2]]
    for broken in (replace(rows, train=bad), replace(rows, validation=bad)):
        with pytest.raises(DataError, match=r"2 of 2 rows \(1, 2\) have no labels"):
            check_data(broken, tiny_base())
    assert torch.is_tensor(rows.collate(rows.train[:2])["labels"])


def test_both_splits_are_cut_into_blocks_if_asked(tmp_path):
    config = run_config(tmp_path)
    (tmp_path / "validation.txt").write_text("one two three")
    data = replace(config.data, validation=str(tmp_path / "validation.txt"), block_size=8)
    with pytest.raises(DataError, match=r"line 1: no field 'text'.*data\.text_field"):
        load_training_data(replace(config, data=data))
    train = rows_file(tmp_path / "texts.jsonl", task="classification")
    rows = load_training_data(replace(config, data=replace(data, train=train, limit=3)))
    assert {len(row["input_ids"]) for row in rows.train[:-1]} == {8}
    assert list(rows.validation[0]["labels"]) == rows.tokenizer("one two three")["input_ids"][:8]
    assert str(rows.report).startswith("3 documents, ")
    check_data(rows, tiny_base())


def test_blocks_beyond_the_models_positions_are_named_with_the_setting(tmp_path):
    config = run_config(tmp_path)
    train = rows_file(tmp_path / "texts.jsonl", task="classification")
    rows = load_training_data(replace(config, data=DataConfig(train=train, block_size=32)))
    with pytest.raises(DataError, match=r"longer than the model's 16 positions; .*block_size"):
        check_data(rows, tiny_base(max_position_embeddings=16))


@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_a_tokenizer_beyond_the_model_is_refused_before_anything_is_trained(task, tmp_path):
    config = run_config(tmp_path, task)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{index}>" for index in range(40)])
    tokenizer.add_special_tokens({"pad_token": "<pad2>"})
    tokenizer.save_pretrained(config.model)
    with pytest.raises(DataError, match="pad token '<pad2>' has id"):
        train(config)
    assert not (tmp_path / "run" / "model").exists()
