"""Tasks without code: builders that read data from disk, and task files that name them.

Each builder returns a `bmm.Task`; `Splits` says where its data lie. docs/tasks.md has an example of every kind.
"""

from .build import Splits
from .file import KINDS, load_tasks
from .function import function_task
from .generation import exact_match
from .harness import Harness, harness_task
from .heads import Head, load_head, zero_shot
from .images import image_classification
from .likelihood import multiple_choice, perplexity
from .rows import open_rows
from .text import text_classification

__all__ = [
    "KINDS", "Harness", "Head", "Splits", "exact_match", "function_task", "harness_task", "image_classification",
    "load_head", "load_tasks", "multiple_choice", "open_rows", "perplexity", "text_classification", "zero_shot",
]  # fmt: skip
