"""Bytes of data objects, compared with their checksums: the one place where damage is found.

    twice.py        damage counts when it is read twice: whatever is read of a checkpoint goes through `read_verified`
    verifiers.py    what an item's bytes must be: one `Verifier` for each kind of item
    readplan.py     which parts to fetch for the bytes that somebody wants (pure)
    source.py       a checkpoint's data objects: parts fetched, and verified before any byte of them counts

A load, `ckpt verify`, the judge before a checkpoint is set aside and a copy all read through here.
"""
