"""Keeps Triton's interpreter out of this process, as tests/medusa/kernels/conftest.py does.

By hand: `TRITON_INTERPRET=1 python -m pytest tests/benchmarks/interpreted`.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
