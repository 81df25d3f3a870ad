"""The final choice: which completed trial of a study wins, by its observed score, by a model, or after a race.

A study's best score is the luckiest one too: of many trials scored on the same inputs, the one is picked to which
these inputs are kindest. In a race the few best trials are scored again, on inputs that the search has not seen; the
winner is chosen by both scores, pooled in proportion to their numbers of inputs. The race goes on in rounds of a few
tasks each, and leaves out of the next round who will probably not win. That is judged from paired differences: both
models are scored on the same inputs, so that what is easy or hard for both of them cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bmm.errors import StudyError
from bmm.records import Candidate, Choice, Trial
from bmm.search.goal import Goal
from bmm.search.space import Space
from bmm.search.stopping import order_of_tasks
from bmm.search.study import best

Array = NDArray[np.float64]
Measure = Callable[[Trial, Sequence[str]], Mapping[str, Array]]
"""Scores of a trial's model on the held-out inputs of the named tasks: one number an input, by task."""

METHODS = ("observed", "model")
ROUNDS = 4
"""A race has at most so many rounds: each merges its models anew."""

RISK = 0.05
"""A model leaves the race when the probability that it ends above the leader is below this."""

_RACE = 2**31  # stands for the race where tasks are put in order; no trial has this number


def corrections(trials: Sequence[Trial], space: Space, method: str) -> dict[int, float]:
    """By completed trial, what is added to its observed objective: nothing, or (``method`` "model") what takes it to
    the mean of a Gaussian process of all completed trials."""
    done = [t for t in trials if t.status == "completed"]
    y = np.array([t.objective for t in done], dtype=np.float64)  # (n,)
    if method == "observed" or len(done) < 3:
        return {t.number: 0.0 for t in done}
    x = np.array([space.to_unit(space.point_of(t.hyperparameters)) for t in done])  # (n, d)
    from bmm.search.prior import prior_of  # these need scipy, and a merge does without
    from bmm.search.surrogate import Surrogate

    moved = Surrogate(x, y, prior=prior_of(space)).mean(x) - y  # (n,)
    return {t.number: float(value) for t, value in zip(done, moved, strict=True)}


def finalists(
    trials: Sequence[Trial], goal: Goal, moved: Mapping[int, float], count: int, inputs: Mapping[str, int]
) -> list[Trial]:
    """The ``count`` best completed trials, best first, and behind them anchor and default where these are close.

    Close is what lies within one standard error of the difference of two objectives, were they scored on other inputs
    each. ``moved`` are the `corrections`, ``inputs`` the numbers of validation inputs by task.
    """
    done = [t for t in trials if t.status == "completed"]
    if not done:
        raise StudyError("no trial of the study is completed", "resume it, or read its trials' errors")

    def rank(trial: Trial) -> tuple[float, float, int]:
        return goal.rank(replace(trial, objective=_objective(trial) + moved[trial.number]))

    ordered = sorted(done, key=rank, reverse=True)
    leader, rest = ordered[0], ordered[count:]
    variance = sum(
        (c * c * p * (1 - p) / inputs[t] for t, c in goal.coefficients().items() if 0 <= (p := leader.scores[t]) <= 1)
    )
    least = rank(leader)[1] - math.sqrt(2 * variance)
    close = [t for t in rest if t.kind != "search" and rank(t)[0] == rank(leader)[0] and rank(t)[1] >= least]
    return ordered[:count] + close


