"""Settings of the cluster that executes the runs of a comparison, each as a job of its scheduler."""

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import StrictInt

from shadowtune.config.settings import NonNegativeInt, PositiveInt, settings


@settings
class ClusterConfig:
    """What each run of a comparison asks of a cluster; submitit hands the runs over (``shadowtune[cluster]``).

    The comparison's ``output``, its data and this Python environment must be on a file system that the nodes share.
    """

    scheduler: Literal["slurm", "local"] = "slurm"
    """slurm, or local: the same path with processes of this machine, to try it, without partition and options."""
    partition: str | None = None
    """Partition of the jobs; None means the cluster's default."""
    gpus_per_run: Annotated[StrictInt, Ge(0), Le(1)] = 1
    """GPUs of a run, which is one process: 1, or 0 to train on processors."""
    cpus_per_run: PositiveInt = 8
    """Processor cores of a run."""
    memory_gb: PositiveInt | None = None
    """Main memory of a run in GB; None means the cluster's default."""
    minutes: PositiveInt = 1440
    """Time limit of a job. A run that reaches it, or is preempted, is queued again and continues from its last
    checkpoint."""
    requeues: NonNegativeInt = 3
    """How often a run may be queued again after its time limit."""
    setup: list[str] = field(default_factory=list)
    """Shell commands before each run, such as ``module load cuda``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as ``account`` or ``constraint``."""
