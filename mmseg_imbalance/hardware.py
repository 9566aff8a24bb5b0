"""What a training or a benchmark runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def cpu_name() -> str:
    """The model of the CPU, as Linux names it, else its kind."""
    return _cpu_info('model name') or platform.processor() or platform.machine()


def slow_in_bfloat16() -> bool:
    """Whether a training in bfloat16 takes longer than in float32: on a CPU without instructions for it."""
    flags = _cpu_info('flags').split()
    return not torch.cuda.is_available() and not {'amx_bf16', 'avx512_bf16'} & set(flags)


def _cpu_info(key: str) -> str:
    """What Linux says of the first core; '' where it says nothing."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(':', 1)[1].strip() for line in lines if line.startswith(key)), '')
