"""What the Triton backend says where it cannot run."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_without_an_interpreter_or_a_device_the_reason_is_told():
    code = (
        "import torch, fastattn\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "try: fastattn.scaled_dot_product_attention(q, q, q, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "no CUDA device" in run.stdout


def test_without_triton_the_reason_is_told():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastattn\n"
        "q = torch.randn(1, 1, 4, 8)\n"
        "print(fastattn.scaled_dot_product_attention(q, q, q).shape)\n"
        "try: fastattn.scaled_dot_product_attention(q, q, q, backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Triton is not installed" in run.stdout and "pip install triton" in run.stdout
