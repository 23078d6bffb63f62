"""The set-prediction loss of DETR: Hungarian matching, focal classification, L1 and generalised IoU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .detector import Detections, Targets

#: Weights of the terms, in the matching cost and in the loss alike (DAB-DETR, table 8).
CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 2.0, 5.0, 2.0
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


def corners(boxes: Tensor) -> Tensor:
    """(center x, center y, width, height) -> (left, top, right, bottom), [..., 4]."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al. 2019, arXiv:1902.09630) of boxes given by corners, broadcasting: [..., 4]."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return overlap / area.clamp(min=1e-9) - (hull - area) / hull.clamp(min=1e-9)


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Elementwise sigmoid focal loss (Lin et al. 2017); ``targets`` in {0, 1}, same shape."""
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_true = p * targets + (1 - p) * (1 - targets)
    alpha = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return alpha * cross_entropy * (1 - p_true) ** FOCAL_GAMMA


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The cheapest one-to-one assignment per image: (batch, query, target) index vectors."""
    from scipy.optimize import linear_sum_assignment

    p = logits.float().sigmoid()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -(p + 1e-8).log()
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * -(1 - p + 1e-8).log()
    per_label = positive - negative  # [B, Q, num_classes]
    labels = targets.labels[:, None, :].expand(-1, logits.shape[1], -1)
    cost = CLASS_WEIGHT * per_label.gather(2, labels)  # [B, Q, T]
    cost += L1_WEIGHT * torch.cdist(boxes.float(), targets.boxes.float(), p=1)
    cost -= GIOU_WEIGHT * generalized_iou(corners(boxes)[:, :, None], corners(targets.boxes)[:, None])
    cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6).cpu()
    batch, query, target = [], [], []
    for b, valid in enumerate(targets.valid.cpu()):
        columns = valid.nonzero()[:, 0]
        rows, chosen = linear_sum_assignment(cost[b][:, columns].numpy())
        query.append(torch.as_tensor(rows))
        target.append(columns[torch.as_tensor(chosen)])
        batch.append(torch.full((len(rows),), b))
    device = logits.device
    return torch.cat(batch).to(device), torch.cat(query).to(device), torch.cat(target).to(device)


def layer_loss(
    logits: Tensor, boxes: Tensor, targets: Targets, indices: tuple[Tensor, Tensor, Tensor], count: int
) -> dict[str, Tensor]:
    """The three terms of one decoder layer, normalised by the number of objects."""
    batch, query, target = indices
    one_hot = torch.zeros_like(logits)
    one_hot[batch, query, targets.labels[batch, target]] = 1.0
    predicted, truth = boxes[batch, query], targets.boxes[batch, target]
    giou = generalized_iou(corners(predicted), corners(truth))
    return {
        "class": CLASS_WEIGHT * focal_loss(logits, one_hot).sum() / count,
        "l1": L1_WEIGHT * F.l1_loss(predicted, truth, reduction="sum") / count,
        "giou": GIOU_WEIGHT * (1 - giou).sum() / count,
    }


def set_loss(found: Detections, targets: Targets) -> dict[str, Tensor]:
    """The loss of every decoder layer (auxiliary losses included) and of the denoising queries.

    Returns scalars: ``loss`` (the sum to minimise) and, of the last layer, ``class``, ``l1``, ``giou``.
    """
    count = max(int(targets.valid.sum()), 1)
    total, last = found.logits[0].new_zeros(()), {}
    for logits, boxes in zip(found.logits, found.boxes, strict=True):
        last = layer_loss(logits, boxes, targets, match(logits, boxes, targets), count)
        total = total + sum(last.values())
    noised = found.denoising_logits[0].shape[1] if found.denoising_logits else 0
    if noised:
        groups = noised // targets.labels.shape[1]
        known = targets.valid.repeat(1, groups)
        batch, query = known.nonzero(as_tuple=True)
        indices = (batch, query, query % targets.labels.shape[1])
        for logits, boxes in zip(found.denoising_logits, found.denoising_boxes, strict=True):
            masked = logits.masked_fill(~known[..., None], -1e4)  # padding queries predict nothing
            total = total + sum(layer_loss(masked, boxes, targets, indices, count * groups).values())
    return {"loss": total, **{k: v.detach() for k, v in last.items()}}
