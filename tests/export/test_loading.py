import json

import pytest

from shadowtune.data.prompt_format import FILE, PromptFormat
from shadowtune.errors import CheckpointError, DataError
from shadowtune.export.gguf_file import write_gguf
from shadowtune.export.loading import load_model, wrap_model
from tests.export.support import plain_model
from tests.serving.edge.models import FORMAT, KINDS, write
from tests.support.tokenizers import CHATML


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_keeps_tokenizer_prompt_format_ends_and_length(kind, tmp_path):
    opened = load_model(write(kind, tmp_path, end=9))
    assert opened.prompt_format == FORMAT
    assert opened.tokenizer("the sea")["input_ids"] == plain_model()[1]("the sea")["input_ids"]
    assert opened.tokenizer.chat_template == CHATML
    assert opened.tokenizer.pad_token == "<pad>"
    assert opened.ends == {2, 9}
    assert (opened.max_length, opened.vocabulary) == (128, 97)


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_may_be_less_than_the_model_has(kind, tmp_path):
    path = write(kind, tmp_path)
    assert load_model(path, 100).max_length == 100
    assert load_model(path, 1000).max_length == 128


def test_a_model_that_is_loaded_already_is_taken_as_it_is():
    model, tokenizer = plain_model()
    opened = wrap_model(model, tokenizer, FORMAT)
    assert opened.runtime.model is model
    assert (opened.ends, opened.max_length, opened.vocabulary) == ({2}, 128, 97)


def test_a_gguf_file_of_others_has_the_chat_template_alone(tmp_path):
    pytest.importorskip("xllamacpp")
    model, tokenizer = plain_model()
    write_gguf(model, tokenizer, tmp_path / "a.gguf", "f32")
    assert load_model(tmp_path / "a.gguf").prompt_format == PromptFormat()


def test_what_is_no_detached_model_is_named(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"garbage" * 100)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for name, text in (("shadow", json.dumps({"model_type": "shadow"})), ("damaged", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name, said in (
        ("bad.gguf", "is no GGUF file"),
        ("none", "holds no detached model"),
        ("empty", "holds no detached model"),
        ("run", "it is a run: shadowtune detach"),
        ("shadow", "not yet detached"),
        ("damaged", "cannot read"),
        ("list", "cannot read"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_damaged_onnx_file_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    path = write("onnx", tmp_path)
    (path / "model.onnx").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"onnxruntime cannot read .*model\.onnx"):
        load_model(path)


def test_a_damaged_prompt_format_is_named(tmp_path):
    path = write("safetensors", tmp_path)
    (path / FILE).write_text("{")
    with pytest.raises(DataError, match=FILE):
        load_model(path)
