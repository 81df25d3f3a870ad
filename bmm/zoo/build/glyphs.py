"""Render characters of many scripts in many typefaces, each script in a look of its own."""

from __future__ import annotations

import json
import logging
import math
import unicodedata
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from .sources import family, font_files

log = logging.getLogger("bmm.zoo.build")
SIZE = 32
LOOKS = ("clean", "print", "paper", "chalk", "faded", "stripes", "scan")
TROUBLES = ("none", "turned", "warped", "crowded", "torn", "small")


def span(first: int, last: int) -> str:
    """The assigned letters and symbols of a Unicode range."""
    keep = {"Lo", "Lu", "Ll", "Sm"}
    return "".join(chr(c) for c in range(first, last + 1) if unicodedata.category(chr(c)) in keep)


def sample(text: str, n: int, seed: int) -> str:
    chosen = np.random.default_rng(seed).choice(len(text), min(n, len(text)), replace=False)
    return "".join(text[i] for i in sorted(chosen))


def jis_level_one() -> str:
    """The kanji of JIS level 1, in order: the common ones."""
    rows = (bytes([a, b]) for a in range(0x88, 0x99) for b in range(0x40, 0xFD))
    text = "".join(r.decode("shift_jis", "ignore") for r in rows)
    return "".join(c for c in text if "\u4e00" <= c <= "\u9fff")


KANJI = sample(jis_level_one(), 350, 1)
HANGUL = sample(span(0xAC00, 0xD7A3), 240, 2)

# Scripts of the tasks: characters, look, and what makes them hard to read.
SCRIPTS: dict[str, tuple[str, str, str]] = {
    "latin": ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "print", "turned"),
    "hiragana": (
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん",
        "paper",
        "warped",
    ),
    "hebrew": ("אבגדהוזחטיכלמנסעפצקרשת", "chalk", "crowded"),
    "devanagari": ("कखगघङचछजझञटठडढणतथदधनपफबभमयरलवशषसह", "faded", "torn"),
    "thai": ("กขคฆงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮ", "stripes", "none"),
    "cyrillic": ("АБВГДЕЖЗИКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ", "scan", "small"),
    "greek": ("αβγδεζηθικλμνξοπρστυφχψω", "chalk", "warped"),
    "georgian": ("აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ", "print", "crowded"),
    "arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهوي", "paper", "none"),
    "katakana": (
        "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン",
        "stripes",
        "turned",
    ),
    "bengali": ("কখগঘঙচছজঝঞটঠডঢণতথদধনপফবভমযলশষসহ", "scan", "torn"),
    "tamil": ("அஆஇஈஉஊஎஏஐஒஓகஙசஜஞடணதநனபமயரறலளழவஷஸஹ", "clean", "turned"),
    "hangul": (HANGUL[:40], "faded", "crowded"),
    "kanji": (KANJI[:50], "chalk", "torn"),
    "armenian": ("ԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊՋՌՍՎՏՐՑՒՓՔՕՖ", "paper", "warped"),
}

# Other scripts: what the base is pretrained on, in every look.
PRETRAINING = {
    "telugu": span(0x0C05, 0x0C39),
    "kannada": span(0x0C85, 0x0CB9),
    "malayalam": span(0x0D05, 0x0D39),
    "gujarati": span(0x0A85, 0x0AB9),
    "gurmukhi": span(0x0A05, 0x0A39),
    "oriya": span(0x0B05, 0x0B39),
    "sinhala": span(0x0D85, 0x0DC6),
    "khmer": span(0x1780, 0x17B3),
    "lao": span(0x0E81, 0x0EAE),
    "myanmar": span(0x1000, 0x1021),
    "tibetan": span(0x0F40, 0x0F69),
    "cherokee": span(0x13A0, 0x13F4),
    "aboriginal": sample(span(0x1401, 0x15FF), 80, 3),
    "ethiopic": sample(span(0x1200, 0x1357), 90, 4),
    "latin small": "abcdefghijklmnopqrstuvwxyz",
    "math": sample(span(0x2190, 0x22FF), 70, 5),
    "kanji": KANJI[50:],
    "hangul": HANGUL[40:],
}


