"""Tasks: the files of those we ship, and how any task's rows are made."""

from shadowtune.data.tasks.task import SHIPPED_TASKS, Task, load_task

__all__ = ["SHIPPED_TASKS", "Task", "load_task"]
