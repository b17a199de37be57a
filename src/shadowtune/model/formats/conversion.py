"""Conversion of shadows between our format, third-party formats, and plain models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from shadowtune.errors import CheckpointError, ConfigError
from shadowtune.model.causal_lm import ShadowForCausalLM
from shadowtune.model.classifier import ShadowForSequenceClassification
from shadowtune.model.files import writing_into
from shadowtune.model.formats.peft_shadow import write_peft
from shadowtune.model.formats.peft_shadowtune import write_shadowtune
from shadowtune.model.formats.projected import is_projected, plain_of, read_projected
from shadowtune.model.formats.shadow_peft import write_shadow_peft
from shadowtune.model.loading import open_third_party, read_config

Format = Literal["shadowtune", "shadowtune-peft", "shadow-peft", "peft", "plain"]
WRITERS = {"shadowtune-peft": write_shadowtune, "shadow-peft": write_shadow_peft, "peft": write_peft}


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion."""

    files: tuple[str, ...]
    """Names of the files that were written, sorted."""
    notes: tuple[str, ...]
    """Settings that the target does not keep (its outputs are the same), and what loading it needs."""


def convert(
    source: str,
    target: Path,
    format: Format,
    base: PreTrainedModel | str | None = None,
    backbone: str | PreTrainedConfig | None = None,
    task: Literal["causal_lm", "classification"] | None = None,
) -> Conversion:
    """Read a shadow of ours, of shadow-peft or of PEFT, or a projected model, and write it in another format.

    Args:
        source: directory or Hub id.
        target: a new or empty directory.
        format: "shadowtune", "shadowtune-peft" (the PEFT method of this package), "shadow-peft", "peft" (PEFT's own
            Shadow tuner), or "plain", the detached shadow as an ordinary model.
        base: the base, where the source does not name it.
        backbone: config of an explicit backbone, where the source does not store it.
        task: by default the source's.

    Raises:
        ConfigError: if the format cannot hold the source; the message names each field and its value.
        CheckpointError: if the source is damaged or ``target`` is in use.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory; name a new one")
    if Path(source).is_dir() and not (Path(source) / CONFIG_NAME).exists() and is_run(Path(source)):
        source = str(Path(source) / "model")
    if (Path(source) / CONFIG_NAME).is_file() and is_projected(source):
        if format != "plain":
            raise ConfigError(
                f"{source} is a detached model with a projection and has no boundaries to write as {format}; "
                "use --format plain"
            )
        return _write(target, plain_of(read_projected(source), source).save_pretrained)
    model = _load(source, base, backbone, task)
    if format == "plain":
        return _write(target, model.detached().save_pretrained)
    if format == "shadowtune":
        return _write(target, model.save_pretrained)
    return _write(target, lambda staging: WRITERS[format](model, staging))


def is_run(directory: Path) -> bool:
    """Return whether a directory is a run of ``shadowtune train``, which has the shadow in ``model``."""
    return (directory / "config.yaml").is_file() and (directory / "model" / CONFIG_NAME).is_file()


def _load(source: str, base: Any, backbone: Any, task: str | None) -> Any:
    adapter = open_third_party(source)
    if task is None:
        classifies = (
            adapter.classifies
            if adapter is not None
            else "ShadowForSequenceClassification" in (read_config(source).architectures or ())
        )
        task = "classification" if classifies else "causal_lm"
    kind = ShadowForSequenceClassification if task == "classification" else ShadowForCausalLM
    extra = {} if backbone is None else {"backbone": backbone}
    return kind.from_pretrained(source, base=base, **extra)


def _write(target: Path, write: Any) -> Conversion:
    with writing_into(target) as staging:
        notes = write(staging)
        files = tuple(sorted(path.name for path in staging.iterdir()))
    return Conversion(files, tuple(notes or ()))
