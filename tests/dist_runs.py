"""Run recipes one after another in this process: started by a launcher, it saves imports.

Usage: python -m torch.distributed.run --standalone --nproc_per_node=2 tests/dist_runs.py FILE,
where FILE is a JSON list of recipes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mllm.training.launch import end_worker
from mllm.training.recipe import validate
from mllm.training.run import run

if __name__ == "__main__":
    for written in json.loads(Path(sys.argv[1]).read_text()):
        run(validate(written))
    end_worker(0)