class Race:
    """Trials scored on held-out inputs, task by task, until one is left or all tasks are scored.

    Args:
        entrants: From `finalists`.
        goal: The study's.
        moved: The `corrections`.
        inputs: Numbers of the search's inputs by task.
        share: Of the validation inputs that are held out.
        measure: Scores a trial on held-out inputs.
    """

    def __init__(
        self,
        entrants: Sequence[Trial],
        goal: Goal,
        moved: Mapping[int, float],
        inputs: Mapping[str, int],
        share: float,
        measure: Measure,
    ) -> None:
        self.entrants = {t.number: t for t in entrants}
        self.goal, self.moved, self.inputs, self.measure = goal, moved, inputs, measure
        self.share, self.coefficients = share, goal.coefficients()
        self.held: dict[int, dict[str, Array]] = {number: {} for number in self.entrants}
        self.dropped: list[int] = []

    def run(self, seed: int) -> None:
        """Tasks come in an order drawn from the seed. Under a goal other than the weighted mean nobody is left out."""
        tasks = order_of_tasks(list(self.goal.reference), seed, _RACE)
        size = math.ceil(len(tasks) / ROUNDS)
        for start in range(0, len(tasks), size):
            left = self.left()
            if len(left) == 1:
                return
            for number in left:
                self.held[number] |= self.measure(self.entrants[number], tasks[start : start + size])
            broken = [number for number in left if not self._sound(number)]
            self.held |= {number: {} for number in broken}
            sound = [number for number in left if number not in broken] or left[:1]
            leader = max(sound, key=self.rank)
            self.dropped += [n for n in left if n not in sound or (n != leader and self._loses(n, leader))]
            if leader in broken:  # and so are all the others
                return

    def left(self) -> list[int]:
        return [number for number in self.entrants if number not in self.dropped]

    def winner(self) -> int:
        return max(self.left(), key=self.rank)

    def scores(self, number: int) -> dict[str, float]:
        """By task, over all inputs on which the trial was scored: the search's, and the held-out ones so far."""
        found = dict(self.entrants[number].scores)
        for task, held in self.held[number].items():
            many = self.inputs[task]
            found[task] = (many * found[task] + float(held.sum())) / (many + len(held))
        return found

    def estimate(self, number: int) -> float:
        """The objective of `scores`; the correction counts for the search's part of the inputs."""
        held = sum(len(h) for h in self.held[number].values())
        searched = sum(self.inputs.values())
        return self.goal.value(self.scores(number)) + self.moved[number] * searched / (searched + held)

    def rank(self, number: int) -> tuple[float, float, int]:
        scored = replace(self.entrants[number], scores=self.scores(number), objective=self.estimate(number))
        return self.goal.rank(scored)

    def holdout(self, number: int) -> float | None:
        """The objective on held-out inputs alone; None where tasks are missing."""
        held = self.held[number]
        return None if len(held) < len(self.inputs) else self.goal.value({t: float(h.mean()) for t, h in held.items()})

    def _sound(self, number: int) -> bool:
        """Whether the trial's held-out scores are finite and the goal has a value for them."""
        try:
            return math.isfinite(self.estimate(number)) and math.isfinite(self.holdout(number) or 0.0)
        except ValueError:
            return False

    def _loses(self, number: int, leader: int) -> bool:
        """Whether the trial will end below the leader, but for a probability of `RISK`.

        The tasks still to come are expected to show, on held-out inputs, the mean difference of the tasks so far: what
        the search saw of them is what both trials were picked for. They may differ from it as much as the search saw
        tasks differ, and by what the paired differences of inputs add.
        """
        one, other = self.held[number], self.held[leader]
        left = self.inputs.keys() - one.keys()
        if not self.goal.plain:
            return False
        if not left:
            return self.estimate(number) < self.estimate(leader)
        searched = {t: self.entrants[number].scores[t] - self.entrants[leader].scores[t] for t in self.inputs}
        held = sum(self.inputs[t] for t in left) * self.share / (1 - self.share) / len(left)  # inputs a task
        differences = np.concatenate([one[t] - other[t] for t in one])  # (inputs so far,)
        variance = float(np.var(list(searched.values()))) + float((differences**2).mean()) / max(held, 1.0)
        counts = {t: self.coefficients[t] * self.share for t in left}  # of a point on held-out inputs in the estimate
        mean = float(np.mean([one[t].mean() - other[t].mean() for t in one]))
        lead = self.estimate(leader) - self.estimate(number)
        lead -= math.fsum(count * (mean - searched[t]) for t, count in counts.items())
        variance *= math.fsum(c * c for c in counts.values()) + math.fsum(counts.values()) ** 2 / len(one)
        return 0.5 * math.erfc(lead / math.sqrt(2 * variance)) < RISK if variance else lead > 0


def choose(
    trials: Sequence[Trial],
    space: Space,
    goal: Goal,
    *,
    method: str,
    inputs: Mapping[str, int],
    seed: int,
    finalist_count: int = 0,
    share: float = 0.0,
    measure: Measure | None = None,
) -> tuple[Trial, Choice]:
    """The trial that wins, and how it came to that.

    Args:
        trials: All of the study's.
        method: One of `METHODS`: what stands for a trial's score on the search's inputs.
        inputs: Numbers of the search's validation inputs by task.
        finalist_count, share, measure: Of the race, where there is one: see `finalists` and `Race`.
    """
    moved = corrections(trials, space, method)
    entrants = finalists(trials, goal, moved, finalist_count or 1, inputs)
    observed = best(trials, goal).number
    if measure is None:
        return entrants[0], Choice(method, entrants[0].number, observed)
    race = Race(entrants, goal, moved, inputs, share, measure)
    race.run(seed)
    candidates = [
        Candidate(
            number,
            _objective(trial),
            _objective(trial) + moved[number],
            race.holdout(number),
            race.estimate(number),
            len(race.held[number]),
            number in race.dropped,
        )
        for number, trial in race.entrants.items()
    ]
    candidates.sort(key=lambda c: (not c.dropped, c.tasks, race.rank(c.trial)), reverse=True)
    number = race.winner()
    return race.entrants[number], Choice(method, number, observed, share, candidates, len(inputs))


def _objective(trial: Trial) -> float:
    assert trial.objective is not None
    return trial.objective
