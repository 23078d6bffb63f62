"""The detector: its loss and matching against hand-computed and brute-force values, its data, its training."""

import itertools
import json
import math
import shutil

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("PIL")

from fastattn.models.detector import (
    Detector,
    DetectorConfig,
    MaskedGroupNorm,
    Targets,
    denoising_mask,
    inside_image,
    inverse_sigmoid,
)
from fastattn.models.set_loss import corners, focal_loss, generalized_iou, match, set_loss
from fastattn.train import coco as coco_data
from fastattn.train.coco import CocoFolder, collate, evaluate
from fastattn.train.detect import DetectionTask, detect, load_detector
from fastattn.train.errors import DataError, OutputError, TrainingError
from fastattn.train.loop import Run
from fastattn.train.options import TrainOptions
from fastattn.train.scenes import compose, load_digit_images, write_scenes

SMALL = {
    "backbone_channels": (8, 16, 16),
    "embed_dim": 32,
    "feedforward_dim": 32,
    "decoder_layers": 2,
    "num_queries": 8,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 24, seed=3)


def batch_of(count=3, seed=0, config=None):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 40, 56, generator=generator)
    sizes = torch.tensor([[40, 56], [33, 56], [40, 41]])[:count]
    labels = torch.randint(10, (count, 4), generator=generator)
    boxes = torch.rand(count, 4, 4, generator=generator) * 0.3 + 0.2
    valid = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])[:count]
    return images, sizes, Targets(labels, boxes, valid)


def test_generalized_iou_of_hand_computed_boxes():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    same, half, apart = a, torch.tensor([[1.0, 0.0, 3.0, 2.0]]), torch.tensor([[3.0, 0.0, 4.0, 2.0]])
    assert generalized_iou(a, same).item() == 1.0
    assert generalized_iou(a, half).item() == pytest.approx(2 / 6)  # overlap 2, union 6, hull 6
    assert generalized_iou(a, apart).item() == pytest.approx(0 - (8 - 6) / 8)
    assert torch.equal(corners(torch.tensor([1.0, 2.0, 2.0, 4.0])), torch.tensor([0.0, 0.0, 2.0, 4.0]))


def test_focal_loss_of_hand_computed_values():
    logit = torch.tensor([0.0, 2.0])
    p = 1 / (1 + math.exp(-2.0))
    expected = torch.tensor([0.25 * 0.5**2 * math.log(2), 0.75 * p**2 * -math.log(1 - p)])
    torch.testing.assert_close(focal_loss(logit, torch.tensor([1.0, 0.0])), expected)


def test_matching_is_the_cheapest_of_all_assignments():
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 5, 10), torch.rand(1, 5, 4) * 0.4 + 0.2
    targets = Targets(torch.tensor([[3, 7, 3]]), torch.rand(1, 3, 4) * 0.4 + 0.2, torch.tensor([[True, True, True]]))

    def cost(queries):
        total = 0.0
        for t, q in enumerate(queries):
            p = logits[0, q, targets.labels[0, t]].sigmoid()
            total += 2 * (0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log())
            total += 5 * (boxes[0, q] - targets.boxes[0, t]).abs().sum()
            total -= 2 * generalized_iou(corners(boxes[0, q]), corners(targets.boxes[0, t]))
        return float(total)

    best = min(itertools.permutations(range(5), 3), key=cost)
    _, query, target = match(logits, boxes, targets)
    assert dict(zip(target.tolist(), query.tolist(), strict=True)) == dict(enumerate(best))


