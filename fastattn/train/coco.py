"""Object-detection data in COCO's format: loading, batching, evaluation and drawing."""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastattn.models.detector import Targets
from fastattn.models.fields import Range, Size, shown
from fastattn.train.errors import DataError
from fastattn.train.image_files import image_pixels, image_size
from fastattn.train.input_files import Fields, is_list_of, read_json
from fastattn.train.output_files import write_figure

#: Grey levels (0 to 1) are shifted and scaled to about zero mean and unit variance.
MEAN, STD = 0.2, 0.25
#: Images are decoded once and kept in memory, up to this many bytes of pixels.
CACHE_BYTES = 1 << 30

Id = Annotated[int, Range(-(1 << 53), 1 << 53)]
Flag = Annotated[int, Range(0, 1)]
Area = Annotated[float, Range(0, math.inf)]
#: Of a box; no image has as many.
PIXELS = Range(-(1 << 31), 1 << 31)


@dataclass(frozen=True)
class Example:
    """One image before batching: pixels uint8 [C, H, W], labels [T], boxes [T, 4] (x, y, w, h in pixels)."""

    pixels: Tensor
    labels: Tensor
    boxes: Tensor
    image_id: int


class CocoFolder(Dataset):
    """A folder of images with an ``annotations.json`` beside them.

    Ids may be any integers; ``categories`` maps the label used here (0, 1, ...) to (id, name), and
    ``sizes`` holds the images' (height, width).  Crowd annotations are left out of the training data.  Images are
    read as grey where ``channels`` is 1, as RGB where it is 3, and kept up to CACHE_BYTES of them.

    Raises:
        DataError: ``annotations.json`` is missing or no COCO JSON, describes no image, or gives an id twice, or an
            annotation names an unknown image or category or a box without area or outside its image; an image is
            missing, is none, is too large, or has another size than its description.  An image whose data are cut
            off is found when it is read.
    """

    def __init__(self, folder: str | Path, channels: int = 1) -> None:
        self.folder, self.channels = Path(folder), channels
        self.path = self.folder / "annotations.json"
        if not self.path.is_file():
            raise DataError(self.path, None, "no such file; a COCO folder holds images and annotations.json")
        coco = Fields(self.path, "not a COCO annotation file", read_json(self.path))
        images = coco.objects("images")
        if not images:
            raise DataError(self.path, None, "describes no image")
        self.images = [{"id": image.get("id", Id), "file_name": _file_name(image)} for image in images]
        index_of = _distinct(images, self.images)
        categories = coco.objects("categories")
        self.categories = [(c.get("id", Id), c.get("name", str)) for c in categories]
        label_of = _distinct(categories, [{"id": category} for category, _ in self.categories])
        self.annotations = []
        self.objects: list[list[tuple[int, list[float]]]] = [[] for _ in self.images]
        annotations = coco.objects("annotations")
        for number, fields in enumerate(annotations, 1):
            annotation = {"id": fields.get("id", Id, number)}
            fields.where = f"annotation {annotation['id']}"
            annotation |= {name: fields.get(name, Id) for name in ("image_id", "category_id")}
            if annotation["image_id"] not in index_of:
                raise fields.error(f"image_id {annotation['image_id']} is not among the images")
            if annotation["category_id"] not in label_of:
                raise fields.error(f"category_id {annotation['category_id']} is not a category")
            index, label = index_of[annotation["image_id"]], label_of[annotation["category_id"]]
            box = annotation["bbox"] = _box(fields)
            annotation["area"] = fields.get("area", Area, box[2] * box[3])  # pycocotools asks for both
            annotation["iscrowd"] = fields.get("iscrowd", Flag, 0)
            if not annotation["iscrowd"]:
                self.objects[index].append((label, box))
            self.annotations.append(annotation)
        _distinct(annotations, self.annotations)
        self.sizes = [self._size(image, fields) for image, fields in zip(self.images, images, strict=True)]
        for fields, annotation in zip(annotations, self.annotations, strict=True):
            _require_inside(fields, annotation["bbox"], *self.sizes[index_of[annotation["image_id"]]])
        self._pixels: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def _size(self, image: dict, fields: Fields) -> tuple[int, int]:
        """(height, width) from the header of the image's file."""
        path = self.folder / image["file_name"]
        height, width = image_size(path)
        described = fields.get("height", Size, height), fields.get("width", Size, width)
        if described != (height, width):
            raise DataError(path, None, f"has (height, width) {(height, width)}, but {self.path} says {described}")
        image |= {"height": height, "width": width}
        return height, width

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        pixels = self._pixels.get(index)
        if pixels is None:
            pixels = self.read(self.folder / self.images[index]["file_name"], self.channels).pixels
            if self._cached_bytes + pixels.numel() <= CACHE_BYTES:
                self._pixels[index] = pixels
                self._cached_bytes += pixels.numel()
        objects = self.objects[index]
        labels = torch.tensor([label for label, _ in objects], dtype=torch.long)
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        return Example(pixels, labels, boxes, self.images[index]["id"])

    @staticmethod
    def read(path: Path, channels: int) -> Example:
        """An image file without annotations."""
        pixels = image_pixels(path, "L" if channels == 1 else "RGB")
        pixels = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        return Example(pixels, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), image_id=0)


