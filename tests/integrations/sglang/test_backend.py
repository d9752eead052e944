"""The backend against a real sidecar: every path stores and finds, whatever the layout and the allocator."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from tests_sglang import HostPool, StatePool, Transfer, keys_of
