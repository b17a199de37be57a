"""No model directory runs code of its own, whatever somebody would answer on standard input."""

import ast
import builtins
import json
from pathlib import Path

import pytest

from shadowtune.errors import ShadowtuneError
from shadowtune.export.exporting import read_tokenizer
from shadowtune.export.loading import load_model
from shadowtune.model.loading import _load_auto
from shadowtune.model.methods import load_base, load_base_config

SOURCE = Path(__file__).parent.parent / "src" / "shadowtune"
CODE = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("ran")
Path({mark!r}).write_text("ran")
from transformers import PretrainedConfig
class Config(PretrainedConfig):
    model_type = "evil"
Model = Tokenizer = Config
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A directory whose config names code, and somebody who agrees to everything."""
    folder = tmp_path / "evil"
    folder.mkdir()
    mark = tmp_path / "ran"
    autos = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModel": "code.Model"}
    config = {"model_type": "evil", "architectures": ["Model"], "auto_map": autos}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run code"))
    return folder, mark


def test_every_way_to_open_a_directory_refuses_its_code(evil):
    from transformers import AutoModelForCausalLM

    folder, mark = evil
    ways = [
        lambda: load_model(folder),
        lambda: load_base(str(folder)),
        lambda: load_base_config(str(folder)),
        lambda: read_tokenizer(str(folder)),
        lambda: _load_auto(AutoModelForCausalLM, str(folder)),
    ]
    for way in ways:
        with pytest.raises(ShadowtuneError):
            way()
    assert not mark.exists()


def calls_without_refusal(tree):
    """Lines that load by an Auto class of transformers and leave out ``trust_remote_code``."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value)
        if node.func.attr != "from_pretrained" or not ("Auto" in owner or "AUTO" in owner or owner == "auto"):
            continue
        told = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg in ("trust_remote_code", None)]
        if not any(text == "False" or "trust_remote_code" in text for text in told):
            yield node.lineno


def test_every_call_says_so():
    for path in SOURCE.rglob("*.py"):
        found = list(calls_without_refusal(ast.parse(path.read_text())))
        assert not found, f"{path}: lines {found} load without trust_remote_code=False"
    assert list(calls_without_refusal(ast.parse("AutoConfig.from_pretrained(path)")))
