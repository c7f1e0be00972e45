"""From one store to another: `ckpt push` and `ckpt pull`."""

from storage.transfer.copy_jobs import CopyJob, CopyState, Found, Outcome, look, open_target, plan
from storage.transfer.copying import Copier
from storage.transfer.verified_read import Advance

__all__ = ["Advance", "Copier", "CopyJob", "CopyState", "Found", "Outcome", "look", "open_target", "plan"]
