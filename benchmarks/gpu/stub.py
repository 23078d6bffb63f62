"""An H200 that is not there: kernels compile and launch through Triton's own driver, and nothing runs.

Under Triton lies a libcuda that only keeps the driver's rules (stub_libcuda.c), and CPU tensors stand for the
device's: same shapes, strides and alignment, so that Triton specialises, and caches, the very kernels that a run on
the device asks for. Results are whatever the memory held.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

SOURCE = Path(__file__).with_name("stub_libcuda.c")
ARCHITECTURE = 90
MULTIPROCESSORS = 132
VAST = 2**28  # elements


def build(folder: Path) -> Path:
    """Compile the stub into a folder, as Triton compiles its launchers; the path of the library."""
    import triton

    library = folder / "libcuda.so.1"
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    compiler = os.environ.get("CC", "gcc")
    options = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{headers}"]
    subprocess.run([compiler, *options, "-o", str(library), str(SOURCE)], check=True)
    return library


def activate(library: Path) -> ctypes.CDLL:
    """Make the stub the device of this process, from here on: for processes of their own."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the launchers find it by its name
    for counter in (loaded.stub_launches, loaded.stub_tensor_maps):
        counter.restype = ctypes.c_ulong

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class StubDriver(CudaDriver):
        """Triton's driver for CUDA, without torch's view of a device."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0
            self.get_device_capability = lambda device=0: divmod(ARCHITECTURE, 10)
            self.set_current_device = lambda device: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", ARCHITECTURE, 32)

    triton.runtime.driver.set_active(StubDriver())
    _stand_in_for_the_device()
    return loaded


def _stand_in_for_the_device() -> None:
    """CPU tensors get the kernels, and each kernel the configuration, that an H200's would."""
    from fastattn import dispatch
    from fastattn.backends import cpu
    from fastattn.backends import triton as backend
    from fastattn.kernels import arguments, hopper, remembered
    from fastattn.kernels.hopper import capability

    def hopper_reasons(problem) -> list[str]:
        return (
            ["FASTATTN_HOPPER=0"] if os.environ.get("FASTATTN_HOPPER") == "0" else capability.problem_reasons(problem)
        )

    remembered.cpu_stands_for_device = True
    arguments.assumed_architecture = ARCHITECTURE
    arguments.assumed_multiprocessors = MULTIPROCESSORS
    capability.reasons = hopper.reasons = hopper_reasons
    backend.interpreted = lambda: True  # as under the interpreter, CPU tensors are taken
    backend.unavailable.cache_clear()
    dispatch.AUTO["cpu"] = dispatch.AUTO["cuda"]
    cpu.plain_head_dims = lambda *arguments: None  # the way of the CPU engine's plain calls
    backend.is_on_gpu = lambda tensor: True


def without_values() -> None:
    """Random and NaN-filled tensors, and vast ones, stay unwritten from here on: untouched memory costs nothing."""
    import torch

    def unwritten(*shape, generator=None, **options):
        return torch.empty(*shape, **options)

    def unless_nan(fill: Callable, make: Callable) -> Callable:
        def create(like, fill_value, **options):
            return make(like, **options) if fill_value != fill_value else fill(like, fill_value, **options)

        return create

    def unless_vast(*shape, **options):
        made = torch.empty(*shape, **options)
        return made if made.numel() >= VAST else made.zero_()

    torch.randn = torch.rand = unwritten
    torch.zeros = unless_vast
    torch.Tensor.normal_ = torch.Tensor.random_ = lambda tensor, *bounds, **options: tensor
    torch.full = unless_nan(torch.full, torch.empty)
    torch.full_like = unless_nan(torch.full_like, torch.empty_like)