def _distinct(fields: list[Fields], objects: list[dict]) -> dict[int, int]:
    """The place of each id, which no two of the objects share."""
    place_of: dict[int, int] = {}
    for place, (described, one) in enumerate(zip(fields, objects, strict=True)):
        if place_of.setdefault(one["id"], place) != place:
            raise described.error(f"the id {one['id']} is {fields[place_of[one['id']]].where}'s already")
    return place_of


def _file_name(image: Fields) -> str:
    name = image.get("file_name", str)
    if not name or "\0" in name:
        raise image.error(f"file_name must be the name of a file, got {name!r}")
    return name


def _box(annotation: Fields) -> list[float]:
    """[x, y, width, height]."""
    box = annotation.values.get("bbox")
    is_numbers = is_list_of(box, float) and len(box) == 4 and all(PIXELS.holds(v) for v in box)
    if not is_numbers or min(box[2:]) <= 0:
        raise annotation.error(f"bbox must be [x, y, width, height] with a positive area, got {shown(box)}")
    return [float(v) for v in box]


def _require_inside(annotation: Fields, box: list[float], height: int, width: int) -> None:
    """Raise where a box reaches beyond its image by more than a pixel, which rounding or counting from 1 may do."""
    x, y, w, h = box
    if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
        raise annotation.error(f"bbox {box} reaches beyond its image, whose (height, width) are {(height, width)}")


def collate(examples: list[Example]) -> tuple[Tensor, Tensor, Targets]:
    """Pad to a batch: images [B, C, H, W] (normalised, padding 0), sizes int [B, 2], targets."""
    height = max(e.pixels.shape[1] for e in examples)
    width = max(e.pixels.shape[2] for e in examples)
    most = max(len(e.labels) for e in examples)
    batch = len(examples)
    images = torch.zeros(batch, examples[0].pixels.shape[0], height, width)
    sizes = torch.zeros(batch, 2, dtype=torch.long)
    labels = torch.zeros(batch, most, dtype=torch.long)
    boxes = torch.full((batch, most, 4), 0.5)
    valid = torch.zeros(batch, most, dtype=torch.bool)
    for i, example in enumerate(examples):
        _, h, w = example.pixels.shape
        images[i, :, :h, :w] = (example.pixels.float() / 255 - MEAN) / STD
        sizes[i] = torch.tensor((h, w))
        count = len(example.labels)
        corner, size = example.boxes[:, :2], example.boxes[:, 2:]
        boxes[i, :count] = torch.cat((corner + size / 2, size), dim=1) / torch.tensor((w, h, w, h))
        labels[i, :count] = example.labels
        valid[i, :count] = True
    return images, sizes, Targets(labels, boxes, valid)


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: CocoFolder, batch_size: int = 50) -> dict[str, float]:
    """COCO's average precision over a data set: ``mAP`` (IoU 0.50 to 0.95) and ``mAP50``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(data), batch_size):
        examples = [data[i] for i in range(start, min(start + batch_size, len(data)))]
        images, sizes, _ = collate(examples)
        for example, prediction in zip(examples, model.predict(images.to(device), sizes.to(device)), strict=True):
            columns = (prediction[name].tolist() for name in ("scores", "labels", "boxes"))
            found += [
                {
                    "image_id": example.image_id,
                    "category_id": data.categories[label][0],
                    "bbox": box,
                    "score": score,
                }
                for score, label, box in zip(*columns, strict=True)
            ]
    model.train(was_training)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": data.images,
            "annotations": data.annotations,
            "categories": [{"id": category, "name": name} for category, name in data.categories],
        }
        truth.createIndex()
        scores = COCOeval(truth, truth.loadRes(found), "bbox")
        scores.evaluate()
        scores.accumulate()
        scores.summarize()
    return {"mAP": float(scores.stats[0]), "mAP50": float(scores.stats[1])}


def draw(
    pixels: Tensor,  # uint8 [C, H, W]
    prediction: dict[str, Tensor],
    names: list[str],
    path: Path,
    attention: Tensor | None = None,  # [Q, H', W'], one map per query
    threshold: float = 0.4,
    stride: int = 8,
) -> None:
    """Save a picture of the boxes found, and beside it where each of their queries looked.

    ``stride``: pixels per cell of the attention maps.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    image = pixels.permute(1, 2, 0).numpy()
    shown = (prediction["scores"] >= threshold).nonzero()[:, 0].tolist()
    panels = 1 + (len(shown) if attention is not None else 0)
    figure = Figure(figsize=(3 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    colours = [f"C{i % 10}" for i in range(max(panels, len(shown)))]
    for axis in axes:
        axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
    for colour, i in zip(colours, shown, strict=False):
        x, y, w, h = prediction["boxes"][i].tolist()
        axes[0].add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=2))
        text = f"{names[prediction['labels'][i]]} {prediction['scores'][i]:.2f}"
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
        axes[0].text(x, y - 1.5, text, color="white", fontsize=7, verticalalignment="bottom", bbox=box)
    for axis, colour, i in zip(axes[1:], colours, shown, strict=False):
        weights = attention[prediction["queries"][i]].float().numpy()
        axis.imshow(
            weights,
            cmap="inferno",
            alpha=0.65,
            extent=(-0.5, weights.shape[1] * stride - 0.5, weights.shape[0] * stride - 0.5, -0.5),
            interpolation="bilinear",
        )
        axis.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))  # the last cells reach beyond
        axis.set_title(names[prediction["labels"][i]], color=colour, fontsize=9)
    write_figure(path, figure, dpi=120)
