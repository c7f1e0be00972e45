"""The command `elastic-moe`: one file for each verb, joined in `main`."""
