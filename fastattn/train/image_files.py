"""Reading image files that anyone may have made: a small file can expand to more than any memory holds."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.train.errors import DataError, brief

#: Pixels of the largest image that is read.
MOST_PIXELS = 1 << 26


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header of an image file.

    Raises:
        DataError: it cannot be read as an image, or has more than MOST_PIXELS pixels.
    """
    return _read(path, lambda image: (image.height, image.width))


def image_pixels(path: Path, mode: str) -> np.ndarray:
    """The pixels of an image file in a mode of Pillow's, uint8 ``[H, W]`` ("L") or ``[H, W, 3]`` ("RGB").

    Raises:
        DataError: as :func:`image_size`.
    """
    return _read(path, lambda image: np.array(image.convert(mode)))


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of sizes: the limit here is lower
            with Image.open(path) as image:
                if image.width * image.height <= MOST_PIXELS:
                    return read(image)
                problem = f"{image.width} x {image.height} pixels, more than the {MOST_PIXELS} that are read"
    except Exception as error:  # Pillow's readers raise many kinds for what is damaged
        problem = brief(error)
    raise DataError(path, None, f"cannot be read as an image: {problem}")
