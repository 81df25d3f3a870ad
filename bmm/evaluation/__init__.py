"""Tasks and their scores."""

from .scoring import check_skeleton, score_tasks, state_slots, swapped
from .task import Task, check_tasks, run_model, top1

__all__ = ["Task", "check_skeleton", "check_tasks", "run_model", "score_tasks", "state_slots", "swapped", "top1"]
