import json
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from shadowtune import ShadowForCausalLM
from shadowtune.cli.main import main
from shadowtune.cli.push import published_card
from shadowtune.errors import CheckpointError
from shadowtune.model import hub


class FakeHub:
    """Records what is uploaded; ``fails`` is raised by every call, ``public`` are repositories that exist."""

    def __init__(self):
        self.made, self.commits, self.fails, self.public = [], [], None, set()

    def __call__(self):
        return self

    def create_repo(self, repository, private, exist_ok):
        if self.fails is not None:
            raise self.fails
        self.made.append((repository, private, exist_ok))
        return f"https://hub.test/{repository}"

    def model_info(self, repository):
        return type("Info", (), {"private": repository not in self.public})

    def create_commit(self, repository, operations, commit_message):
        contents = {each.path_in_repo: each.path_or_fileobj for each in operations}
        self.commits.append((repository, contents, commit_message))


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", fake)
    return fake


def test_a_run_is_uploaded_private_with_its_card(shadow_run, base, fake, tmp_path, capsys):
    result = tmp_path / "r.json"
    assert main(["push", str(shadow_run), "me/my-shadow", "--base", "org/base", "--json", str(result)]) == 0
    assert fake.made == [("me/my-shadow", True, True)]
    ((repository, files, message),) = fake.commits
    assert (repository, message) == ("me/my-shadow", "Upload by shadowtune")
    assert {"config.json", "model.safetensors", "tokenizer.json", "prompt_format.json", "README.md"} <= files.keys()
    assert not any(name.startswith((".", "checkpoints")) or name == "config.yaml" for name in files)
    card = files["README.md"].decode()
    assert "from_pretrained('me/my-shadow')" in card and "from_pretrained('model')" not in card
    assert 'base_model: "org/base"' in card and str(base) not in card
    config = json.loads(files["config.json"])
    assert config["base_name_or_path"] == "org/base" and str(base) not in files["config.json"].decode()
    stored = json.loads((shadow_run / "model" / "config.json").read_text())
    assert stored["base_name_or_path"] == str(base) and stored.keys() == config.keys()
    shown = capsys.readouterr()
    assert shown.out == "https://hub.test/me/my-shadow\n"
    assert "(private)" in shown.err and "a path of this machine" not in shown.err
    (row,) = json.loads(result.read_text())["rows"]
    assert row["address"] == "https://hub.test/me/my-shadow" and not row["public"]
    assert row["bytes"] > (shadow_run / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("run", ["shadow_run", "lora_run"])
def test_a_base_of_this_machine_is_not_published(run, base, fake, request, tmp_path, capsys):
    path = request.getfixturevalue(run)
    assert main(["push", str(path), "me/x"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"names the base {base}, a path of this machine" in line and "pass --base ORG/NAME" in line
    assert main(["push", str(path), "me/x", "--base", "a b"]) == 2
    assert "--base is a Hub id, ORG/NAME, or none, got 'a b'" in capsys.readouterr().err
    assert fake.commits == []
    assert main(["push", str(path), "me/x", "--base", "none"]) == 0
    ((_, files, _),) = fake.commits
    assert "base_model:" not in files["README.md"].decode()
    file, key, unnamed = {
        "shadow_run": ("config.json", "base_name_or_path", ""),
        "lora_run": ("adapter_config.json", "base_model_name_or_path", None),
    }[run]
    assert json.loads(files[file])[key] == unnamed
    for name in files.keys() & {"config.json", "adapter_config.json", "README.md"}:
        content = files[name]
        assert str(base) not in (content.decode() if isinstance(content, bytes) else Path(content).read_text()), name


def test_what_was_uploaded_loads_its_base_from_the_hub(shadow_run, base, fake, tmp_path, monkeypatch):
    assert main(["push", str(shadow_run), "me/x", "--base", "org/base"]) == 0
    ((_, files, _),) = fake.commits
    for name, content in files.items():
        content = content if isinstance(content, bytes) else Path(content).read_bytes()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot load the base org/base"):  # there is no connection
        ShadowForCausalLM.from_pretrained(tmp_path)
    ours = ShadowForCausalLM.from_pretrained(tmp_path, base=str(base))
    ids = torch.tensor([[1, 5, 7]])
    assert torch.equal(ours(ids).logits, ShadowForCausalLM.from_pretrained(shadow_run / "model")(ids).logits)


def test_other_models_are_uploaded_public_if_asked(shadow_run, lora_run, fake, tmp_path):
    small = tmp_path / "small"
    assert main(["detach", str(shadow_run), "--out", str(small)]) == 0
    for path in (small, lora_run):
        assert main(["push", str(path), "me/x", "--public", "--message", "first", "--base", "org/base"]) == 0
    assert [private for _, private, _ in fake.made] == [False, False]
    (_, detached, _), (_, adapter, message) = fake.commits
    assert "AutoModelForCausalLM.from_pretrained('me/x')" in detached["README.md"].decode()
    assert "adapter_model.safetensors" in adapter and message == "first"
    assert "PeftModel.from_pretrained(base, 'me/x')" in adapter["README.md"].decode()
    assert json.loads(adapter["adapter_config.json"])["base_model_name_or_path"] == "org/base"


def test_a_gguf_file_brings_its_card(shadow_run, fake, tmp_path):
    pytest.importorskip("xllamacpp")
    file = tmp_path / "small.gguf"
    command = ["export", str(shadow_run), "--to", "gguf", "--out", str(file), "--max-new-tokens", "2", "--limit", "1"]
    assert main(command) == 0
    assert main(["push", str(file), "me/gguf"]) == 0
    ((_, files, _),) = fake.commits
    assert files["small.gguf"] == str(file)
    assert "# Detached shadow, GGUF" in files["README.md"].decode()


def test_the_card_keeps_a_base_of_the_hub():
    card = "---\nbase_model: \"org/base\"\nbase_model_relation: adapter\n---\nAutoTokenizer.from_pretrained('model')\n"
    assert published_card(card, "me/x") == card.replace("'model'", "'me/x'")


def test_the_card_of_a_short_name_keeps_its_example():
    card = '---\nbase_model: "smollm2-135m"\n---\nbase = f(shadowtune.models.resolve("smollm2-135m"))\n'
    assert published_card(card, "me/x") == '---\n---\nbase = f(shadowtune.models.resolve("smollm2-135m"))\n'


def response(status):
    return httpx2.Response(status, request=httpx2.Request("POST", "https://hub.test"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HfHubHTTPError("401\nlong\ntext", response=response(401)), "log in with hf auth login, or set HF_TOKEN"),
        (HfHubHTTPError("403", response=response(403)), "the token may not do that"),
        (HfHubHTTPError("404", response=response(404)), "there is no such repository or organization"),
        (HfHubHTTPError("x", response=response(500), server_message="full"), "full"),
        (LocalTokenNotFoundError("x\ny"), "log in with hf auth login"),
        (OfflineModeIsEnabled("x\ny"), "allows no connection"),
        (httpx2.ConnectError("no route\nto host"), "no route to host"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, said, shadow_run, fake, capsys):
    fake.fails = error
    assert main(["push", str(shadow_run), "me/x", "--base", "org/base"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("shadowtune: error: cannot push to me/x: ") and said in line


def test_a_public_repository_is_not_written_by_mistake(shadow_run, fake, capsys):
    fake.public.add("me/x")
    assert main(["push", str(shadow_run), "me/x", "--base", "org/base"]) == 2
    assert "me/x exists already and is public; pass --public" in capsys.readouterr().err
    assert fake.commits == []


def test_what_is_no_model_or_no_name_is_one_line(shadow_run, fake, tmp_path, capsys):
    for name in ("x", "a/b/c", "a b/c", "/x"):
        assert main(["push", str(shadow_run), name]) == 2
        assert "a repository is ORG/NAME" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("x")
    for path, said in (
        (tmp_path, "holds no model"),
        (tmp_path / "no", "name a run"),
        (tmp_path / "run", "has not finished"),
    ):
        assert main(["push", str(path), "me/x"]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["push", str(tmp_path), "me/x"]) == 2
    assert "has no card" in capsys.readouterr().err
    assert fake.made == []
