"""A worker that can be asked to stop, says that it has done three steps, and then neither answers nor minds SIGTERM.

Usage: stubborn.py FOLDER. Appends {"pid"} to FOLDER/started.jsonl once it is stubborn; ends when FOLDER/finish exists.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from elastic_moe import worker

folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker.context()
worker.heartbeat(3)
with (folder / "started.jsonl").open("a") as started:
    started.write(json.dumps({"pid": os.getpid()}) + "\n")
while not (folder / "finish").exists():
    time.sleep(0.02)
