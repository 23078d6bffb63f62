"""What was predicted of the Hopper kernels' switches and tiles, before they ran on a GPU.

kernels/hopper/README.md gives the reasons.
"""

from __future__ import annotations

#: (direction, head_dim, variant, length, causal): the predicted speed relative to the chosen configuration's.
PREDICTIONS = {
    ("forward", 128, "overlap=False", 8192, None): 0.94,
    ("forward", 128, "ping_pong=False", 8192, None): 1.00,
    ("forward", 128, "overlap=False ping_pong=False", 8192, None): 0.96,
    ("forward", 128, "maxima_first=True", 8192, None): 0.97,
    ("forward", 128, "persistent=False", 8192, None): 0.99,
    ("forward", 128, "persistent=False", 1024, None): 0.92,
    ("forward", 128, "heads_inner=False", 8192, "upper_left"): 0.90,
    ("forward", 128, "heads_inner=True", 8192, None): 1.00,
    ("forward", 128, "own_out=False", 8192, None): 0.99,
    ("forward", 128, "own_out=False", 1024, None): 0.92,
    ("forward", 128, "128x64", 8192, None): 0.87,
    ("forward", 128, "192x64", 8192, None): 1.01,
    ("forward", 128, "192x64 4 stages", 8192, None): 1.01,
    ("forward", 64, "overlap=False", 8192, None): 0.97,
    ("forward", 64, "ping_pong=False", 8192, None): 1.01,
    ("forward", 64, "overlap=False ping_pong=False", 8192, None): 0.97,
    ("forward", 64, "maxima_first=False", 8192, None): 0.97,
    ("forward", 64, "128x128", 8192, None): 0.73,
    ("forward", 64, "192x64", 8192, None): 0.80,
    ("backward", 128, "fused=False", 8192, None): 0.86,
    ("backward", 128, "ordered=False", 8192, None): 1.02,
    ("backward", 128, "fused=False persistent=False", 8192, None): 0.83,
    ("backward", 128, "fused=False heads_inner=False", 8192, "upper_left"): 0.79,
    ("backward", 128, "fused=False heads_inner=True", 8192, None): 0.86,
    ("backward", 128, "fused=False keys_own_out=False", 8192, None): 0.85,
    ("backward", 128, "fused=False queries_own_out=False", 8192, None): 0.85,
    ("backward", 64, "fused=True", 8192, None): 1.05,
}


def prediction(row: dict) -> float | None:
    """What was predicted for a row of this part."""
    return PREDICTIONS.get(
        (row.get("direction"), row.get("head_dim"), row["variant"], row.get("queries"), row.get("causal"))
    )
