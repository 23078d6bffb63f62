"""Everything that needs a GPU: correctness, speed beside the peers, tuning.  ``python -m benchmarks.gpu --help``."""

from .environment import use_checkout

use_checkout()
