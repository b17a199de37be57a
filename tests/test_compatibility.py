"""Versions: the tested range is pyproject's, and both names of the cache are taken."""

import warnings
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicCache

from shadowtune import ShadowConfig, ShadowForCausalLM
from shadowtune.compatibility import CACHE, CACHE_NAMES, cache_of, commit_of, pop_cache
from shadowtune.model.methods import load_base
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


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Lay out the Hub's cache: commit -> a snapshot of the tiny base, with the refs that name it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--tester--tiny"
    (repository / "refs").mkdir(parents=True)

    def add(commit: str, *refs: str, seed: int = 0) -> None:
        tiny_base(seed=seed).save_pretrained(repository / "snapshots" / commit)
        for ref in refs:
            (repository / "refs" / ref).write_text(commit)

    return add


def test_a_shadow_names_the_commit_of_its_base_and_loads_that_one(hub, tmp_path):
    hub(FIRST, "main")
    base = AutoModelForCausalLM.from_pretrained("tester/tiny")
    model = ShadowForCausalLM.from_base(base, ShadowConfig())
    assert (model.config.base_name_or_path, model.config.base_revision) == ("tester/tiny", FIRST)
    model.save_pretrained(tmp_path / "adapter")
    hub(SECOND, "main", seed=1)
    loaded = ShadowForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.base.lm_head.weight, base.lm_head.weight)
    assert (commit_of(loaded.base.config), loaded.config.base_revision) == (FIRST, FIRST)


def test_of_several_commits_the_one_that_was_asked_for_is_kept(hub):
    hub(FIRST, "v1")
    hub(SECOND, "main")
    foreign = AutoModelForCausalLM.from_pretrained("tester/tiny", revision="v1").config
    if CACHE == "cache":
        with pytest.warns(UserWarning, match="2 revisions of tester/tiny are in the cache.*no base_revision is saved"):
            assert commit_of(foreign) is None
    else:
        assert commit_of(foreign) == FIRST
    assert commit_of(load_base("tester/tiny", revision="v1").config) == FIRST
    assert commit_of(load_base("tester/tiny").config) == SECOND


def test_a_local_or_new_base_has_no_commit(hub, tmp_path):
    hub(FIRST, "main")
    assert commit_of(tiny_base().config) is None
    tiny_base().save_pretrained(tmp_path / "base")
    assert commit_of(load_base(str(tmp_path / "base")).config) is None
