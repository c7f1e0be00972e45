"""What all tests share: nothing of theirs has to outlive this machine, so nobody waits for its disk."""

import os

from tests import unsynced

os.fsync = unsynced.fsync
