"""Tasks and their scores."""

from .agreement import judged_by_experts
from .holdout import split_validation
from .outputs import SteadyBatches, task_outputs
from .scoring import check_skeleton, own_names, score_tasks, state_slots, swapped
from .task import Task, check_tasks, run_model, top1

__all__ = [
    "SteadyBatches", "Task", "check_skeleton", "check_tasks", "judged_by_experts", "own_names", "run_model",
    "score_tasks", "split_validation", "state_slots", "swapped", "task_outputs", "top1",
]  # fmt: skip