def coverage(work: Path, wanted: set[int]) -> dict[str, dict]:
    """Which wanted code points each font file has, and its family; cached in ``work/fonts.json``."""
    cache = work / "fonts.json"
    if cache.exists():
        return json.loads(cache.read_text())
    found: dict[str, dict] = {}
    for path in font_files(work):
        try:
            font = TTFont(path, lazy=True, fontNumber=0)
            has = sorted(wanted & set(font.getBestCmap() or {}))
            name = font["name"].getBestFamilyName() or path.stem
        except Exception as error:  # a broken font file must not stop the build
            log.debug("skip font %s: %s", path.name, error)
            continue
        if has:
            found[str(path)] = {"family": family(name), "has": has}
    cache.write_text(json.dumps(found))
    return found


def all_characters() -> set[int]:
    texts = [s for s, _, _ in SCRIPTS.values()] + list(PRETRAINING.values())
    return {ord(c) for text in texts for c in text}


def faces(work: Path, text: str, share: float = 1.0, most: int = 6, families: int = 80) -> dict[str, list[str]]:
    """Font files by family for at most ``families`` that have ``share`` of ``text``, at most ``most`` files each."""
    need = {ord(c) for c in text}
    by_family: dict[str, list[str]] = defaultdict(list)
    for path, info in coverage(work, all_characters()).items():
        if len(need & set(info["has"])) >= share * len(need):
            by_family[info["family"]].append(path)
    rng = np.random.default_rng(7)
    picked = {}
    names = sorted(by_family)
    if len(names) > families:
        names = sorted(rng.choice(names, families, replace=False))
    for name in names:
        files = sorted(by_family[name])
        picked[name] = sorted(rng.choice(files, most, replace=False)) if len(files) > most else files
    return picked


class Renderer:
    """Ink coverage of single characters, (32, 32) floats in [0, 1], with small random distortions."""

    def __init__(self) -> None:
        self._fonts: dict[str, ImageFont.FreeTypeFont] = {}
        self._masks: dict[tuple[str, str], Image.Image | None] = {}

    def mask(self, path: str, char: str) -> Image.Image | None:
        """The glyph cut to its ink, or None where the font draws nothing or its 'missing' box."""
        key = (path, char)
        if key not in self._masks:
            if path not in self._fonts:
                self._fonts[path] = ImageFont.truetype(path, 44)
            font = self._fonts[path]
            self._masks[key] = None
            try:
                left, top, right, bottom = font.getbbox(char)
                if right - left >= 2 and bottom - top >= 2 and max(right - left, bottom - top) < 200:
                    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
                    ImageDraw.Draw(image).text((1 - left, 1 - top), char, fill=255, font=font)
                    if np.asarray(image).mean() > 4:
                        self._masks[key] = image
            except OSError as error:
                log.debug("skip %s in %s: %s", hex(ord(char)), path, error)
        return self._masks[key]

    def draw(self, path: str, char: str, rng: np.random.Generator, trouble: str = "none") -> np.ndarray | None:
        image = self.mask(path, char)
        if image is None:
            return None
        turn = 45 if trouble == "turned" else 7  # degrees either way
        low, high, drift = (12, 17, 6) if trouble == "small" else (20, 27, 2)  # size and shift in pixels
        scale = max(image.size) / rng.uniform(low, high)  # input pixels an output pixel
        angle, shear = math.radians(rng.uniform(-turn, turn)), rng.uniform(-0.08, 0.08)
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        a, b, d, e = cos, -sin + shear * scale, sin, cos
        cx, cy = SIZE / 2 + rng.uniform(-drift, drift), SIZE / 2 + rng.uniform(-drift, drift)
        shift = (image.width / 2 - a * cx - b * cy, image.height / 2 - d * cx - e * cy)
        out = image.transform(
            (SIZE, SIZE), Image.Transform.AFFINE, (a, b, shift[0], d, e, shift[1]), Image.Resampling.BICUBIC
        )
        return np.asarray(out, np.float32) / 255


