"""The life of a run's checkpoints: whose it is, what is committed, set aside and removed."""
