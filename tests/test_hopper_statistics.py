"""The row statistics of the Hopper backward, under Triton's interpreter, against their definition."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CHECK = """
import math
import torch
from fastattn.kernels.remembered import Call
from fastattn.kernels.hopper.plan import LOG2_E, STATISTICS_ROWS
from fastattn.kernels.hopper.statistics import row_statistics

for B, H, L, D, with_lse in ((2, 3, 5, 64, True), (1, 2, 129, 96, False), (1, 1, 128, 40, True)):
    out, grad_out = torch.randn(2, B, L, H, D).half().transpose(2, 3).unbind()  # [B, H, L, D], heads inside rows
    lse, grad_lse = torch.randn(2, B, H, L).unbind()
    lse[0, 0, L // 2] = -math.inf
    lse[0, 0, L // 3] = math.nan
    lse_2, delta = row_statistics(Call(remembers=False), out, lse, grad_out, grad_lse if with_lse else None)
    expected = (out.double() * grad_out.double()).sum(-1) - (grad_lse.double() if with_lse else 0.0)
    sees = lse != -math.inf
    shape = B, H, -(-L // STATISTICS_ROWS) * STATISTICS_ROWS
    lse_2, delta = lse_2.view(shape), delta.view(shape)
    torch.testing.assert_close(delta[..., :L].double(), torch.where(sees, expected, 0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(lse_2[..., :L][sees], lse[sees] * LOG2_E, equal_nan=True)
    assert (lse_2[..., :L][~sees] == math.inf).all()
    assert (lse_2[..., L:] == math.inf).all() and (delta[..., L:] == 0).all()
print("agreed")
"""


def test_interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True)
    assert run.stdout == "agreed\n", run.stderr
