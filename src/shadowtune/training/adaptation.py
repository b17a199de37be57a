"""Adaptation of a trained shadow to further examples by itself, re-attached with unchanged boundaries.

The detached shadow learns alone, as in the shadow-only stage, so that no block of the base runs. The new adapter has
its backbone and projections, and everything else of the earlier adapter: boundaries, draft head, settings.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shadowtune.config.data import DataConfig
from shadowtune.config.loading import dump_config, load_config
from shadowtune.config.training import TrainConfig
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import CheckpointError, ConfigError, TrainingError
from shadowtune.model.checkpoint import read_tensors, write_tensors
from shadowtune.model.deferral_files import FILE
from shadowtune.model.files import writing_into
from shadowtune.training.run import train
from shadowtune.training.run_directory import RunDirectory
from shadowtune.training.stage_settings import shadow_only_settings
from shadowtune.training.summary import TrainSummary

LEARNED = ("shadow.backbone.", "shadow.projection.", "shadow.input_projection.", "shadow.embedding.")
"""Beginnings of the names of tensors that the new adapter takes from the shadow-only stage."""


def adaptation_settings(run: Path, data: str, output: Path, epochs: float, learning_rate: float | None) -> TrainConfig:
    """Return the settings of the shadow-only stage that starts from a run's shadow.

    Args:
        run: a finished run of the method "shadow".
        data: the new examples, as ``data.train``, in the format of the run's.
        output: directory of the new run.
        epochs: passes over them.
        learning_rate: peak; None takes that of the run's shadow-only stage.

    Raises:
        ConfigError: if the run has no shadow that generates.
        CheckpointError: if it is no finished run.
    """
    config = load_config(TrainConfig, _config_file(run), [])
    if config.method != "shadow" or config.task != "causal_lm":
        raise ConfigError(f"{run} is a {config.method} run of {config.task}; only a shadow that generates learns alone")
    rate = learning_rate if learning_rate is not None else config.shadow_learning_rate
    changed = replace(
        config,
        output=str(output),
        data=_data(config.data, PromptFormat.load(run / "model"), data),
        shadow_epochs=epochs,
        shadow_learning_rate=rate,
        deferral_fraction=0.0,
        early_stopping_patience=None,
        load_best_model_at_end=False,
    )
    settings = shadow_only_settings(changed)
    start = replace(settings.shadow, init_layers=None, init_from=str((run / "model").absolute()))
    return replace(settings, shadow=start)


def adapt(
    run: Path,
    settings: TrainConfig,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
    quiet: bool = False,
) -> TrainSummary | None:
    """Train the shadow of a run by itself, and leave a run directory whose adapter has the run's boundaries.

    Args:
        run: the run that is adapted; it stays as it is.
        settings: of ``adaptation_settings``.
        overwrite: replace the run in the output directory.
        report: called with messages.
        quiet: whether to hide the progress.

    Returns:
        The costs of the training; None in all but the first of several processes.

    Raises:
        ShadowtuneError: one of its subclasses, with a message of one line.
    """
    stage = RunDirectory(settings.output)
    output = RunDirectory(stage.path.parent)
    if output.path.absolute() == run.absolute():
        raise ConfigError(f"--output {run} is the run that is adapted; name another directory")
    if output.config_file.exists() and not overwrite:
        raise TrainingError(f"{output.path} holds a run already; pass --overwrite or another --output")
    summary = train(settings, overwrite=True, report=report, quiet=quiet)
    if summary is None:
        return None
    reattach(run / "model", stage.model, output.model)
    dump_config(replace(load_config(TrainConfig, _config_file(run), []), output=str(output.path)), output.config_file)
    report(f"{output.path}: the boundaries are those of {run}")
    return summary


def reattach(adapter: Path, trained: Path, directory: Path) -> None:
    """Write an adapter with the backbone and projections of one shadow, and all else of another.

    Args:
        adapter: the adapter that gives boundaries, settings, tokenizer and prompt format. Its deferral head is left
            out, because it reads the states of its own backbone.
        trained: the adapter of the trained shadow, with the same shapes.
        directory: to write, or to replace.

    Raises:
        CheckpointError: if the two do not have the same tensors, or a file cannot be read or written.
    """
    own, learned = read_tensors(str(adapter)), read_tensors(str(trained))
    names = [name for name in own if name.startswith(LEARNED)]
    differing = [name for name in names if name not in learned or learned[name].shape != own[name].shape]
    if differing:
        raise CheckpointError(f"{trained} is no shadow of the shapes of {adapter}: {differing[0]} differs")
    if directory.is_dir():
        shutil.rmtree(directory)
    left_out = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", FILE)
    shutil.copytree(adapter, directory, ignore=left_out)
    with writing_into(directory) as staging:
        write_tensors(staging, {**own, **{name: learned[name].to(own[name].dtype) for name in names}})


def _config_file(run: Path) -> Path:
    if not (run / "config.yaml").is_file() or not (run / "model").is_dir():
        raise CheckpointError(f"{run} is no finished run: it has no config.yaml or no model")
    return run / "config.yaml"


def _data(settings: DataConfig, form: PromptFormat, source: str) -> DataConfig:
    """Return the settings that read a source as a run's own examples; as prompts and answers if these are a task's."""
    if settings.task is not None:
        return DataConfig(
            train=source,
            template=form.template,
            chat_template=form.chat_template,
            optional_fields=form.optional_fields,
            main_field=None if form.template is None else form.main_field,
            max_length=settings.max_length,
            overlong=settings.overlong,
        )
    return replace(settings, train=source, validation=None, weights=None, learn_validation=False, limit=None)
