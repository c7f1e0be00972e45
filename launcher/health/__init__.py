"""Finds what is not well: devices before a round; workers that hang or have failed; peers that answer no more."""
