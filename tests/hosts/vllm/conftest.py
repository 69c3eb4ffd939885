"""Tests of vLLM: `make test-vllm` runs them in an environment of its own; without vLLM nothing is collected."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines in this process
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
