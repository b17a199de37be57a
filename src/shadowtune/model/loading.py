"""Saving a shadow model and loading it: its config, the base that it names, the check of that base, its tensors."""

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from shadowtune.attach.architectures import check_unwrapped
from shadowtune.attach.sharded_loading import as_parts
from shadowtune.attach.sharding import device_of
from shadowtune.compatibility import commit_of, keep_commit
from shadowtune.config.settings import nearest
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.draft_head import DraftHead, resolve_layers
from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.checkpoint import find_file, read_tensors, trained_tensors, write_tensors
from shadowtune.model.configuration import ShadowModelConfig
from shadowtune.model.files import check_numbers, one_line, reading, recover_directory, writing_into
from shadowtune.model.fingerprint import base_fingerprint, base_signature, has_signature
from shadowtune.model.formats import peft_shadow, peft_shadowtune, projected, shadow_peft
from shadowtune.model.formats.third_party import ThirdPartyAdapter, read_json
from shadowtune.model.shadow import Shadow
from shadowtune.models import NAMED, resolve

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights; other tensors, such as a list of tokens, have integer dtypes."""
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
AUTO_KEYWORDS = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "code_revision", "use_safetensors")
IGNORED_SAVE_KEYWORDS = ("safe_serialization", "save_function", "save_original_format", "save_peft_format")
"""Keywords of ``save_pretrained`` that concern how transformers writes other files."""
REFUSED_SAVE_VALUES = {"safe_serialization": False}


DRAFT_HEAD, DRAFT_VOCABULARY = "shadow.draft_head.", "shadow.draft_vocabulary"
"""Names of tensors that only drafts need."""


def absolute_name(name: str) -> str:
    """Return the name of a base as it is saved: a directory by its absolute path, any other name as it is."""
    return os.path.abspath(name) if name and name not in NAMED and os.path.isdir(name) else name


def record_resized_base(config: ShadowModelConfig, base: PreTrainedModel) -> None:
    """Record size, fingerprint and signature of a base whose vocabulary was resized; else do nothing."""
    assert config.base_config is not None
    recorded, found = (each.get_text_config(decoder=True) for each in (config.base_config, base.config))
    if found.vocab_size == recorded.vocab_size:
        return
    config.vocab_size = recorded.vocab_size = found.vocab_size
    config.base_fingerprint, config.base_signature = base_fingerprint(base), base_signature(base)


def save_model(model: Any, directory: Path, state_dict: Mapping[str, Tensor] | None, max_shard_size: str | int) -> None:
    """Implement ``save_pretrained``; the trained tensors come from ``state_dict`` if it is given."""
    if state_dict is None:
        tensors = trained_tensors(model.trained_modules())
    else:
        prefixes = tuple(f"{name}." for name in model.trained_modules())
        tensors = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefixes)}
    record_resized_base(model.config, model.base)
    model.config.architectures = [type(model).__name__]
    with writing_into(directory) as staging:
        write_tensors(staging, tensors, max_shard_size)
        model.config.to_json_file(staging / CONFIG_NAME, use_diff=False)
        if model.can_generate():
            model.generation_config.to_json_file(staging / GENERATION_CONFIG_NAME)


def check_save_keywords(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of a ``save_pretrained`` call that are for ``push_to_hub``.

    Raises:
        TypeError: for an unknown keyword, or one that asks for a file that this library does not write.
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
    """Load the base that a shadow's config names, or ``base`` if it is given.

    Raises:
        CheckpointError: if the config names none, or it cannot be loaded.
    """
    if isinstance(base, nn.Module):
        check_unwrapped(base)
        return base
    name = base or config.base_name_or_path
    if not name:
        raise CheckpointError("config.json names no base model; pass base=..., a model, directory or Hub id")
    if base is None and config.base_revision is not None:
        kwargs.setdefault("revision", config.base_revision)
    assert config.base_config is not None
    if auto.__name__ == "AutoModelForSequenceClassification":
        kwargs.setdefault("num_labels", config.base_config.num_labels)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # a head for other classes, which the shadow's replaces
    return _load_auto(auto, name, **kwargs)


def _load_auto(auto: Any, name: str, **kwargs: Any) -> Any:
    try:
        model = auto.from_pretrained(resolve(name), **{"trust_remote_code": False, **kwargs})
    except (OSError, RuntimeError, ValueError) as error:  # weights that do not fit, or code of its own
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot load the base {name}: {reason}; pass base=... if it has moved") from None
    keep_commit(model, kwargs.get("revision"), kwargs.get("cache_dir"))
    return model


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
    """Return whether a base has the weights of the shadow's base, as far as its config describes them."""
    if config.base_signature is not None:
        return has_signature(base, config.base_signature)
    if config.base_fingerprint is None or base.dtype is torch.float16:  # rounded twice, which changes the fingerprint
        return True
    return base_fingerprint(base) in (None, config.base_fingerprint)


