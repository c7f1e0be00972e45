"""Prints more than a pipe holds, also by a child, after somebody has read its first line."""

import subprocess
import sys
import time
from pathlib import Path

print("first", flush=True)
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
for number in range(3000):
    print(f"{number:>50}", flush=True)
print("to stderr", file=sys.stderr, flush=True)
subprocess.run(["echo", "from a child"], check=True)
Path(sys.argv[1]).write_text("done")
