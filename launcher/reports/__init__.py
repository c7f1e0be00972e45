"""Pure: what became of a job and who is in it, for people to read."""
