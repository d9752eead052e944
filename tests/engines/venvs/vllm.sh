# vLLM finds out what a model class can do in a process of its own and keeps the answer: done here once.
# shellcheck shell=bash disable=SC2154
VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR "$python" - <<'PY'
from importlib.metadata import version

from vllm import LLM  # the import that a wrong torchvision would break

import hicache

assert LLM and hicache.__version__ == version("hicache")
PY
