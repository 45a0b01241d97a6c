"""lmms-eval task definitions; `PATH` is what `--include_path` of lmms-eval needs."""

from pathlib import Path

PATH = str(Path(__file__).parent)
