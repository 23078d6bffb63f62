"""The benchmark suite for the CPU (pytest-benchmark), its report, and the GPU's own programs."""
