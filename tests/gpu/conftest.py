"""The GPU's tests share their bodies with those of the emulated link, in tests/core."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "core"))
