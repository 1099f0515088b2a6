"""Tasks: samples of one shape, to train on and to measure with."""

from cometlm.registry import Registry
from cometlm.tasks.base import Question, Sample, Task

TASKS: Registry[type[Task]] = Registry("task", "cometlm.tasks", {})

__all__ = ["TASKS", "Question", "Sample", "Task"]
