"""The detection task: a COCO folder, a :class:`Detector`; judged by COCO's average precision."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastattn.models.detector import Detector, DetectorConfig, Targets
from fastattn.models.set_loss import set_loss
from fastattn.train import checkpoint as files
from fastattn.train.coco import CocoFolder, collate, draw, evaluate
from fastattn.train.errors import TrainingError
from fastattn.train.memory import build
from fastattn.train.output_files import check_output_directory, check_outputs, write_json
from fastattn.train.task import Task, digest_of


class DetectionTask(Task):
    """Set prediction with denoising queries; ``validation`` decides which weights are best.

    ``test`` (default: the validation data) is judged once, at the end.
    """

    name = "detect"
    metric = "mAP50"

    def __init__(
        self,
        train: CocoFolder,
        validation: CocoFolder,
        test: CocoFolder | None = None,
        seed: int = 0,
        **model_options,
    ):
        for data in (validation, test):
            if data is not None and data.categories != train.categories:
                raise TrainingError(
                    f"{data.path}: its categories {data.categories} differ from {train.path}'s {train.categories}"
                )
        self.train_data, self.validation, self.test = train, validation, test or validation
        torch.manual_seed(seed)
        self.config = DetectorConfig(num_classes=len(train.categories), in_channels=train.channels, **model_options)
        most = max(len(objects) for objects in train.objects)
        if most > self.config.num_queries:
            raise TrainingError(
                f"num_queries={self.config.num_queries} is too few: an image of {train.path} has {most} objects"
            )
        self.model = build(Detector, self.config)

    def lengths(self) -> list[int]:
        return [max(size) for size in self.train_data.sizes]

    def collate(self, indices: list[int]) -> tuple[torch.Tensor, ...]:
        images, sizes, targets = collate([self.train_data[i] for i in indices])
        tensors = (images, sizes, targets.labels, targets.boxes, targets.valid)
        return tuple(tensor.to(self.device) for tensor in tensors)

    def loss(self, model, batch) -> torch.Tensor:
        images, sizes, labels, boxes, valid = batch
        targets = Targets(labels, boxes, valid)
        return set_loss(model(images, sizes, targets), targets)["loss"]

    def evaluate(self) -> dict[str, float]:
        return evaluate(self.model, self.validation)

    def about_losses(self) -> str:
        return "The training loss is the sum over all decoder layers and their denoising queries."

    def report(self) -> dict[str, Any]:
        return {"images": len(self.test), **evaluate(self.model, self.test)}

    def configuration(self) -> dict[str, Any]:
        # as JSON gives it back: a resumed run compares the two
        return asdict(self.config) | {"backbone_channels": list(self.config.backbone_channels)}

    def save_files(self, directory: Path) -> None:
        names = [name for _, name in self.train_data.categories]
        write_json(directory / files.LABELS, names)

    def digest(self) -> str:
        return digest_of(self.train_data.images, self.train_data.objects)


def load_detector(directory: Path, device: torch.device, attention: str | None = None):
    """(model, label names) of a trained run."""
    model = files.load_model(Detector, DetectorConfig, directory, DetectionTask.name, attention)
    return model.to(device), files.read_labels(directory, model.config.num_classes)


@torch.no_grad()
def detect(
    model: Detector, names: list[str], paths: list[Path], threshold: float = 0.4, pictures: Path | None = None
) -> list[dict[str, Any]]:
    """What is in these image files: per file its name and the objects (label, score, box x y w h in pixels).

    With ``pictures`` each image is drawn there with its boxes and where their queries looked.
    """
    device = next(model.parameters()).device
    channels = model.config.in_channels
    found = []
    drawn = _picture_files(paths, pictures)
    for path in paths:
        example = CocoFolder.read(path, channels)
        images, sizes, _ = collate([example])
        images, sizes = images.to(device), sizes.to(device)
        prediction = {name: value.cpu() for name, value in model.predict(images, sizes)[0].items()}
        kept = prediction["scores"] >= threshold
        columns = (prediction[name][kept].tolist() for name in ("labels", "scores", "boxes"))
        objects = [
            {"label": names[label], "score": score, "box": box} for label, score, box in zip(*columns, strict=True)
        ]
        found.append({"image": str(path), "objects": objects})
        if pictures is not None:
            attention = model(images, sizes, need_weights=True).attention[0].cpu()
            draw(example.pixels, prediction, names, drawn[path], attention, threshold, model.config.stride)
    return found


def _picture_files(images: list[Path], pictures: Path | None) -> dict[Path, Path]:
    """The file in the directory ``pictures``, which is made, for each image's drawing; no two are the same."""
    if pictures is None:
        return {}
    check_output_directory(pictures, "--pictures")
    pictures.mkdir(parents=True, exist_ok=True)
    files_of = {image: pictures / f"{image.stem}.png" for image in images}
    check_outputs({f"--pictures, for {image}:": file for image, file in files_of.items()}, inputs=images)
    return files_of
