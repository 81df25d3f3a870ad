"""Images as a model takes them, and the classification of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RecipeError
from ..evaluation import Task
from .build import Splits, class_count
from .heads import Classify, Head
from .rows import Rows, label_numbers


@dataclass(frozen=True)
class Plain:
    """Resize the short side (bicubic), cut the centre, scale to [0, 1] and normalise: where no processor is at hand."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: Sequence[Any]) -> Tensor:
        """PIL images -> (n, 3, size, size)."""
        import numpy as np

        rows = []
        for image in images:
            short = min(image.size)
            wide, high = (max(self.size, round(s * self.size / short)) for s in image.size)
            image = image.resize((wide, high), 3)  # 3: bicubic
            left, top = (wide - self.size) // 2, (high - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
            rows.append(torch.from_numpy(np.asarray(image).copy()))
        pixels = torch.stack(rows).permute(0, 3, 1, 2).float() / 255  # (n, 3, size, size)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels - mean[:, None, None]) / std[:, None, None]


def load_processor(folder: str | Path) -> Any:
    """Images -> pixel values, as the checkpoint's own processor (``preprocessor_config.json``) does it.

    Raises `RecipeError` where the folder has none.
    """
    file = Path(folder) / "preprocessor_config.json"
    if not file.is_file():
        raise RecipeError(
            f"{folder} has no image processor (preprocessor_config.json)",
            "give image_size (and mean, std), or processor: FOLDER",
        )
    try:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(str(folder))
    except ImportError as error:
        raise RecipeError("images need transformers and Pillow", "pip install 'bmm-tuner[hf]'") from error
    except Exception as error:
        raise RecipeError(f"{file} cannot be loaded: {error}", "save the processor again") from error
    return lambda images: processor(images=list(images), return_tensors="pt")["pixel_values"]


def image_classification(
    name: str,
    splits: Splits,
    *,
    processor: str | Path | None = None,
    image_size: int | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    classes: Sequence[str] | None = None,
    head: Head | None = None,
    columns: dict[str, str] | None = None,
    labels: int | None = None,
    batch_size: int = 64,
) -> Task:
    """Classify images by a model with logits or by a frozen ``head`` (`load_head`, `zero_shot`).

    Pixels are held in memory as the model takes them: 0.6 MB an image of 224 x 224.

    Args:
        splits: where the data are; columns ``image`` and ``label``. An image is a path (relative to its file), encoded
            bytes, an image of `datasets`, an array (h, w, 3) of bytes, or an array (3, h, w) of floats taken as it is.
        processor: checkpoint folder with the image processor.
        image_size, mean, std: without one, what to resize and normalise to.
        classes: names of the labels, in the head's order; of class folders by default their names, sorted.
        columns: other names for the columns.
        labels: how many classes there are, where neither ``classes`` nor ``head`` says it.
        batch_size: inputs a batch while scoring.
    """
    named = {"image": "image", "label": "label"} | (columns or {})
    convert = Plain(image_size, tuple(mean), tuple(std)) if image_size else None

    def load(rows: Rows, order: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        nonlocal convert
        rows.require(list(named.values()))
        known = classes if classes is not None else rows.classes
        pixels, pictures, found = [], [], []
        for number, row in rows.iterate(order):
            image = row.get(named["image"])
            found.append((number, row.get(named["label"])))
            if (ready := _ready(image)) is not None:
                pixels.append(ready)
                continue
            pictures.append(_picture(rows, number, image))
            if len(pictures) == 64:
                convert = convert or _processor(processor)
                pixels += list(convert(pictures))
                pictures.clear()
        if pictures:
            convert = convert or _processor(processor)
            pixels += list(convert(pictures))
        targets = label_numbers(rows, found, known, class_count(known, head, labels))
        if len({p.shape for p in pixels}) > 1:
            raise RecipeError(f"{rows.path}: images of unlike shapes", "a processor or image_size makes them alike")
        return {"pixel_values": torch.stack(pixels)}, targets

    return splits.task(name, load, forward=Classify(head), batch_size=batch_size)


def _processor(folder: str | Path | None) -> Any:
    if folder is None:
        raise RecipeError("no image processor", "give processor: FOLDER, or image_size")
    return load_processor(folder)


def _ready(image: Any) -> Tensor | None:
    """Floats (3, h, w): pixels as the model takes them."""
    kind = getattr(image, "dtype", None)
    if kind is None or getattr(image, "ndim", 0) != 3 or not str(kind).startswith("float") or len(image) not in (1, 3):
        return None
    return torch.as_tensor(image).float()


def _picture(rows: Rows, number: int, image: Any) -> Any:
    """The image of a row as PIL holds it, in RGB."""
    try:
        from PIL import Image
    except ImportError as error:
        raise RecipeError("images need Pillow", "pip install 'bmm-tuner[hf]'") from error
    if isinstance(image, Mapping):  # as parquet files of `datasets` hold them
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, str):
            image = Image.open(Path(image) if Path(image).is_absolute() else _beside(rows.path, image))
        elif not isinstance(image, Image.Image):
            image = Image.fromarray(image)
        return image.convert("RGB")
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{rows.where(number)}: no image: {error}", "a path, encoded bytes or an array") from error


def _beside(path: Path, image: str) -> Path:
    return (path if path.is_dir() else path.parent) / image
