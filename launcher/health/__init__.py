"""Is all well? Devices before a round; workers that hang, lag or have failed; peers that answer no more."""
