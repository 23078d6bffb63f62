"""A detection transformer: boxes and labels as a set, with no anchors grid and no non-maximum suppression.

The architecture is DETR (Carion et al. 2020, arXiv:2005.12872) with what the literature found since to
make it converge in minutes instead of days: queries that are anchor boxes refined layer by layer
(DAB-DETR, Liu et al. 2022, arXiv:2201.12329), denoising queries (DN-DETR, Li et al. 2022,
arXiv:2203.01305) and the sigmoid focal loss (Lin et al. 2017, arXiv:1708.02002).

Boxes are (center x, center y, width, height), relative to the unpadded image, in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import Attention
from .fields import Layers, Share, Size, Token, check_fields

#: Groups of channels in which the backbone normalises.
NORM_GROUPS = 8


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes of a :class:`Detector`; the defaults suit small grey images on a CPU.

    Raises:
        TypeError, ValueError: a field has another type than its annotation, or lies outside its range.
    """

    num_classes: Size = 10
    in_channels: Size = 1
    backbone_channels: tuple[Size, ...] = (32, 64, 96)  # every stage halves the resolution
    embed_dim: Size = 96
    num_heads: Size = 4
    encoder_layers: Layers = 2
    decoder_layers: Layers = 3
    feedforward_dim: Size = 192
    num_queries: Size = 16
    dropout: Share = 0.0
    attention: str = "fastattn"  # or "torch", "naive"
    denoising_groups: Token = 3
    label_noise: Share = 0.2  # probability of a wrong label in a denoising query
    box_noise: Share = 0.4  # shift and scale of its box, relative to the box's size

    def __post_init__(self):
        check_fields(self)
        if self.embed_dim % 4:  # a sine and a cosine of each coordinate of a position
            raise ValueError(f"embed_dim must be a multiple of 4, got {self.embed_dim}")
        for width in self.backbone_channels:
            if width % NORM_GROUPS:
                raise ValueError(f"backbone_channels must be multiples of {NORM_GROUPS}, got {width}")

    @property
    def stride(self) -> int:
        """Pixels per feature-map cell along each axis."""
        return 2 ** len(self.backbone_channels)


def inverse_sigmoid(x: Tensor, eps: float = 1e-4) -> Tensor:
    """log(x / (1 - x)) with x kept ``eps`` away from 0 and 1."""
    x = x.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x))


