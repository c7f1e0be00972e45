"""What ranks have in memory from the start: loaded once, by the server that they are forked from.

torch (FSDP2 imports the compiler at its first use), our packages, and what boto3 reads from its files for a client.
"""

import gc
import importlib
import os

from storage import open_store
from tests import unsynced

os.fsync = unsynced.fsync

for _name in (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "storage.checkpointer",
    "storage.stores.s3.client",
):
    importlib.import_module(_name)
if os.environ.get("MOE_VARIANT"):
    importlib.import_module("tests.moe.variants")
open_store("s3://bucket/run?anonymous=true&endpoint_url=http://127.0.0.1:1").close()
gc.freeze()  # no rank need look at what is here already
