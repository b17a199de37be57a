"""Evaluation of a trained model with EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness)."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shadowtune.errors import ConfigError, DataError, ShadowtuneError
from shadowtune.evaluation.trained_model import TrainedModel
from shadowtune.export.loading import LoadedModel
from shadowtune.model.ensemble import LogitEnsemble


def evaluate_with_harness(
    source: TrainedModel,
    mode: str,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one mode of a model on tasks of the harness.

    Args:
        source: a causal language model.
        mode: one of its modes.
        tasks: names of tasks or groups of the harness; patterns such as "mmlu_*" are names too.
        limit: number of examples of each task, the first ones.
        batch_size: examples at a time.
        num_fewshot: examples in each prompt; None leaves that to the task.
        include_path: a directory of further task files; it is read once a process.

    Returns:
        A flat row for each metric of each task: task, metric, filter, value and standard error (None if the harness
        gives none).

    Raises:
        ShadowtuneError: if the harness is not installed.
        ConfigError: if it predicts classes, has no such mode, or is no model of torch.
        DataError: if it has no such task, or the task's data cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        raise ShadowtuneError("the lm-evaluation-harness is not installed: pip install 'shadowtune[harness]'") from None
    name, kind = source.source.name, source.source.kind
    if source.source.task == "classification":
        raise ConfigError(f"{name} is {kind}; the harness needs a language model")
    if isinstance(source.model, LoadedModel | LogitEnsemble):
        raise ConfigError(f"{name} is {kind}, and the harness runs models of torch; evaluate what it was made of")
    manager = _task_manager(None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise DataError(
            f"the harness has no task {', '.join(unknown)}; lm_eval ls tasks lists them, --include-path adds your own"
        )
    with source.mode(mode) as model:
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=model.eval(), tokenizer=source.tokenizer, batch_size=batch_size),
                tasks=manager.match_tasks(list(tasks)),
                limit=limit,
                num_fewshot=num_fewshot,
                task_manager=manager,
                log_samples=False,
            )
        except (OSError, ValueError) as error:  # missing data: no connection, no such file
            raise DataError(f"the harness cannot run {', '.join(tasks)}: {' '.join(str(error).split())}") from None
    return [row for task, scores in found["results"].items() for row in _rows(task, scores)]


@cache
def _task_manager(include_path: str | None) -> Any:
    """The harness's index of its 14,000 tasks, which takes it over ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _rows(task: str, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Flatten scores, which the harness keeps as "metric,filter" and "metric_stderr,filter"."""
    rows = []
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            error = scores.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, float)  # otherwise the word "N/A"
            row = {"task": task, "metric": metric, "filter": filtered, "value": value}
            rows.append({**row, "standard_error": error if known else None})
    return rows
