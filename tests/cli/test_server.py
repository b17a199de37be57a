import argparse
import logging
import re

import pytest

from shadowtune.cli.server import NoMessageFormatter, add_server, server_config
from shadowtune.config.serving import ServerConfig, hash_key
from shadowtune.errors import ConfigError, ShadowtuneError


def config(*options):
    parser = argparse.ArgumentParser()
    add_server(parser)
    return server_config(parser.parse_args(options))


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv("SHADOWTUNE_API_KEYS", raising=False)
    monkeypatch.delenv("SHADOWTUNE_ADMIN_KEYS", raising=False)


def test_without_options_the_settings_are_the_defaults():
    assert config() == ServerConfig()


def test_every_option_arrives():
    options = "--host ::1 --port 0 --max-rows 3 --max-queue 4 --max-tokens 5 --max-body-bytes 6 --timeout 7"
    found = config(*options.split(), "--drain-timeout", "8", "--log-prompts")
    assert found == ServerConfig(
        host="::1", port=0, max_requests=7, max_tokens=5, max_body_bytes=6, timeout=7, drain_timeout=8, log_prompts=True
    )


def test_keys_come_from_a_file_and_the_environment_and_stay_out_of_sight(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# for us\nours\n\n  theirs  # since May\n")
    monkeypatch.setenv("SHADOWTUNE_API_KEYS", "one, two,")
    found = config("--api-key-file", str(tmp_path / "keys"))
    assert found.key_hashes == tuple(hash_key(key) for key in ("ours", "theirs", "one", "two"))
    assert "ours" not in repr(found) and found.key_hashes[0] not in repr(found)


@pytest.mark.parametrize("text", ["", "# nothing\n", "two words\n", "schlüssel\n"])
def test_a_file_without_a_usable_key_is_refused_without_quoting_it(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match="API key") as refused:
        config("--api-key-file", str(tmp_path / "keys"))
    assert "two words" not in str(refused.value)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--port", "70000", "port must be at least 0 and below 65536, got 70000"),
        ("--timeout", "0", "timeout"),
        ("--timeout", "nan", "timeout"),
        ("--max-rows", "0", "--max-rows must be at least 1"),
        ("--max-queue", "-1", "--max-queue must be at least 0"),
        ("--max-tokens", "0", "max_tokens"),
        ("--max-body-bytes", "0", "max_body_bytes"),
    ],
)
def test_values_out_of_their_range_are_refused(option, value, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        config(f"{option}={value}")


def test_a_missing_package_names_the_extra(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else object())
    with pytest.raises(ShadowtuneError, match=re.escape("a server needs fastapi; pip install 'shadowtune[serve]'")):
        config()


def test_the_log_tells_where_an_exception_was_and_not_what_it_said():
    words = " ".join(("quoted", "prompt"))  # not as the source line says it, which is in the frames
    try:
        raise ValueError(words)
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, (ValueError, error, error.__traceback__))
    text = NoMessageFormatter("%(message)s").format(record)
    assert words not in text and text.startswith("failed") and text.endswith("ValueError")
    assert "test_server.py" in text


@pytest.mark.parametrize("variable", ["SHADOWTUNE_API_KEYS", "SHADOWTUNE_ADMIN_KEYS"])
@pytest.mark.parametrize("value", ["", " ", ",", " , ,"])
def test_a_variable_that_is_set_and_empty_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} is set and has no key in it; write one, or unset it"):
        config()


def test_admin_keys_hosts_and_origins_arrive(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("ours\n")
    monkeypatch.setenv("SHADOWTUNE_ADMIN_KEYS", "other")
    options = "--allowed-host models.example --cors-origin https://chat.example --max-connections 9"
    found = config(*options.split(), "--admin-key-file", str(tmp_path / "keys"))
    assert found.admin_hashes == (hash_key("ours"), hash_key("other")) and found.key_hashes == ()
    assert (found.allowed_hosts, found.allowed_origins) == (("models.example",), ("https://chat.example",))
    assert found.max_connections == 9


def test_loading_needs_an_admin_key_and_a_directory(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_server(parser)
    arguments = parser.parse_args([])
    with pytest.raises(ConfigError, match="--admin-key-file or SHADOWTUNE_ADMIN_KEYS"):
        server_config(arguments, True, str(tmp_path))
    monkeypatch.setenv("SHADOWTUNE_ADMIN_KEYS", "key")
    with pytest.raises(ConfigError, match="--allow-loading needs --adapter-root"):
        server_config(arguments, True)
    assert server_config(arguments, True, str(tmp_path)).adapter_root == str(tmp_path)
