"""The longest files begin first, or the last to begin keeps one core alone at the end.

Under pytest-xdist a file runs in one process (`--dist loadfile`), so the suite ends when its last
file does. With --no-loadscope-reorder files are handed out in this order.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for raylets.py
# a cluster of Ray is to stay on loopback; it reads this as it is imported, here and in children
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

LONGEST = (  # by CPU seconds; a file not named comes after them
    "test_triton",
    "test_hub",
    "test_architectures",
    "test_demo",
    "test_examples",
    "test_package",
    "test_convert",
    "test_project",
    "test_hub_projections",
    "test_docs",
    "test_finetune",
    "test_moefication",
    "test_local",
    "test_find",
    "test_onnx",
    "test_unet_plan",
    "test_example",
    "test_engine",
    "test_command",
    "test_backend",
    "test_faults",
    "test_drafters",
    "test_cpu_kernels",
)


def pytest_collection_modifyitems(items):
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
