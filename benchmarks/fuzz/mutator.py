"""Mutations of documents and of bytes, drawn from a seed."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 2**31, 2**63 - 1, 2**63, 10**15, 10**30, 0.5, -0.0, math.nan, math.inf, 1e300,
    "", " ", "\0", "\ud800", "a" * 3000, "F32", "F8_E4M3", "C64", "I64", "BOOL", [], {}, [0], [0, 8], [8, 0], [-1],
    [10**15, 10**15], [2**62, 4, 0], [[1]], {"a": 1}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "../secret/secret.safetensors",
    "/etc/passwd", "link.safetensors", "linked/secret.safetensors", ".", "..",
    "/proc/self/mem", "model.safetensors", "model-00001-of-00002.safetensors", "name/../x.safetensors", "*", "[", "1e9",
    "0x1f", "2001-99-99", "&a", "~", "!!python/object:os.system", "path:/etc", "a.py:b", "../x.py:y",
)  # fmt: skip
TEXT = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 50_000, b'{"a":' * 20_000, b"\xff\xfe", b"\xef\xbb\xbf",
        b"\0", b"]", b"}", b",", b'"', b"\\u0000", b"\\ud800", b"- ", b": ", b"\n", b"\t",
        b"&a *a", b"<<: ")  # fmt: skip


class Mutator(random.Random):
    """Draws mutations; the same seed gives the same ones."""

    def document(self, document: Any) -> bytes:
        """A JSON document with up to three values, keys or elements changed, then perhaps its text."""
        changed = copy.deepcopy(document)
        for _ in range(self.randint(0, 3)):
            changed = self._edited(changed)
        text = json.dumps(changed).encode()
        if isinstance(changed, dict) and changed and self.random() < 0.1:
            key = self.choice(sorted(changed, key=str))
            again = json.dumps({key: self.choice([changed[key], self.choice(HOSTILE)])}).encode()
            text = text[:-1] + b", " + again[1:]
        return self.raw(text) if self.random() < 0.3 else text

    def raw(self, content: bytes) -> bytes:
        """Bytes with up to four of them flipped, cut off, repeated, or with hostile text put in."""
        data = bytearray(content)
        for _ in range(self.randint(1, 4)):
            at = self.randrange(len(data) + 1)
            kind = self.randrange(6)
            if kind < 3 and at < len(data):
                data[at] = self.randrange(256)
            elif kind == 3:
                data[at:at] = self.choice(TEXT)
            elif kind == 4:
                del data[at : at + self.choice([1, 4, 100, len(data)])]
            else:
                data[at:at] = data[at : at + self.randint(1, 64)]
        return bytes(data)

    def _edited(self, value: Any) -> Any:
        """``value`` with one place in it changed."""
        if isinstance(value, dict) and value and self.random() < 0.9:
            key = self.choice(sorted(value, key=str))
            kind = self.randrange(8)
            if kind == 0:
                del value[key]
            elif kind == 1:
                value[str(self.choice(HOSTILE))] = value.pop(key)
            elif kind == 2:
                value[str(self.choice(HOSTILE))] = self.choice(HOSTILE)
            else:
                value[key] = self._edited(value[key])
            return value
        if isinstance(value, list) and value and self.random() < 0.7:
            at = self.randrange(len(value))
            kind = self.randrange(4)
            if kind == 0:
                del value[at]
            elif kind == 1:
                value.append(copy.deepcopy(value[at]))
            else:
                value[at] = self._edited(value[at])
            return value
        if self.random() < 0.05:
            deep: Any = value
            for _ in range(self.choice([20, 200])):
                deep = [deep] if self.random() < 0.5 else {"a": deep}
            return deep
        if isinstance(value, int) and not isinstance(value, bool) and self.random() < 0.4:
            return value + self.choice([-1, 1, 8, -8, 2**31, 10**15])
        return copy.deepcopy(self.choice(HOSTILE))
