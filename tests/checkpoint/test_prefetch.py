"""Reading ahead: order, room, errors and the end, without a device."""

import threading
import time

import pytest

from bmm.checkpoint.prefetch import Prefetch


class Loads:
    """A load of known sizes that remembers what it made, and the most that ever waited."""

    def __init__(self, sizes, fail=()):
        self.sizes, self.fail = sizes, fail
        self.made, self.direct, self.taken, self.most = [], [], 0, 0

    def __call__(self, key):
        if threading.current_thread().name != "prefetch":
            self.direct.append(key)
            return f"<{key}>"
        self.most = max(self.most, sum(self.sizes[k] for k in [*self.made, key][self.taken :]))
        if key in self.fail:
            raise OSError(key)
        self.made.append(key)
        return f"<{key}>"

    def until(self, count):
        """Wait until so many are made; then a little more, for what should not be."""
        for _ in range(500):
            if len(self.made) >= count:
                break
            time.sleep(0.01)
        time.sleep(0.05)
        return len(self.made)


def started(loads, limit):
    return Prefetch(list(loads.sizes), loads, loads.sizes.__getitem__, limit)


def gone():
    return all(t.name != "prefetch" for t in threading.enumerate())


def test_items_come_in_order_and_are_made_once():
    loads = Loads(dict.fromkeys("abcdef", 10))
    with started(loads, 25) as ahead:
        found = []
        for key in loads.sizes:
            found.append(ahead.take(key))
            loads.taken += 1
    assert found == [f"<{key}>" for key in "abcdef"]
    assert loads.made == list("abcdef")
    assert not loads.direct
    assert gone()


def test_it_waits_for_room():
    loads = Loads(dict.fromkeys("abcdef", 10))
    with started(loads, 25) as ahead:
        assert loads.until(2) == 2
        for count, key in enumerate("abc", 3):
            loads.taken += 1
            assert ahead.take(key) == f"<{key}>"
            assert loads.until(count) == count
    assert loads.most == 20
    assert len(loads.made) == 5


def test_what_is_larger_than_the_room_waits_alone():
    loads = Loads({"a": 5, "b": 100, "c": 5, "d": 5})
    with started(loads, 20) as ahead:
        assert loads.until(1) == 1
        for key, after in (("a", 2), ("b", 4), ("c", 4), ("d", 4)):
            loads.taken += 1
            ahead.take(key)
            assert loads.until(after) == after
    assert loads.most == 100
    assert not loads.direct


def test_another_ones_turn_is_made_at_once():
    loads = Loads(dict.fromkeys("abc", 1))
    with started(loads, 10) as ahead:
        loads.until(3)
        assert ahead.take("c") == "<c>"  # not its turn
        assert [ahead.take(key) for key in "abc"] == ["<a>", "<b>", "<c>"]
        assert ahead.take("a") == "<a>"  # none is due
    assert loads.direct == ["c", "a"]


def test_an_error_is_raised_in_its_turn():
    loads = Loads(dict.fromkeys("abc", 1), fail="b")
    with started(loads, 10) as ahead:
        assert ahead.take("a") == "<a>"
        with pytest.raises(OSError, match="b"):
            ahead.take("b")
        assert ahead.take("c") == "<c>"
    assert loads.direct == ["c"]
    assert gone()


def test_a_size_that_cannot_be_told_is_an_error_in_its_turn():
    loads = Loads({"a": 1})
    with Prefetch(["a", "x"], loads, loads.sizes.__getitem__, 10) as ahead:
        assert ahead.take("a") == "<a>"
        with pytest.raises(KeyError):
            ahead.take("x")


def test_the_end_comes_while_it_waits_for_room():
    loads = Loads(dict.fromkeys("abcd", 10))
    ahead = started(loads, 10)
    assert loads.until(1) == 1
    ahead.close()
    assert gone()
    assert loads.made == ["a"]
