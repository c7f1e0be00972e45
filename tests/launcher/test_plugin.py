"""torch loads the plug-in in every process that imports its rendezvous: that must cost nothing and break nothing."""

from __future__ import annotations

import subprocess
import sys

PROBE = """
import sys
import torch.distributed.checkpoint
import torch.distributed.elastic.rendezvous.registry as registry
from torch.distributed.elastic.rendezvous.api import rendezvous_handler_registry
registry._register_out_of_tree_handlers()
print("etcd3" in rendezvous_handler_registry._registry)
print(sorted(m for m in sys.modules if m.partition(".")[0] in ("launcher", "grpc", "etcd3", "pydantic")))
"""


def test_the_plug_in_is_there_and_imports_nothing() -> None:
    probe = subprocess.run([sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=True)
    assert probe.stdout.split("\n")[:2] == ["True", "['launcher', 'launcher.errors', 'launcher.plugin']"]
    assert not probe.stderr
