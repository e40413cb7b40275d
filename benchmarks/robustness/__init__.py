"""Attacks and kills, counted: ``python -m benchmarks.robustness``.

They run without a network, each in a process with one thread.
"""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