def test_denoising_queries_cannot_leak_the_answer():
    mask = denoising_mask(groups=2, targets=3, queries=4)
    assert not mask[6:, :6].any()  # the matching queries see no denoising query
    assert not mask[:3, 3:6].any() and not mask[3:6, :3].any()  # nor does another group
    assert mask[:, 6:].all() and mask[:3, :3].all()
    torch.manual_seed(0)
    model = Detector(DetectorConfig(**SMALL, attention="naive")).train()
    images, sizes, targets = batch_of()
    with_answer, without = model(images, sizes, targets), model(images, sizes)
    torch.testing.assert_close(with_answer.logits[-1], without.logits[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(with_answer.boxes[-1], without.boxes[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["fastattn", "torch", "naive"])
def test_padding_changes_nothing(attention):
    """An image of odd size alone, and in a batch with a larger one."""
    torch.manual_seed(0)
    model = Detector(DetectorConfig(**SMALL, attention=attention)).eval()
    torch.nn.init.normal_(model.box_head[-1].weight)  # it begins at 0: every box would be its anchor
    for norm in model.backbone.norms:
        torch.nn.init.normal_(norm.bias)  # or padding would be near 0 by itself
    image = torch.randn(1, 1, 41, 47)
    padded = torch.randn(2, 1, 64, 80)
    padded[0] = 0.0
    padded[0, :, :41, :47] = image[0]
    alone = model(image, torch.tensor([[41, 47]]), need_weights=True)
    batched = model(padded, torch.tensor([[41, 47], [64, 80]]), need_weights=True)
    for ours, theirs in ((batched.logits, alone.logits), (batched.boxes, alone.boxes)):
        torch.testing.assert_close(ours[-1][:1], theirs[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batched.attention[:1, :, :6, :6], alone.attention, rtol=1e-4, atol=1e-5)
    assert not batched.attention[0, :, 6:].any() and not batched.attention[0, :, :, 6:].any()


def test_masked_norm_is_group_norm_of_the_image():
    torch.manual_seed(0)
    norm = MaskedGroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, sizes = torch.randn(2, 8, 5, 7), torch.tensor([[5, 7], [3, 4]])
    out = norm(x, inside_image(sizes, 5, 7).float())
    plain = torch.nn.functional.group_norm
    torch.testing.assert_close(out[:1], plain(x[:1], 4, norm.weight, norm.bias))
    torch.testing.assert_close(out[1:, :, :3, :4], plain(x[1:, :, :3, :4], 4, norm.weight, norm.bias))
    assert not out[1, :, 3:].any() and not out[1, :, :, 4:].any()


@pytest.mark.parametrize("reference", ["torch", "naive"])
def test_attention_implementations_agree(reference):
    images, sizes, targets = batch_of()
    results = {}
    for attention in ("fastattn", reference):
        torch.manual_seed(1)
        model = Detector(DetectorConfig(**SMALL, attention=attention)).train()
        losses = set_loss(model(images, sizes, targets), targets)
        losses["loss"].backward()
        results[attention] = (losses["loss"].detach(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(results["fastattn"][0], results[reference][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(results["fastattn"][1], results[reference][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


def test_loss_curves_coincide_over_100_steps():
    """At a rate at which no rounding decides whom the matching chooses: from there on curves differ for any two."""
    curves = []
    for attention in ("fastattn", "torch", "naive"):
        torch.manual_seed(0)
        model = Detector(DetectorConfig(**SMALL, attention=attention)).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        curve = []
        for step in range(100):
            images, sizes, targets = batch_of(seed=step % 5)
            torch.manual_seed(step)  # of the denoising queries
            loss = set_loss(model(images, sizes, targets), targets)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    ours, torchs, naive = curves
    assert naive[-5:].mean() < 0.8 * naive[:5].mean()
    assert (ours - naive).abs().max() < 1e-3
    assert (ours - torchs).abs().max() < 1e-3


def test_loss_without_objects_and_without_denoising():
    images, sizes, targets = batch_of(1)
    targets = Targets(targets.labels[:, :0], targets.boxes[:, :0], targets.valid[:, :0])
    model = Detector(DetectorConfig(**SMALL, attention="naive")).train()
    losses = set_loss(model(images, sizes, targets), targets)
    assert losses["l1"] == 0 and losses["giou"] == 0 and losses["class"] > 0
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_inverse_sigmoid_inverts():
    x = torch.tensor([0.001, 0.3, 0.999])
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)


def test_scene_boxes_hold_the_ink():
    import numpy as np

    images, labels = load_digit_images()
    scene, objects = compose(np.random.default_rng(5), images, labels)
    assert 1 <= len(objects) <= 5
    for label, (x, y, w, h) in objects:
        assert 0 <= label <= 9 and x >= 0 and y >= 0 and x + w <= scene.shape[1] and y + h <= scene.shape[0]
        inside = scene[int(y) : int(y + h), int(x) : int(x + w)]
        assert inside.max() > scene.mean() + 60


def test_perfect_predictions_have_map_one(scenes):
    pytest.importorskip("pycocotools")
    data = CocoFolder(scenes)

    class Oracle(torch.nn.Linear):
        def predict(self, images, sizes):
            start, self.next = self.next, self.next + len(images)
            examples = [data[i] for i in range(start, self.next)]
            return [{"scores": torch.ones(len(e.labels)), "labels": e.labels, "boxes": e.boxes} for e in examples]

    oracle = Oracle(1, 1)
    oracle.next = 0
    assert evaluate(oracle, data, batch_size=7) == {"mAP": 1.0, "mAP50": 1.0}


def test_collate_gives_relative_centres(scenes):
    data = CocoFolder(scenes)
    examples = [data[0], data[1]]
    images, sizes, targets = collate(examples)
    for i, example in enumerate(examples):
        height, width = sizes[i].tolist()
        assert example.pixels.shape == (1, height, width)
        x, y, w, h = example.boxes[0].tolist()
        expected = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        torch.testing.assert_close(targets.boxes[i, 0], torch.tensor(expected))
        assert int(targets.valid[i].sum()) == len(example.labels)
        assert not images[i, :, height:].any() and not images[i, :, :, width:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 1: category_id 99"),
        (lambda c: c["annotations"][0].update(image_id=-1), "annotation 1: image_id -1"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 0, 5]), "bbox must be"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, "3", 5]), "bbox must be"),
        (lambda c: c["annotations"][0].update(bbox=[1, float("nan"), 3, 5]), "bbox must be"),
        (lambda c: c["images"][2].pop("file_name"), "not a COCO annotation file"),
        (lambda c: c.update(annotations=[1]), "not a COCO annotation file"),
        (lambda c: c.update(images=[]), "describes no image"),
        (lambda c: c.pop("categories"), "not a COCO annotation file"),
    ],
)
def test_bad_annotations_are_named(scenes, tmp_path, change, message):
    coco = json.loads((scenes / "annotations.json").read_text())
    change(coco)
    (tmp_path / "annotations.json").write_text(json.dumps(coco))
    with pytest.raises(DataError, match=message) as error:
        CocoFolder(tmp_path)
    assert str(tmp_path / "annotations.json") in str(error.value)


def copied(scenes, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(scenes, folder)
    return folder


def test_missing_and_unreadable_files_are_named(scenes, tmp_path):
    with pytest.raises(DataError, match="annotations.json: no such file"):
        CocoFolder(tmp_path / "nowhere")
    folder = copied(scenes, tmp_path)
    image = folder / "000003.png"
    whole = image.read_bytes()
    image.write_bytes(b"\x89PNG but not really")
    with pytest.raises(DataError, match=r"000003\.png: cannot be read as an image"):
        CocoFolder(folder)
    image.write_bytes(whole[:-200])  # its header is in order
    with pytest.raises(DataError, match=r"000003\.png: cannot be read as an image: .*truncated"):
        CocoFolder(folder)[3]
    image.unlink()
    with pytest.raises(DataError, match=r"000003\.png: cannot be read as an image: .*No such file"):
        CocoFolder(folder)
    (folder / "annotations.json").write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(DataError, match=r"annotations\.json:2: not JSON"):
        CocoFolder(folder)


def test_an_image_of_another_size_than_described(scenes, tmp_path):
    folder = copied(scenes, tmp_path)
    shutil.copy(folder / "000001.png", folder / "000000.png")
    with pytest.raises(DataError, match=r"000000\.png: has \(height, width\) .*annotations\.json says"):
        CocoFolder(folder)


def test_annotations_without_what_only_masks_need(scenes, tmp_path):
    """Many exporters leave out area, iscrowd, and the images' sizes."""
    pytest.importorskip("pycocotools")
    folder = copied(scenes, tmp_path)
    coco = json.loads((folder / "annotations.json").read_text())
    for annotation in coco["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["id"]
    for image in coco["images"]:
        del image["height"], image["width"]
    (folder / "annotations.json").write_text(json.dumps(coco))
    data, whole = CocoFolder(folder), CocoFolder(scenes)
    assert data.sizes == whole.sizes == [tuple(example.pixels.shape[1:]) for example in whole]
    torch.manual_seed(0)
    model = Detector(DetectorConfig(**SMALL))
    assert evaluate(model, data) == evaluate(model, whole)


def test_images_are_kept_in_memory_up_to_a_limit(scenes, monkeypatch):
    data = CocoFolder(scenes)
    monkeypatch.setattr(coco_data, "CACHE_BYTES", 2 * 56 * 56)
    examples = [data[i] for i in range(len(data))]
    assert sum(pixels.numel() for pixels in data._pixels.values()) <= 2 * 56 * 56 < 24 * 56 * 56
    assert all(torch.equal(data[i].pixels, example.pixels) for i, example in enumerate(examples))


def test_more_objects_than_queries_is_an_error(scenes):
    data = CocoFolder(scenes)
    with pytest.raises(TrainingError, match="num_queries=1 is too few"):
        DetectionTask(data, data, num_queries=1)


def test_a_short_run_learns_saves_and_predicts(scenes, tmp_path):
    pytest.importorskip("pycocotools")
    data = CocoFolder(scenes)
    task = DetectionTask(data, data, **SMALL)
    options = TrainOptions(steps=80, batch_size=12, learning_rate=2e-3, warmup_steps=5, evaluate_every=80)
    run = Run(task, options, tmp_path / "run")
    run.train()
    losses = [row["loss"] for row in run.history.rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    model, names = load_detector(tmp_path / "run", torch.device("cpu"))
    found = detect(model, names, [scenes / "000000.png"], threshold=0.0, pictures=tmp_path / "pictures")
    assert (tmp_path / "pictures" / "000000.png").stat().st_size > 1000
    assert len(found[0]["objects"]) == SMALL["num_queries"]
    expected = task.model.eval().predict(*collate([data[0]])[:2])[0]
    assert [o["score"] for o in found[0]["objects"]] == pytest.approx(expected["scores"].tolist(), rel=1e-4)


def test_drawings_overwrite_neither_images_nor_each_other(tmp_path):
    from PIL import Image

    for name in ("a/one.png", "b/one.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("L", (16, 16)).save(tmp_path / name)
    paths = [tmp_path / "a/one.png", tmp_path / "b/one.png"]
    before = paths[0].read_bytes()
    model, names = Detector(DetectorConfig(**SMALL)).eval(), [str(d) for d in range(10)]
    with pytest.raises(OutputError, match=r"--pictures, for .*a/one\.png: .*a/one\.png: this file is read"):
        detect(model, names, paths[:1], pictures=tmp_path / "a")
    with pytest.raises(OutputError, match=r"--pictures, for .*b/one\.png: .* is written for .*a/one\.png: already"):
        detect(model, names, paths, pictures=tmp_path / "found")
    with pytest.raises(OutputError, match=r"--pictures .*one\.png is not a directory"):
        detect(model, names, paths, pictures=paths[0])
    assert paths[0].read_bytes() == before
