"""Tied weights: names that stand for one parameter, so that it is merged once and stays one.

Two sources are believed. Names that share memory (a ``.bin`` file, a model's ``state_dict()``) are tied where they are
the same view of it; a transposed or partial view is a tensor of its own. Names whose ``config.json`` declares
``tie_word_embeddings`` are tied where the input embedding and the output layer are both stored and equal bit by bit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .formats import TensorInfo

INPUT_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "shared", "embed_in", "tok_embeddings", "embeddings")
OUTPUT_LAYERS = ("lm_head", "embed_out", "decoder", "output_projection", "output")

Groups = tuple[tuple[str, ...], ...]


def shared_groups(tensors: Mapping[str, Tensor]) -> Groups:
    """Groups of two or more names that are the same view of the same memory; sorted."""
    views: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel():
            views[(tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())].append(name)
    return tuple(sorted(tuple(sorted(names)) for names in views.values() if len(names) > 1))


def declared_groups(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]
) -> Groups:
    """Groups of input embeddings and output layers that ``config`` declares tied and that are equal.

    Reads only the candidates, two at a time. A declared pair that differs is not tied: merging it once would lose one.
    """
    if not declares_ties(config):
        return ()
    candidates = [name for name, info in sorted(infos.items()) if len(info.shape) == 2 and role_of(name)]
    groups: list[list[str]] = []
    for name in candidates:
        for group in groups:
            if infos[group[0]] == infos[name] and torch.equal(read(group[0]), read(name)):
                group.append(name)
                break
        else:
            groups.append([name])
    return tuple(tuple(g) for g in groups if {"input", "output"} <= {role_of(name) for name in g})


def union(groups: Iterable[Iterable[str]]) -> Groups:
    """Groups joined where they have a name in common; sorted."""
    joined: list[set[str]] = []
    for group in groups:
        names = set(group)
        for other in [g for g in joined if g & names]:
            joined.remove(other)
            names |= other
        joined.append(names)
    return tuple(sorted(tuple(sorted(names)) for names in joined if len(names) > 1))


def declares_ties(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that input embeddings and output layer are one."""
    sections = [config, *(config.get(key) for key in ("text_config", "decoder", "llm_config"))]
    return any(isinstance(s, Mapping) and s.get("tie_word_embeddings") is True for s in sections)


def role_of(name: str) -> str:
    """ "input" or "output" for the weight of an embedding or an output layer, else ""."""
    parts = name.split(".")
    if parts[-1] != "weight" or len(parts) < 2:
        return ""
    return "input" if parts[-2] in INPUT_EMBEDDINGS else "output" if parts[-2] in OUTPUT_LAYERS else ""
