"""Keeps Triton's interpreter out of this process: what needs it lies in interpreted/, run by test_interpreted.py.

The interpreter is chosen once a process, before Triton is imported; in a process of all tests it would also take the
kernels from the tests that need a GPU. By hand: `TRITON_INTERPRET=1 python -m pytest tests/medusa/kernels/interpreted`.
"""

from __future__ import annotations

import os

asked = os.environ.get("TRITON_INTERPRET") == "1" or "MEDUSA_KERNEL_DEVICE" in os.environ
collect_ignore_glob = [] if asked else ["interpreted/*"]