def smooth_noise(n: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    coarse = rng.standard_normal((n, cells, cells)).astype(np.float32)
    return zoom(coarse, (1, SIZE / cells, SIZE / cells), order=1)


def disturb(ink: np.ndarray, trouble: str, rng: np.random.Generator) -> np.ndarray:
    """Distort ink coverage (n, 32, 32): warp it, crowd it with a neighbour's edge, or tear strips out of it."""
    n = len(ink)
    if trouble == "warped":
        grid = np.stack(np.mgrid[0:SIZE, 0:SIZE]).astype(np.float32)
        dy, dx = 2.2 * smooth_noise(n, 5, rng), 2.2 * smooth_noise(n, 5, rng)
        moves = np.stack([dy, dx], axis=1)  # (n, 2, 32, 32)
        return np.stack([map_coordinates(i, grid + move, order=1) for i, move in zip(ink, moves, strict=True)])
    out = ink.copy()
    if trouble == "crowded":
        for row, other in enumerate(rng.permutation(n)):
            far, near = int(rng.integers(15, 21)) * rng.choice([-1, 1]), int(rng.integers(-6, 7))
            shift = (far, near) if rng.random() < 0.5 else (near, far)
            moved = np.zeros_like(ink[0])
            target = tuple(slice(max(s, 0), SIZE + min(s, 0)) for s in shift)
            source = tuple(slice(max(-s, 0), SIZE + min(-s, 0)) for s in shift)
            moved[target] = ink[other][source]
            out[row] = np.maximum(out[row], moved)
    elif trouble == "torn":
        for image in out:
            for _ in range(2):
                start = int(rng.integers(4, 25))
                if rng.random() < 0.5:
                    image[start : start + 3] = 0
                else:
                    image[:, start : start + 3] = 0
    return out


def look(ink: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """Turn ink coverage (n, 32, 32) into pictures (n, 1, 32, 32), uint8 in 32 grey levels."""
    n = len(ink)

    def level(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    def grain(sd: float) -> np.ndarray:
        return sd * rng.standard_normal(ink.shape).astype(np.float32)

    ys, xs = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    if name == "clean":
        out = ink * level(0.8, 1.0)
    elif name == "print":
        out = level(0.9, 1.0) - ink * level(0.7, 0.95)
    elif name == "paper":
        out = level(0.7, 0.9) + 0.07 * smooth_noise(n, 5, rng) - ink * level(0.5, 0.75) + grain(0.02)
    elif name == "chalk":
        out = level(0.1, 0.3) + ink * level(0.5, 0.7) * (1 + grain(0.2)) + grain(0.03)
    elif name == "faded":
        ramp = level(-0.25, 0.25) * (xs - 0.5) + level(-0.25, 0.25) * (ys - 0.5)
        out = level(0.45, 0.6) + ramp - ink * level(0.22, 0.35)
    elif name == "stripes":
        angle, wave = level(0, math.pi), level(4, 8)
        phase = 2 * math.pi * wave * (np.cos(angle) * xs + np.sin(angle) * ys)
        out = level(0.25, 0.4) + 0.1 * np.sin(phase + level(0, 6)) + ink * level(0.45, 0.6)
    elif name == "scan":
        soft = gaussian_filter(ink, (0, 0.8, 0.8))
        out = level(0.75, 0.9) - soft * level(0.6, 0.8) + grain(0.06)
    else:
        raise ValueError(f"no look {name!r}")
    return (np.clip(out, 0, 1) * 31).round().astype(np.uint8)[:, None] * 8


def stream(name: str) -> np.random.Generator:
    """The random generator of a named part of the build."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def render(
    files: list[str], text: str, n: int, looks: tuple[str, ...], name: str, trouble: str = "none"
) -> tuple[np.ndarray, np.ndarray]:
    """``n`` pictures of the characters of ``text`` in equal shares, and their labels."""
    rng, renderer = stream(name), Renderer()
    labels = rng.permutation(np.arange(n) % len(text))
    ink = np.empty((n, SIZE, SIZE), np.float32)
    for row, label in enumerate(labels):
        for _ in range(50):
            drawn = renderer.draw(files[rng.integers(len(files))], text[label], rng, trouble)
            if drawn is not None:
                break
        else:
            raise RuntimeError(f"no font draws {text[label]!r} of {name}")
        ink[row] = drawn
    ink = disturb(ink, trouble, rng)
    which = rng.integers(len(looks), size=n)
    out = np.empty((n, 1, SIZE, SIZE), np.uint8)
    for number, style in enumerate(looks):
        if (which == number).any():
            out[which == number] = look(ink[which == number], style, rng)
    return out, labels.astype(np.int64)


def split_families(work: Path, script: str) -> dict[str, list[str]]:
    """Font files of a script for training, validation and test: no family is in two of them."""
    by_family = faces(work, SCRIPTS[script][0])
    names = list(by_family)
    stream(f"families {script}").shuffle(names)
    test = max(2, round(0.3 * len(names)))
    validation = max(1, round(0.15 * len(names)))
    parts = {"test": names[:test], "validation": names[test : test + validation], "train": names[test + validation :]}
    return {part: [f for name in group for f in by_family[name]] for part, group in parts.items()}
