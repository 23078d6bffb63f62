"""The device that a command is to use."""

from __future__ import annotations

import torch

from fastattn import dispatch
from fastattn.train.errors import TrainingError


def resolve_device(name: str) -> torch.device:
    """The device, once a number has been written there and read back, and once the CPU's engine has been chosen.

    Raises:
        TrainingError: it is unknown, not there or holds no numbers.
        ValueError: the environment variable FASTATTN_CPU_ISA names no instruction set of this machine.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except Exception as error:  # each kind of device has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TrainingError(f"--device {name}: {reason}") from error
    engine = dispatch.load("cpu")
    if device.type == "cpu" and not isinstance(engine, ImportError) and engine.unavailable() is None:
        engine.isa()
    return device
