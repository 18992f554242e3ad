"""Tests of a GPU are collected where there is one: what they import needs its libraries."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
