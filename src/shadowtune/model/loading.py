"""From a model to a directory and back: the base it names, the check that it is that base, the shadow's tensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import find_file, read_tensors, trained_tensors, write_tensors, writing_into
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.fingerprint import base_fingerprint
from shadowtune.model.formats.adapter import PeerAdapter
from shadowtune.model.formats.opening import open_peer
from shadowtune.models import NAMED, resolve

HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
AUTO_KEYWORDS = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision", "use_safetensors")


def lasting_name(name: str) -> str:
    """Return the name of a base as it is saved: a directory by its absolute path, which holds from everywhere."""
    return os.path.abspath(name) if name and name not in NAMED and os.path.isdir(name) else name


def save_pair(model: Any, directory: Path, state_dict: Mapping[str, Tensor] | None, max_shard_size: str | int) -> None:
    """Do the work of ``save_pretrained``; the trained tensors come from ``state_dict`` if it is given.

    Raises:
        CheckpointError: if the directory cannot be written.
    """
    if state_dict is None:
        tensors = trained_tensors(model.trained_modules())
    else:
        prefixes = tuple(f"{name}." for name in model.trained_modules())
        tensors = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefixes)}
    model.config.architectures = [type(model).__name__]
    with writing_into(directory) as staging:
        write_tensors(staging, tensors, max_shard_size)
        model.config.to_json_file(staging / CONFIG_NAME, use_diff=False)
        if model.can_generate():
            model.generation_config.to_json_file(staging / GENERATION_CONFIG_NAME)


def read_config(path_or_id: str, **hub: Any) -> ShadowModelConfig:
    """Read ``config.json``; raises CheckpointError if it is missing, damaged or not a shadow's."""
    try:
        config = ShadowModelConfig.from_pretrained(path_or_id, **hub)
        kind = ShadowModelConfig.get_config_dict(path_or_id, **hub)[0].get("model_type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot read config.json of {path_or_id}: {reason}") from None
    if kind != "shadow":
        raise CheckpointError(f"{path_or_id} is not a shadow: its config.json has model_type {kind!r}, not 'shadow'")
    if config.base_config is None or config.backbone_config is None:
        missing = "base_config" if config.base_config is None else "backbone_config"
        raise CheckpointError(f"config.json of {path_or_id} is damaged: it has no {missing}")
    return config


def load_base(auto: Any, config: ShadowModelConfig, base: PreTrainedModel | str | None, **kwargs: Any) -> Any:
    """Load the base that a shadow's config names, or the one given in its place.

    Raises:
        CheckpointError: if the config names none, or it cannot be loaded.
    """
    if isinstance(base, PreTrainedModel):
        return base
    name = base or config.base_name_or_path
    if not name:
        raise CheckpointError("config.json names no base model; pass base=..., a model, directory or Hub id")
    if base is None and config.base_revision is not None:
        kwargs.setdefault("revision", config.base_revision)
    assert config.base_config is not None
    if auto.__name__ == "AutoModelForSequenceClassification":
        kwargs.setdefault("num_labels", config.base_config.num_labels)
    return _load_auto(auto, name, **kwargs)


def _load_auto(auto: Any, name: str, **kwargs: Any) -> Any:
    try:
        return auto.from_pretrained(resolve(name), **{"trust_remote_code": False, **kwargs})
    except (OSError, RuntimeError, ValueError) as error:  # weights that do not fit, or code of its own
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot load the base {name}: {reason}; pass base=... if it has moved") from None


def check_base(config: ShadowModelConfig, base: PreTrainedModel, check_weights: bool = True) -> None:
    """Raise CheckpointError unless ``base`` has the shape and, by its fingerprint, the weights of the shadow's own."""
    assert config.base_config is not None
    expected, found = config.base_config.get_text_config(decoder=True), base.config.get_text_config(decoder=True)
    name = base.config.name_or_path or base.config.model_type
    for key, word in (("hidden_size", "width"), ("num_hidden_layers", "blocks"), ("vocab_size", "tokens")):
        want, have = vars(expected).get(key), vars(found).get(key)
        if want != have:
            raise CheckpointError(
                f"wrong base: the shadow was made for {config.base_name_or_path or expected.model_type} with {key} "
                f"{want}, but {name} has {key} {have} ({word})"
            )
    fingerprint = base_fingerprint(base) if check_weights and config.base_fingerprint else None
    if fingerprint is not None and fingerprint != config.base_fingerprint:
        raise CheckpointError(
            f"wrong base: {name} has the right shape but other weights (fingerprint {fingerprint}) than "
            f"{config.base_name_or_path or 'the base'} that the shadow was trained beside ({config.base_fingerprint}); "
            "pass check_base_weights=False to use it all the same"
        )