def load_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy saved tensors into modules by ``<module name>.<tensor name>``. Every key must match.

    Raises:
        CheckpointError: naming ``source`` and the missing, unexpected or wrongly shaped keys.
    """
    check_tensors(modules, tensors, source)
    for prefix, module in modules.items():
        start = f"{prefix}."
        own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
        module.load_state_dict(own, strict=True)


def check_tensors(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare saved tensors with those of modules, which may be on the meta device; arguments as ``load_tensors``.

    Raises:
        CheckpointError: naming ``source`` and the keys that are missing, unexpected, or of another shape or kind.
    """
    expected = {f"{prefix}.{name}": t for prefix, module in modules.items() for name, t in module.state_dict().items()}
    errors = [f"missing {_few(sorted(expected.keys() - tensors.keys()))}"] if expected.keys() - tensors.keys() else []
    if tensors.keys() - expected.keys():
        errors.append(f"unexpected {_few(sorted(tensors.keys() - expected.keys()))}")
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            errors.append(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
        elif (tensors[name].dtype in PRECISIONS) != (expected[name].dtype in PRECISIONS):
            errors.append(f"{name} has dtype {tensors[name].dtype}, where {expected[name].dtype} is meant")
    if errors:
        raise CheckpointError(f"{source} does not fit its config.json: {'; '.join(errors[:8])}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_model(
    cls: Any, path_or_id: str, base: PreTrainedModel | str | None, check_weights: bool, **kwargs: Any
) -> Any:
    """Implement ``from_pretrained``: config, base, check, tensors, generation config; return the model in eval mode."""
    hub = {name: kwargs.pop(name) for name in HUB_KEYWORDS if kwargs.get(name) is not None}
    given = kwargs.pop("config", None)  # into which the Auto classes put attn_implementation
    if given is not None and given._attn_implementation is not None:
        kwargs.setdefault("attn_implementation", given._attn_implementation)
    for name in (*HUB_KEYWORDS, *AUTO_KEYWORDS):
        kwargs.pop(name, None)
    shared = {name: value for name, value in hub.items() if name not in ("revision", "subfolder")}
    backbone = kwargs.pop("backbone", None)
    adapter = open_third_party(path_or_id, **hub)
    if adapter is not None:
        config, tensors, loaded = _convert_adapter(cls.auto_base, adapter, base, backbone, **shared, **kwargs)
    else:
        config = read_config(path_or_id, **hub)
        tensors = read_tensors(path_or_id, **hub)
        drop_unusable_drafts(config, tensors, path_or_id)
        loaded = load_base(cls.auto_base, config, base, **shared, **kwargs)
    loaded = as_parts(loaded)
    check_base(config, loaded, check_weights)
    config.name_or_path = path_or_id
    model = _build_model(cls, config, loaded, tensors, path_or_id)
    if adapter is not None:  # heads that another library did not train are the base's
        heads = {name: module for name, module in model.trained_modules().items() if name != "shadow"}
        tensors = trained_tensors(heads) | tensors
    load_tensors(model.trained_modules(), tensors, path_or_id)
    if model.can_generate() and find_file(path_or_id, GENERATION_CONFIG_NAME, **hub) is not None:
        with reading(f"{GENERATION_CONFIG_NAME} of {path_or_id} is damaged"):
            model.generation_config = GenerationConfig.from_pretrained(path_or_id, **hub)
    return model.eval()


def drop_unusable_drafts(config: ShadowModelConfig, tensors: dict[str, Tensor], source: str) -> None:
    """Leave a draft head or draft vocabulary out of ``config`` and ``tensors`` if it does not fit, with a warning.

    The attached model does not need it: it answers the same without.

    Args:
        config: of ``config.json``.
        tensors: of ``model.safetensors``, by name.
        source: named in the warning.
    """
    if config.base_config is None:
        return
    with reading(f"config.json of {source} makes no shadow"):
        text = config.base_config.get_text_config(decoder=True)
        reason = _draft_head_error(config.shadow_config, text.hidden_size, text.num_hidden_layers, tensors)
        vocabulary = tensors.get(DRAFT_VOCABULARY)
        known = vocabulary is None or bool(((vocabulary >= 0) & (vocabulary < text.vocab_size)).all())
    if reason is not None:
        config.shadow |= {"draft_rank": None, "draft_layers": None}
        for name in [name for name in tensors if name.startswith(DRAFT_HEAD)]:
            del tensors[name]
        warnings.warn(f"the draft head of {source} is left out: {reason}", stacklevel=2)
    if not known:
        config.draft_vocabulary_size = None
        del tensors[DRAFT_VOCABULARY]
        warnings.warn(
            f"the draft vocabulary of {source} is left out: it has tokens beyond the base's {text.vocab_size}",
            stacklevel=2,
        )


def _draft_head_error(config: ShadowConfig, width: int, blocks: int, tensors: Mapping[str, Tensor]) -> str | None:
    """Return why the saved draft head cannot be used; None if it can, or if there is none."""
    if config.draft_rank is None:
        return None
    try:
        layers = resolve_layers(config.draft_layers, blocks)
    except ConfigError as error:
        return str(error)
    with torch.device("meta"):
        expected = DraftHead(width, config.draft_rank, len(layers)).state_dict()
    saved = {name.removeprefix(DRAFT_HEAD): part for name, part in tensors.items() if name.startswith(DRAFT_HEAD)}
    if {name: part.shape for name, part in saved.items()} != {name: part.shape for name, part in expected.items()}:
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in saved.items()) or "no tensors"
        return f"draft_rank {config.draft_rank} beside a base of width {width} needs other tensors, it has {shapes}"
    if not all(bool(part.isfinite().all()) for part in saved.values()):
        return "it holds NaN or infinity"
    return None


