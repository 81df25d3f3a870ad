"""From the tensor names of a PEFT adapter to the base's: parts, prefixes, tied embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError
from .formats import some
from .reader import Checkpoint
from .tied import declares_ties, role_of

PREFIX = "base_model.model."
LORA = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.(weight|bias))?")
TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
SAVED = re.compile(r"(.+)\.(?:modules_to_save(?:\.default)?|base_layer)\.([^.]+)")
ORIGINAL = re.compile(r"(.+)\.original_module\.([^.]+)")
NameFinder = Callable[[Path], Mapping[str, str]]
"""From a checkpoint's path to the model's own name of every stored name; empty where no model can be built."""
WITH_HEAD = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM")


@dataclass
class Parts:
    """An adapter's tensors sorted, by peft's module (for ``full``: parameter) names; values are names in the file."""

    lora: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module -> "A", "B", "bias", "embedding_A", "embedding_B", "magnitude_vector" -> name."""
    tokens: dict[str, str] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of names that must be equal: peft saves a bias of ``modules_to_save`` twice."""


def sort_parts(path: Path, names: Iterable[str]) -> Parts:
    """Every tensor in its place; `CheckpointError` names those that have none."""
    parts, originals, strange = Parts(), [], []
    for stored in sorted(names):
        if not stored.startswith(PREFIX):
            strange.append(stored)
            continue
        name = stored.removeprefix(PREFIX)
        if match := LORA.fullmatch(name):
            kind = "bias" if match[3] == "bias" else match[2]
            if match[3] == "bias" and match[2] != "B":
                strange.append(stored)
            else:
                parts.lora.setdefault(match[1], {})[kind] = stored
        elif match := TOKENS.fullmatch(name):
            parts.tokens[match[1]] = stored
        elif match := ORIGINAL.fullmatch(name):
            originals.append((f"{match[1]}.{match[2]}", stored))
        elif ".lora_" in name or ".token_adapter." in name:
            strange.append(stored)
        else:
            match = SAVED.fullmatch(name)
            target = f"{match[1]}.{match[2]}" if match else name
            if target in parts.full:
                parts.repeated.append((parts.full[target], stored))
            parts.full[target] = stored
    # The frozen original of a module that is saved in full plays no part in what the adapter computes.
    strange += [stored for target, stored in originals if target not in parts.full]
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors that no LoRA of peft has: {some(strange)}",
            "save the adapter with peft's save_pretrained",
        )
    return parts


@dataclass(frozen=True)
class Rule:
    """How peft's names of modules and parameters become the base's, and back."""

    to_base: Callable[[str], str]
    to_peft: Callable[[str], str]


def find_rule(
    path: Path, base: Checkpoint, modules: Iterable[str], heads: Iterable[str] = (), stored_as: NameFinder | None = None
) -> Rule:
    """The `Rule`: names as they are, or one prefix taken off or put in front, or ``stored_as``.

    ``modules`` must all have a weight in the base, but for ``heads``, output layers whose weight is the embedding's.
    ``stored_as`` finds the model's own name of each stored name, for architectures that are stored under other names.
    `CheckpointError` where no rule, or more than one, does it.
    """
    stored = {*base.names, *base.skipped}
    wanted = [m for m in modules if m not in set(heads)]

    def missing(rule: Rule) -> list[str]:
        return [m for m in wanted if f"{rule.to_base(m)}.weight" not in stored]

    if not missing(_taken_off("")):
        return _taken_off("")
    if stored_as is not None and not missing(renamed := _renamed(stored_as(base.path))):
        return renamed
    parts = wanted[0].split(".")
    rules = {f"without {p}": _taken_off(p) for p in (".".join(parts[:k]) + "." for k in range(1, len(parts)))}
    ending = f".{wanted[0]}.weight"
    rules |= {f"with {n}": _put_on(n) for n in sorted(n.removesuffix(ending[1:]) for n in stored if n.endswith(ending))}
    fitting = [rule for rule in rules.values() if not missing(rule)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"{path}: {wanted[0]} may be more than one of the base's modules: "
            f"{some(sorted(rule.to_base(wanted[0]) for rule in fitting))}",
            "save the base from the model class that the adapter was trained on",
        )
    absent = missing(_taken_off(""))
    raise CheckpointError(
        f"{path}: {len(absent)} adapted modules have no weight in {base.path}: {some(absent)}",
        "give the base that the adapter was trained on, saved from the same model class",
    )


def tied_names(base: Checkpoint) -> tuple[str, ...]:
    """The stored names of the weight that is both input embedding and output layer; empty where there is none."""
    for group in base.tied:
        if {"input", "output"} <= {role_of(name) for name in group}:
            return group
    inputs = [name for name in base.names if role_of(name) == "input" and len(base.info(name).shape) == 2]
    if len(inputs) != 1 or any(role_of(name) == "output" for name in (*base.names, *base.skipped)):
        return ()
    classes = base.config.get("architectures")
    generates = isinstance(classes, list) and any(str(c).endswith(WITH_HEAD) for c in classes)
    untied = base.config.get("tie_word_embeddings") is False
    return tuple(inputs) if declares_ties(base.config) or (generates and not untied) else ()


def output_modules(names: Iterable[str]) -> list[str]:
    """Those of the module names that are output layers."""
    return [name for name in names if role_of(f"x.{name}.weight") == "output"]


def _taken_off(prefix: str) -> Rule:
    return Rule(lambda name: name.removeprefix(prefix), lambda name: prefix + name)


def _put_on(prefix: str) -> Rule:
    return Rule(lambda name: prefix + name, lambda name: name.removeprefix(prefix))


def _renamed(own_of: Mapping[str, str]) -> Rule:
    """By a table of the model's own names of stored parameters; modules are where their parameters are."""
    own = dict(own_of) | {a.rpartition(".")[0]: b.rpartition(".")[0] for a, b in own_of.items()}
    stored = {b: a for a, b in own.items()}
    return Rule(lambda name: stored.get(name, name), lambda name: own.get(name, name))


def orientation(path: Path, shapes: Mapping[str, tuple[tuple[int, ...], int, int]], fan_in_fan_out: bool) -> set[str]:
    """The modules whose weight lies (in, out), as transformers' Conv1D.

    ``shapes``: module -> the weight's shape, outputs of B, inputs of A. The configuration's ``fan_in_fan_out`` is what
    peft last set it to, and a model may have both kinds: shapes decide, for square weights those of the same last
    name, then the flag, unless the shapes contradict it.
    """
    turned, square, evidence = set(), [], dict[str, set[bool]]()
    for module, (shape, outputs, inputs) in shapes.items():
        if outputs == inputs == shape[0] == shape[-1]:
            square.append(module)
            continue
        flipped = shape == (inputs, outputs)
        if not flipped and shape != (outputs, inputs):
            raise CheckpointError(
                f"{path}: the LoRA of {module} is for {outputs} x {inputs} weights, the base's is {shape}",
                "give the base that the adapter was trained on",
            )
        turned |= {module} if flipped else set()
        evidence.setdefault(module.rpartition(".")[2], set()).add(flipped)
    every = set().union(*evidence.values())
    for module in square:
        known = evidence.get(module.rpartition(".")[2], every | {fan_in_fan_out})
        if len(known) > 1:
            raise CheckpointError(
                f"{path}: whether {module} is stored (in, out) or (out, in) cannot be told: its weight is square, and "
                "the adapter has both kinds",
                "merge it into its base with peft (merge_and_unload) and give the full model",
            )
        turned |= {module} if known == {True} else set()
    return turned
