"""Task heads: the layers that only one task's expert can use, left out of a merge or kept beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .atomic import atomic_folder, destination, sync, writing
from .formats import TensorFile, some
from .low_rank import Stored
from .reader import Checkpoint
from .views import View

HEADS = ("refuse", "base", "keep")
"""What is done with task heads: nothing, keep the base's, or write each expert's own beside the merge as well."""
TASK_HEADS = frozenset(
    {"classifier", "score", "qa_outputs", "classification_head", "pre_classifier", "head", "heads", "fc", "logits_proj"}
)
OUTPUT_HEADS = frozenset(
    {"lm_head", "embed_out", "output_projection", "cls", "vocab_projector", "vocab_transform", "vocab_layer_norm"}
)
FOLDER = "heads"
Heads = dict[str, dict[str, Stored]]


def head_of(name: str, kinds: frozenset[str] = TASK_HEADS | OUTPUT_HEADS) -> str:
    """The module of a parameter that is, or lies in, a head: "classifier" of "classifier.dense.weight"; else "".

    A head stands beside the blocks of a model, never inside one: what follows a number is none.
    """
    parts = name.split(".")[:-1]
    for place, part in enumerate(parts):
        if part.isdigit():
            return ""
        if part in kinds:
            return ".".join(parts[: place + 1])
    return ""


def heads_in(checkpoint: Checkpoint) -> list[str]:
    """The modules of a checkpoint that look like heads."""
    return sorted({head_of(name) for name in checkpoint.names} - {""})


def separate_heads(
    base: Checkpoint, experts: Sequence[Checkpoint], tasks: Sequence[str]
) -> tuple[list[Checkpoint], Heads, list[str]]:
    """Experts with the base's heads in place of their own, their own by task, and notices that name them.

    Task heads are told by their names; an output layer (lm_head, cls) counts as one where an expert's is not like the
    base's. Raises `CheckpointError` where there is none.
    """
    views: list[Checkpoint] = []
    kept: Heads = {}
    for task, expert in zip(tasks, experts, strict=True):
        modules = {m for n in (*base.names, *expert.names) if (m := head_of(n, TASK_HEADS))}
        modules |= {m for n in (*base.names, *expert.names) if (m := head_of(n)) and not _alike(base, expert, n)}
        own = [n for n in expert.names if head_of(n) in modules]
        kept[task] = {n: Stored(expert.holder(n), n) for n in own}
        if not modules:
            views.append(expert)
            continue
        holders: dict[str, TensorFile] = {n: expert.holder(n) for n in expert.names if n not in kept[task]}
        holders |= {n: base.holder(n) for n in base.names if head_of(n) in modules}
        views.append(View(expert, holders, ["heads", sorted(modules)], [base]))
    if not any(kept.values()):
        raise CheckpointError(
            "heads: no task head in the experts", "leave the key out, or name what is to stay out with skip"
        )
    notices = [f"{task}: head left out of the merge: {some(names)}" for task, names in kept.items() if names]
    return views, kept, notices


def write_with_heads(
    folder: str | Path,
    heads: Mapping[str, Mapping[str, Stored]],
    overwrite: bool,
    write: Callable[[Path], object],
    inputs: tuple[Path, ...] = (),
) -> Path:
    """What ``write`` makes of a folder, with heads/TASK.safetensors for every task that has one; whole or not at all.

    Raises `WriteError` as `write_checkpoint` does; ``inputs`` are not to be written over.
    """
    target = destination(folder, overwrite, inputs)
    with atomic_folder(target, overwrite) as whole:
        write(whole)
        with writing(target):
            (whole / FOLDER).mkdir()
            for task, tensors in heads.items():
                read: dict[str, Tensor] = {name: stored.read().contiguous() for name, stored in tensors.items()}
                if read:
                    path = whole / FOLDER / f"{task.replace('/', '_')}.safetensors"
                    path.touch()  # the library's own file would be the owner's alone
                    mode = path.stat().st_mode
                    save_file(read, path, metadata={"format": "pt"})
                    path.chmod(mode & 0o777)
                    sync(path)
    return target


def _alike(base: Checkpoint, expert: Checkpoint, name: str) -> bool:
    return name in base and name in expert and base.info(name).shape == expert.info(name).shape
