"""Evaluation: tasks × methods × lengths; a run that was stopped goes on."""