def load_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy saved tensors into modules, keys being ``<module name>.<tensor name>``. Every key must match.

    Raises:
        CheckpointError: naming ``source`` and the missing, unexpected or wrongly shaped keys.
    """
    expected = {f"{prefix}.{name}": t for prefix, module in modules.items() for name, t in module.state_dict().items()}
    faults = [f"missing {_few(sorted(expected.keys() - tensors.keys()))}"] if expected.keys() - tensors.keys() else []
    if tensors.keys() - expected.keys():
        faults.append(f"unexpected {_few(sorted(tensors.keys() - expected.keys()))}")
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            faults.append(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
    if faults:
        raise CheckpointError(f"{source} does not fit its config.json: {'; '.join(faults)}")
    for prefix, module in modules.items():
        own = {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
        module.load_state_dict(own, strict=True)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_pair(cls: Any, path_or_id: str, base: PreTrainedModel | str | None, check_weights: bool, **kwargs: Any) -> Any:
    """Do the work of ``from_pretrained``: config, base, check, tensors, generation config; return it in eval mode."""
    hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if kwargs.get(name) is not None}
    asked = kwargs.pop("config", None)  # into which the Auto classes put attn_implementation
    if asked is not None and asked._attn_implementation is not None:
        kwargs.setdefault("attn_implementation", asked._attn_implementation)
    for name in (*HUB_KEYWORDS, *AUTO_KEYWORDS):
        kwargs.pop(name, None)
    shared = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    backbone = kwargs.pop("backbone", None)
    peer = open_peer(path_or_id, **hub)
    if peer is not None:
        config, tensors, loaded = _place_peer(cls.auto_base, peer, base, backbone, **shared, **kwargs)
    else:
        config = read_config(path_or_id, **hub)
        tensors = read_tensors(path_or_id, **hub)
        loaded = load_base(cls.auto_base, config, base, **shared, **kwargs)
    check_base(config, loaded, check_weights)
    assert config.backbone_config is not None
    config.backbone_config._attn_implementation = loaded.config._attn_implementation
    model = cls(config, loaded)
    for prefix, module in model.trained_modules().items():
        for name, tensor in module.state_dict(keep_vars=True).items():  # each keeps the dtype it was saved with
            tensor.data = tensor.data.to(tensors.get(f"{prefix}.{name}", tensor).dtype)
        module.to(loaded.device)
    if peer is not None:  # heads that another library did not train are the base's
        heads = {name: module for name, module in model.trained_modules().items() if name != "shadow"}
        tensors = trained_tensors(heads) | tensors
    load_tensors(model.trained_modules(), tensors, path_or_id)
    if model.can_generate() and find_file(path_or_id, GENERATION_CONFIG_NAME, **hub) is not None:
        try:
            model.generation_config = GenerationConfig.from_pretrained(path_or_id, **hub)
        except (OSError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{GENERATION_CONFIG_NAME} of {path_or_id} is damaged: {reason}") from None
    return model.eval()


def _place_peer(
    auto: Any, peer: PeerAdapter, base: PreTrainedModel | str | None, backbone: Any, **kwargs: Any
) -> tuple[ShadowModelConfig, dict[str, Tensor], Any]:
    """Load the base of another library's adapter, and turn the adapter into a config and tensors of ours."""
    classifies = auto.__name__ == "AutoModelForSequenceClassification"
    if peer.classifies and not classifies:
        raise ConfigError(f"{peer.source} is a classifier; load it with ShadowForSequenceClassification")
    name = base or peer.base
    if not name:
        raise CheckpointError(f"{peer.source} does not name its base; pass base=..., a model, directory or Hub id")
    if isinstance(name, str):
        if base is None and peer.revision is not None:
            kwargs.setdefault("revision", peer.revision)
        if classifies and peer.num_labels is not None:
            kwargs.setdefault("num_labels", peer.num_labels)
        loaded = _load_auto(auto, name, **kwargs)
    else:
        loaded = name
    config, tensors = peer.build(loaded.config, backbone)
    config.base_name_or_path = lasting_name(loaded.config.name_or_path or "")
    config.base_revision = vars(loaded.config).get("_commit_hash")
    config.base_fingerprint = base_fingerprint(loaded)
    return config, tensors, loaded
