"""The process that benchmarks/starting.py starts: one replica, which tells when its imports are done."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from deployments.config import ServerConfig
from deployments.one_process import serve_without_ray
from medusa.config import validate


def main(config_file: Path) -> None:
    print(json.dumps({"imported_at": time.monotonic()}), flush=True)
    config = validate(ServerConfig, json.loads(config_file.read_text(encoding="utf-8")), source=str(config_file))
    serve_without_ray(config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
