"""What a checkpoint is made of: items, checksums, the manifest, and stock DCP's own files."""
