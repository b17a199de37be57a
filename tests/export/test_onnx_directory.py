"""What other programs find in a directory with ``model.onnx``: names that they can work with, and no warnings."""

import json
import re

import numpy as np
import pytest

from shadowtune.export.exporting import export
from shadowtune.export.onnx_file import FILE, FIRST_LOGITS, QUANTIZATIONS
from shadowtune.export.runtimes import OnnxModel
from tests.export.support import NARROW, plain_model

onnxruntime = pytest.importorskip("onnxruntime")
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / request.param
    export(plain_model(request.param, **NARROW), "onnx", "f32", path, [PROMPT], 4)
    return path


def test_axes_of_outputs_are_sums_of_axes_of_inputs(directory):
    """So optimum reserves memory for outputs: it evaluates their names with the sizes of the inputs' axes."""
    session = OnnxModel(directory).session
    known = {axis for entry in session.get_inputs() for axis in entry.shape if isinstance(axis, str)}
    for output in session.get_outputs():
        for axis in output.shape:
            parts = axis.split(" + ") if isinstance(axis, str) else []
            assert all(part in known and re.fullmatch(r"\w+", part) for part in parts), output


def test_genai_config_names_what_the_graph_has(directory):
    model = json.loads((directory / "genai_config.json").read_text())["model"]
    decoder, config = model["decoder"], json.loads((directory / "config.json").read_text())
    session = OnnxModel(directory).session
    assert decoder["filename"] == FILE
    for side, entries in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        layers = range(decoder["num_hidden_layers"])
        named = {name % layer if "%d" in name else name for name in decoder[side].values() for layer in layers}
        assert named == {entry.name for entry in entries}
    past = next(entry for entry in session.get_inputs() if entry.name == "past_key_values.0.key")
    assert past.shape[1::2] == [decoder["num_key_value_heads"], decoder["head_size"]]
    assert (model["type"], model["vocab_size"], model["context_length"]) == (config["model_type"], 97, 128)
    assert (model["eos_token_id"], model["pad_token_id"], model["bos_token_id"]) == ([2], 0, 1)


def test_genai_config_has_every_token_that_ends_an_answer(tmp_path):
    model, tokenizer = plain_model()
    model.generation_config.eos_token_id = [9, 4]
    export((model, tokenizer), "onnx", "f32", tmp_path / "out", [PROMPT], 4)
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, 4, 9]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_file_opens_without_a_warning(quantization, tmp_path, capfd):
    export(plain_model(), "onnx", quantization, tmp_path / "out", [PROMPT], 4)
    capfd.readouterr()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / FILE), options, providers=["CPUExecutionProvider"])
    run(session, PROMPT)
    assert capfd.readouterr().err == ""


def run(session, ids, mark=None):
    """The logits of a prompt; ``mark`` is the position, counted from 0, from which on they are asked for."""
    mask = np.ones((1, len(ids)), np.int64)
    if mark is not None:
        mask[0, mark] = FIRST_LOGITS
    feed = {"input_ids": np.asarray([ids]), "attention_mask": mask, "position_ids": np.arange(len(ids))[None]}
    past = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
    feed |= {entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in past}
    return session.run(["logits"], feed)[0]


@pytest.mark.parametrize("mark", [0, 2, 4])
def test_a_mark_in_the_mask_leaves_out_the_logits_before_it_and_changes_none(mark, directory):
    session = OnnxModel(directory).session
    every, some = run(session, PROMPT), run(session, PROMPT, mark)
    assert every.shape == (1, 5, 97)
    assert some.shape == (1, 5 - mark, 97)
    np.testing.assert_allclose(some, every[:, mark:], rtol=0, atol=1e-5)
