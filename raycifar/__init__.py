"""raycifar: image classifiers trained data-parallel on Ray, compared and explained, on CIFAR-100."""

import os

from raycifar.machine import provide_home

# Ray otherwise answers `uv run` by building a copy of the environment for every worker process.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # also where it was switched off for another program

provide_home()

__version__ = "0.2.0.dev0"
