"""Versions: the tested range is pyproject's, and both names of the cache are taken."""

import warnings
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import torch
from packaging.requirements import Requirement
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicCache

from shadowtune.compatibility import CACHE, CACHE_NAMES, cache_of, pop_cache
from shadowtune.versions import UntestedVersionWarning, untested_versions, warn_of_untested_versions
from tests.support.bases import tiny_base
from tests.support.shadows import perturbed_model

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
CONSTRAINTS = PYPROJECT.parent / "constraints.txt"


@pytest.fixture
def versions(monkeypatch):
    """Pretend that other versions are installed: name -> version."""
    pretended: dict[str, str] = {}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: pretended.get(name) or real(name))
    untested_versions.cache_clear()
    yield pretended
    untested_versions.cache_clear()


def requirement(name: str) -> Requirement:
    stated = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    return next(each for each in map(Requirement, stated) if each.name == name)


def test_the_installed_versions_are_in_the_tested_range(versions):
    assert untested_versions() == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_versions()


def test_transformers_has_an_upper_bound_and_the_constraints_are_its_newest_minor_release():
    specifier = requirement("transformers").specifier
    pinned = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("transformers=="))
    major, minor = pinned.removeprefix("transformers==").split(".")[:2]
    assert specifier.contains(f"{major}.{minor}.0")
    assert not specifier.contains(f"{major}.{int(minor) + 1}.0")


@pytest.mark.parametrize("version", ["5.22.0", "5.99.0", "6.0.0.dev0"])
def test_another_version_is_named_with_the_tested_range(versions, version):
    versions["transformers"] = version
    with pytest.warns(UntestedVersionWarning, match=f"transformers {version}, tested.*5.23"):
        warn_of_untested_versions()


def test_a_copy_that_was_not_installed_says_nothing(versions, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert untested_versions() == {}


def test_the_name_of_the_cache_is_that_of_the_installed_transformers():
    output = tiny_base()(torch.tensor([[3, 4]]), use_cache=True)
    assert CACHE in output.keys()  # noqa: SIM118 - `in output` would accept the other name as well
    assert cache_of(output).get_seq_length() == 2
    release = tuple(map(int, transformers_version.split(".")[:2]))
    assert ("cache" if release >= (5, 24) else "past_key_values") == CACHE


@pytest.mark.parametrize("mode", ["attached", "detached", "base"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_model_takes_its_cache_by_either_name(name, mode):
    model = perturbed_model("llama").set_mode(mode)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    cache = DynamicCache(config=model.config if mode != "base" else model.base.config)
    with torch.no_grad():
        model(ids[:, :3], use_cache=True, **{name: cache})
        rest = model(ids[:, 3:], use_cache=True, **{name: cache})
        assert torch.allclose(rest.logits, model(ids).logits[:, 3:], atol=1e-5)
    assert cache_of(rest) is cache
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_way_through_both_networks_takes_either_name(name):
    model = perturbed_model("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        output, _ = model.encode(torch.tensor([[5, 6, 7]]), use_cache=True, **{name: cache})
        traced = model.trunk(torch.tensor([[5, 6, 7]]))
    assert cache.get_seq_length() == 3
    assert torch.equal(output.last_hidden_state, traced.last_hidden_state)


def test_two_different_caches_are_an_error():
    with pytest.raises(TypeError, match="two names of one argument"):
        pop_cache({"cache": DynamicCache(), "past_key_values": DynamicCache()})
    model = perturbed_model("llama")
    with pytest.raises(TypeError, match="two names of one argument"):
        model(torch.tensor([[5]]), cache=DynamicCache(), past_key_values=DynamicCache())
