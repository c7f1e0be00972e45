"""This package's format and checks under `dcp.load`, `dcp.save` and `dcp.async_save`.

`ShardReader` and `ShardWriter` leave who writes what to DCP's planner and its collectives; what they add is the attempt
folder, the manifest with checksums, the commit by one put, and the verified read. Nobody claims the run here, so there
is no fencing.
"""

from storage.dcp.folder import Url
from storage.dcp.reader import ShardReader
from storage.dcp.writer import ShardWriter

__all__ = ["ShardReader", "ShardWriter", "Url"]
