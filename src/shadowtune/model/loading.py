"""From a model to a directory and back: the base it names, the check that it is that base, the shadow's tensors."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from shadowtune.config.checking import nearest
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import find_file, read_tensors, trained_tensors, write_tensors, writing_into
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.fingerprint import base_fingerprint, base_signature, has_signature
from shadowtune.model.formats.adapter import PeerAdapter
from shadowtune.model.formats.opening import open_peer
from shadowtune.model.malformed import check_numbers, one_line, reading
from shadowtune.model.replacement import recover_directory
from shadowtune.model.shadow import Shadow
from shadowtune.models import NAMED, resolve

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Of tensors that are computed with; what is not, such as a list of tokens, is of integers."""
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
AUTO_KEYWORDS = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision", "use_safetensors")


IGNORED_SAVE_KEYWORDS = ("safe_serialization", "save_function", "save_original_format", "save_peft_format")
"""Keywords of ``save_pretrained`` that concern how transformers writes other files."""
REFUSED_SAVE_VALUES = {"safe_serialization": False}


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


def check_save_keywords(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a ``save_pretrained`` call that are for ``push_to_hub``.

    Raises:
        TypeError: for one that is unknown, or asks for a file that this library does not write.
    """
    hub = inspect.signature(model.push_to_hub).parameters
    known = {*hub, *IGNORED_SAVE_KEYWORDS}
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"save_pretrained() got an unexpected keyword argument {name!r}{nearest(name, known)}")
        if name in REFUSED_SAVE_VALUES and value == REFUSED_SAVE_VALUES[name]:
            raise TypeError(f"save_pretrained({name}={value!r}): a shadow is saved as safetensors only")
    return {name: value for name, value in given.items() if name in hub}


def read_config(path_or_id: str, **hub: Any) -> ShadowModelConfig:
    """Read ``config.json``; raises CheckpointError if it is missing, damaged or not a shadow's."""
    recover_directory(Path(path_or_id))
    what = f"cannot read config.json of {path_or_id}"
    try:
        with reading(what):
            values = ShadowModelConfig.get_config_dict(path_or_id, **hub)[0]
            kind = values.get("model_type")
            check_numbers(values, what)
            config = ShadowModelConfig.from_pretrained(path_or_id, **hub)
    except ConfigError as error:
        raise CheckpointError(f"{what}: {one_line(error)}") from None
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
        want, have = getattr(expected, key), getattr(found, key)  # by the names of its attribute map too
        if want != have:
            raise CheckpointError(
                f"wrong base: the shadow was made for {config.base_name_or_path or expected.model_type} with {key} "
                f"{want}, but {name} has {key} {have} ({word})"
            )
    if check_weights and not has_weights(base, config):
        raise CheckpointError(
            f"wrong base: {name} has the right shape but other weights (fingerprint {base_fingerprint(base)}) than "
            f"{config.base_name_or_path or 'the base'} that the shadow was trained beside ({config.base_fingerprint}); "
            "pass check_base_weights=False to use it all the same"
        )


def has_weights(base: PreTrainedModel, config: ShadowModelConfig) -> bool:
    """Whether a base has the weights of a shadow's own, as far as its config describes them."""
    if config.base_signature is not None:
        return has_signature(base, config.base_signature)
    if config.base_fingerprint is None or base.dtype is torch.float16:  # rounded twice, it has another fingerprint
        return True
    return base_fingerprint(base) in (None, config.base_fingerprint)


def load_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy saved tensors into modules, keys being ``<module name>.<tensor name>``. Every key must match.

    Raises:
        CheckpointError: naming ``source`` and the missing, unexpected or wrongly shaped keys.
    """
    check_tensors(modules, tensors, source)
    for prefix, module in modules.items():
        own = {name[len(prefix) + 1 :]: tensor for name, tensor in _under(prefix, tensors).items()}
        module.load_state_dict(own, strict=True)


def check_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare saved tensors with those of modules, which may be on the meta device; arguments as ``load_tensors``.

    Raises:
        CheckpointError: naming ``source`` and the keys that are missing, unexpected, or of another shape or kind.
    """
    expected = {f"{prefix}.{name}": t for prefix, module in modules.items() for name, t in module.state_dict().items()}
    faults = [f"missing {_few(sorted(expected.keys() - tensors.keys()))}"] if expected.keys() - tensors.keys() else []
    if tensors.keys() - expected.keys():
        faults.append(f"unexpected {_few(sorted(tensors.keys() - expected.keys()))}")
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            faults.append(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
        elif (tensors[name].dtype in PRECISIONS) != (expected[name].dtype in PRECISIONS):
            faults.append(f"{name} has dtype {tensors[name].dtype}, where {expected[name].dtype} is meant")
    if faults:
        raise CheckpointError(f"{source} does not fit its config.json: {'; '.join(faults[:8])}")


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
    config.name_or_path = path_or_id
    assert config.base_config is not None and config.backbone_config is not None
    broken = f"config.json of {path_or_id} makes no shadow"
    with reading(broken), torch.device("meta"):  # its sizes may be anything, so nothing is reserved for them yet
        sizes = (config.shadow_config, config.base_config, config.backbone_config)
        expected = Shadow(*sizes, draft_vocabulary_size=config.draft_vocabulary_size)
    check_tensors({"shadow": expected}, _under("shadow", tensors), path_or_id)
    config.backbone_config._attn_implementation = loaded.config._attn_implementation
    with reading(broken):
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
        with reading(f"{GENERATION_CONFIG_NAME} of {path_or_id} is damaged"):
            model.generation_config = GenerationConfig.from_pretrained(path_or_id, **hub)
    return model.eval()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")}


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
    with reading(f"{peer.source} makes no shadow"):
        config, tensors = peer.build(loaded.config, backbone)
    config.base_name_or_path = lasting_name(loaded.config.name_or_path or "")
    config.base_revision = vars(loaded.config).get("_commit_hash")
    config.base_fingerprint = base_fingerprint(loaded)
    config.base_signature = base_signature(loaded)
    return config, tensors, loaded
