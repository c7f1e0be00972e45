"""A worker without torch, quick to start, that no collective holds to the others.

Usage: plain.py FOLDER. Appends {"RANK", "WORLD_SIZE", "GENERATION", "pid"} to FOLDER/started.jsonl as it starts, and
ends once FOLDER/finish exists, or FOLDER/finish-RANK.
"""

import json
import os
import sys
import time
from pathlib import Path

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
told = {"RANK": rank, "WORLD_SIZE": int(os.environ["WORLD_SIZE"]), "pid": os.getpid()}
told["GENERATION"] = int(os.environ["ELASTIC_MOE_GENERATION"])
with (folder / "started.jsonl").open("a") as started:
    started.write(json.dumps(told) + "\n")
while not (folder / "finish").exists() and not (folder / f"finish-{rank}").exists():
    time.sleep(0.02)
