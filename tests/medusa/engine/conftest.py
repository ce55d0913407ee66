"""Keeps Triton's interpreter out of this process, as tests/medusa/kernels/conftest.py does.

By hand: `TRITON_INTERPRET=1 python -m pytest tests/medusa/engine/interpreted`, and the same of `interpreted_team`.
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*", "interpreted_team/*"]
