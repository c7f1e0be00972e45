"""From one store to another: `ckpt push` and `ckpt pull`."""