def _build_model(cls: Any, config: ShadowModelConfig, base: Any, tensors: Mapping[str, Tensor], path: str) -> Any:
    """Build the model of a config with parameters of the dtypes that were saved; their values are loaded later."""
    assert config.base_config is not None and config.backbone_config is not None
    broken = f"config.json of {path} makes no shadow"
    with reading(broken), torch.device("meta"):  # sizes are untrusted, so no memory is allocated for them yet
        sizes = (config.shadow_config, config.base_config, config.backbone_config)
        expected = Shadow(*sizes, draft_vocabulary_size=config.draft_vocabulary_size)
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith("shadow.")}
    check_tensors({"shadow": expected}, saved, path)
    config.backbone_config._attn_implementation = base.config._attn_implementation
    with reading(broken):
        model = cls(config, base)
    for prefix, module in model.trained_modules().items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(tensors.get(f"{prefix}.{name}", tensor).dtype)
        module.to(device_of(base))
    return model


def open_third_party(path_or_id: str, **hub: Any) -> ThirdPartyAdapter | None:
    """Read the adapter of another library; None for anything else, such as a shadow of our own.

    Raises:
        CheckpointError: if it is damaged, or a projected model, which is no adapter.
    """
    try:
        if find_file(path_or_id, shadow_peft.CONFIG, **hub) is not None:
            return shadow_peft.open_shadow_peft(path_or_id, **hub)
        peft_config = find_file(path_or_id, peft_shadow.CONFIG, **hub)
        if peft_config is not None:
            values = read_json(peft_config)
            if values.get("peft_type") == peft_shadowtune.PEFT_TYPE:
                return peft_shadowtune.open_shadowtune(path_or_id, values, **hub)
            return peft_shadow.open_peft(path_or_id, **hub)
        is_projected = projected.is_projected(path_or_id, **hub)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        return None  # reading the path as a shadow of ours gives the message
    if is_projected:
        raise CheckpointError(
            f"{path_or_id} is a detached model with a projection, not a shadow beside a base; start a shadow from it "
            f"with ShadowConfig(backbone={path_or_id!r}), or make it a plain model: shadowtune convert --format plain"
        )
    return None


def _convert_adapter(
    auto: Any, adapter: ThirdPartyAdapter, base: PreTrainedModel | str | None, backbone: Any, **kwargs: Any
) -> tuple[ShadowModelConfig, dict[str, Tensor], Any]:
    """Load the base of another library's adapter; return our config, our tensors and the base."""
    classifies = auto.__name__ == "AutoModelForSequenceClassification"
    if adapter.classifies and not classifies:
        raise ConfigError(f"{adapter.source} is a classifier; load it with ShadowForSequenceClassification")
    if isinstance(base, nn.Module):
        check_unwrapped(base)
    name = base or adapter.base
    if not name:
        raise CheckpointError(f"{adapter.source} does not name its base; pass base=..., a model, directory or Hub id")
    if isinstance(name, str):
        if base is None and adapter.revision is not None:
            kwargs.setdefault("revision", adapter.revision)
        if classifies and adapter.num_labels is not None:
            kwargs.setdefault("num_labels", adapter.num_labels)
        loaded = _load_auto(auto, name, **kwargs)
    else:
        loaded = name
    with reading(f"{adapter.source} makes no shadow"):
        config, tensors = adapter.build(loaded.config, backbone)
    config.base_name_or_path = absolute_name(loaded.config.name_or_path or "") or config.base_name_or_path
    if config.base_signature is not None:  # recorded by our own PEFT method, and checked later
        return config, tensors, loaded
    config.base_revision = commit_of(loaded.config)
    config.base_fingerprint = base_fingerprint(loaded)
    config.base_signature = base_signature(loaded)
    return config, tensors, loaded
