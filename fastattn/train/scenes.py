"""Scenes of real handwritten digits (scikit-learn's), in COCO format: the detector's demonstration data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fastattn.train.output_files import write_text

#: The last digits of scikit-learn's 1,797 appear in held-out scenes only.
TRAIN_DIGITS = 1400


def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: float32 images [1797, 8, 8] in [0, 1] and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target


def compose(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, tuple[float, float, float, float]]]]:
    """One scene: uint8 [H, W] with H, W in 56..96 and one to five digits of 14 to 32 pixels on noise.

    Returns the image and, for each digit, its label and tight box (x, y, width, height) in pixels.
    """
    from PIL import Image

    height, width = rng.integers(56, 97, size=2)
    scene = rng.normal(0.15, 0.06, size=(height, width)).astype(np.float32)
    scene += np.linspace(0, rng.uniform(-0.15, 0.15), width, dtype=np.float32)  # uneven light
    placed: list[tuple[int, tuple[float, float, float, float]]] = []
    for _ in range(rng.integers(1, 6)):
        index = rng.integers(len(images))
        size_y, size_x = (rng.uniform(14, 32) * rng.uniform(0.85, 1.15, size=2)).astype(int)
        glyph = Image.fromarray((images[index] * 255).astype(np.uint8)).resize((size_x, size_y), Image.BICUBIC)
        ink = np.asarray(glyph, dtype=np.float32) / 255
        rows, columns = np.nonzero((ink > 0.25).any(1))[0], np.nonzero((ink > 0.25).any(0))[0]
        ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        h, w = ink.shape
        for _ in range(20):  # a free place, or none
            y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
            box = (float(x), float(y), float(w), float(h))
            if all(overlap(box, other) < 0.15 for _, other in placed):
                region = scene[y : y + h, x : x + w]
                np.maximum(region, ink * rng.uniform(0.7, 1.0), out=region)
                placed.append((int(labels[index]), box))
                break
    scene += rng.normal(0, 0.03, size=scene.shape)
    return (scene.clip(0, 1) * 255).astype(np.uint8), placed


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over the smaller area of two (x, y, width, height) boxes."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0) / min(a[2] * a[3], b[2] * b[3])


def write_scenes(folder: Path, count: int, seed: int, held_out: bool = False) -> Path:
    """Write ``count`` scenes as PNG files and ``annotations.json`` (COCO); returns the folder.

    Args:
        held_out: draw from the digits that training scenes never show.
    """
    from PIL import Image

    images, labels = load_digit_images()
    part = slice(TRAIN_DIGITS, None) if held_out else slice(None, TRAIN_DIGITS)
    images, labels = images[part], labels[part]
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    coco: dict[str, list[dict]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": d, "name": str(d)} for d in range(10)],
    }
    for i in range(count):
        scene, objects = compose(rng, images, labels)
        name = f"{i:06d}.png"
        Image.fromarray(scene).save(folder / name)
        coco["images"].append({"id": i, "file_name": name, "height": int(scene.shape[0]), "width": int(scene.shape[1])})
        for label, box in objects:
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    # Last, and in one step: a folder that has it is whole.
    write_text(folder / "annotations.json", json.dumps(coco))
    return folder


def write_demonstration(folder: Path, train: int = 4000, held_out: int = 200) -> Path:
    """``train``, ``validation`` and ``test`` folders of scenes, unless they are there already; returns the folder."""
    parts = (("train", train, 1), ("validation", held_out, 2), ("test", held_out, 3))
    for name, count, seed in parts:
        if not (folder / name / "annotations.json").exists():
            write_scenes(folder / name, count, seed, held_out=name != "train")
    return folder