def sine_embedding(position: Tensor, dim: int, temperature: float = 20.0) -> Tensor:
    """Sinusoidal embedding of coordinates in [0, 1]: [..., C] -> [..., C * dim] (``dim`` even)."""
    frequency = temperature ** (-torch.arange(dim // 2, device=position.device) / (dim // 2))
    angle = position[..., None] * (2 * math.pi) * frequency * temperature / 2  # [..., C, dim/2]
    return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class MaskedGroupNorm(nn.GroupNorm):
    """Group normalisation over the image alone: padding neither counts nor stays (it comes out as 0)."""

    def forward(self, x: Tensor, inside: Tensor) -> Tensor:
        # x [B, C, H, W]; inside [B, 1, H, W], 1 in the image and 0 in its padding
        groups = (x * inside).unflatten(1, (self.num_groups, -1))  # [B, G, C/G, H, W]
        count = inside.sum((1, 2, 3))[:, None] * groups.shape[2]  # [B, 1]
        mean = groups.sum((2, 3, 4)) / count  # [B, G]
        centred = (groups - mean[:, :, None, None, None]) * inside[:, None]
        scale = (centred.square().sum((2, 3, 4)) / count + self.eps).rsqrt()
        normalised = (centred * scale[:, :, None, None, None]).flatten(1, 2)
        return (normalised * self.weight[:, None, None] + self.bias[:, None, None]) * inside


class Backbone(nn.Module):
    """Convolutions with group normalisation: [B, C, H, W] -> [B, embed_dim, ceil(H/s), ceil(W/s)].

    What an image gives does not depend on how far it is padded.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = config.in_channels
        for width in config.backbone_channels:
            for stride in (2, 1):
                self.convolutions.append(nn.Conv2d(channels, width, 3, stride=stride, padding=1))
                self.norms.append(MaskedGroupNorm(NORM_GROUPS, width))
                channels = width
        self.project = nn.Conv2d(channels, config.embed_dim, 1)

    def forward(self, images: Tensor, sizes: Tensor) -> Tensor:
        # images [B, C, H, W], 0 in the padding; sizes int [B, 2]
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = convolution(x)
            sizes = (sizes + convolution.stride[0] - 1) // convolution.stride[0]
            x = norm(x, inside_image(sizes, *x.shape[-2:]).to(x.dtype)).relu()
        return self.project(x)


def inside_image(sizes: Tensor, height: int, width: int) -> Tensor:
    """bool [B, 1, height, width], True where a cell belongs to the image of its size (height, width)."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]  # [B, height]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def feed_forward(config: DetectorConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.embed_dim, config.feedforward_dim),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.feedforward_dim, config.embed_dim),
    )


class EncoderLayer(nn.Module):
    """Pre-norm self-attention over the feature map; positions join queries and keys, not values."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.embed_dim), nn.LayerNorm(config.embed_dim)
        self.attention = Attention(config.embed_dim, config.num_heads, config.dropout, config.attention)
        self.feed_forward = feed_forward(config)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        # x, position [B, N, E]; padding [B, N] bool, True = padding
        y = self.norm1(x)
        located = y + position
        x = x + self.attention(located, located, y, key_padding_mask=padding)
        return x + self.feed_forward(self.norm2(x))


class DecoderLayer(nn.Module):
    """Queries attend to each other, then to the image; each also carries the position of its box."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = Attention(dim, config.num_heads, config.dropout, config.attention)
        self.cross_attention = Attention(dim, config.num_heads, config.dropout, config.attention)
        self.feed_forward = feed_forward(config)

    def forward(
        self,
        x: Tensor,  # [B, Q, E]
        query_position: Tensor,  # [B, Q, E]
        memory: Tensor,  # [B, N, E]
        memory_position: Tensor,  # [B, N, E]
        padding: Tensor,  # [B, N] bool
        query_mask: Tensor | None,  # [Q, Q] bool, True = attend
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        y = self.norm1(x)
        located = y + query_position
        x = x + self.self_attention(located, located, y, mask=query_mask)
        y, key = self.norm2(x) + query_position, memory + memory_position
        x = x + self.cross_attention(y, key, memory, key_padding_mask=padding)
        weights = self.cross_attention.weights(y, key, key_padding_mask=padding) if need_weights else None
        return x + self.feed_forward(self.norm3(x)), weights


@dataclass
class Detections:
    """The decoder's output, one entry per decoder layer (the last is the prediction)."""

    logits: list[Tensor]  # each [B, Q, num_classes]
    boxes: list[Tensor]  # each [B, Q, 4]
    attention: Tensor | None = None  # [B, Q, H', W'] of the last layer, averaged over heads, if asked for
    denoising_logits: list[Tensor] = field(default_factory=list)  # each [B, groups * T, num_classes]
    denoising_boxes: list[Tensor] = field(default_factory=list)


@dataclass
class Targets:
    """Ground truth of a batch, padded to the most objects T of any image."""

    labels: Tensor  # int64 [B, T]
    boxes: Tensor  # [B, T, 4]
    valid: Tensor  # bool [B, T]

    def to(self, device: torch.device | str) -> Targets:
        return Targets(self.labels.to(device), self.boxes.to(device), self.valid.to(device))


class Detector(nn.Module):
    """DETR with refined anchor-box queries and denoising training."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.backbone = Backbone(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.encoder_norm = nn.LayerNorm(dim)
        self.output_norm = nn.LayerNorm(dim)
        self.anchors = nn.Parameter(inverse_sigmoid(initial_anchors(config.num_queries)))
        self.content = nn.Parameter(torch.randn(config.num_queries, dim) * 0.02)
        self.label_embedding = nn.Embedding(config.num_classes, dim)  # of denoising queries
        self.position_mlp = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.class_head = nn.Linear(dim, config.num_classes)
        nn.init.constant_(self.class_head.bias, -math.log((1 - 0.05) / 0.05))  # focal loss: rare positives
        self.box_head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
        nn.init.zeros_(self.box_head[-1].weight)
        nn.init.zeros_(self.box_head[-1].bias)

    def encode(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """images [B, C, H, W], sizes int [B, 2] (height, width before padding) -> memory, its positions
        (both [B, N, E]), its padding [B, N], and the feature map's size."""
        features = self.backbone(images, sizes)
        height, width = features.shape[-2:]
        centre_y = (torch.arange(height, device=images.device) + 0.5) * self.config.stride
        centre_x = (torch.arange(width, device=images.device) + 0.5) * self.config.stride
        y = centre_y[None, :] / sizes[:, :1]  # [B, H'], beyond 1 in the padding
        x = centre_x[None, :] / sizes[:, 1:]
        # a cell is padding when it begins beyond the image
        padding = ~inside_image(-(-sizes // self.config.stride), height, width).flatten(1)
        grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1).flatten(
            1, 2
        )  # [B, N, 2]
        position = sine_embedding(grid, self.config.embed_dim // 2)
        memory = features.flatten(2).transpose(1, 2)
        for layer in self.encoder:
            memory = layer(memory, position, padding)
        return self.encoder_norm(memory), position, padding, (height, width)

    def forward(
        self,
        images: Tensor,  # [B, C, H, W], padded at the right and the bottom
        sizes: Tensor,  # int [B, 2], (height, width) of each image before padding
        targets: Targets | None = None,  # adds denoising queries in training
        need_weights: bool = False,
    ) -> Detections:
        memory, memory_position, padding, grid = self.encode(images, sizes)
        batch, queries = images.shape[0], self.config.num_queries
        x = self.content.expand(batch, -1, -1)
        boxes = self.anchors.sigmoid().expand(batch, -1, -1)
        noised, query_mask = 0, None
        if targets is not None and self.training and targets.labels.shape[1] and self.config.denoising_groups:
            labels, noisy_boxes = self.add_noise(targets)
            noised = labels.shape[1]
            x = torch.cat((self.label_embedding(labels), x), dim=1)
            boxes = torch.cat((noisy_boxes, boxes), dim=1)
            query_mask = denoising_mask(self.config.denoising_groups, targets.labels.shape[1], queries)
            query_mask = query_mask.to(images.device)
        result = Detections([], [])
        for i, layer in enumerate(self.decoder):
            last = i == len(self.decoder) - 1
            query_position = self.position_mlp(sine_embedding(boxes, self.config.embed_dim // 2))
            x, weights = layer(x, query_position, memory, memory_position, padding, query_mask, need_weights and last)
            y = self.output_norm(x)
            logits = self.class_head(y)
            refined = (inverse_sigmoid(boxes) + self.box_head(y)).sigmoid()
            result.denoising_logits.append(logits[:, :noised])
            result.denoising_boxes.append(refined[:, :noised])
            result.logits.append(logits[:, noised:])
            result.boxes.append(refined[:, noised:])
            boxes = refined.detach()  # each layer learns its own step (Deformable DETR, section 4.1)
            if weights is not None:
                result.attention = weights[:, noised:].unflatten(-1, grid)
        return result

    def add_noise(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """Denoising queries: labels [B, groups * T] and boxes [B, groups * T, 4] near the truth."""
        groups, config = self.config.denoising_groups, self.config
        labels = targets.labels.repeat(1, groups)
        boxes = targets.boxes.repeat(1, groups, 1)
        random_labels = torch.randint_like(labels, config.num_classes)
        flip = torch.rand(labels.shape, device=labels.device) < config.label_noise
        labels = torch.where(flip, random_labels, labels)
        noise = (torch.rand_like(boxes) * 2 - 1) * config.box_noise
        centre = boxes[..., :2] + noise[..., :2] * boxes[..., 2:] / 2
        size = boxes[..., 2:] * (1 + noise[..., 2:])
        return labels, torch.cat((centre, size), dim=-1).clamp(1e-3, 1 - 1e-3)

    @torch.no_grad()
    def predict(self, images: Tensor, sizes: Tensor, top: int | None = None) -> list[dict[str, Tensor]]:
        """Per image: ``scores`` [K] in descending order, ``labels`` [K] and ``boxes`` [K, 4] in pixels
        (x, y, width, height: COCO's order, from the top left corner)."""
        found = self(images, sizes)
        scores = found.logits[-1].sigmoid()  # [B, Q, num_classes]
        top = min(top or self.config.num_queries, scores[0].numel())
        best, index = scores.flatten(1).topk(top, dim=1)
        query, label = index // self.config.num_classes, index % self.config.num_classes
        boxes = found.boxes[-1].gather(1, query[..., None].expand(-1, -1, 4))
        scale = torch.stack((sizes[:, 1], sizes[:, 0], sizes[:, 1], sizes[:, 0]), dim=1).to(boxes)
        corner = torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., 2:]), dim=-1) * scale[:, None]
        return [
            {"scores": s, "labels": c, "boxes": b, "queries": q}
            for s, c, b, q in zip(best, label, corner, query, strict=True)
        ]


def initial_anchors(count: int) -> Tensor:
    """[count, 4] boxes spread over the image: a low-discrepancy sequence of centres, a common size."""
    golden = (math.sqrt(5) - 1) / 2
    index = torch.arange(count)
    x, y = (index + 0.5) / count, (index * golden) % 1
    return torch.stack((x, y, torch.full((count,), 0.25), torch.full((count,), 0.25)), dim=1)


def denoising_mask(groups: int, targets: int, queries: int) -> Tensor:
    """bool [Q', Q'], True = attend: denoising groups see only themselves and the matching queries, and the
    matching queries never see a denoising query, which carries the answer."""
    group = torch.cat((torch.arange(groups).repeat_interleave(targets), torch.full((queries,), -1, dtype=torch.long)))
    return (group[None, :] == group[:, None]) | (group[None, :] < 0)
