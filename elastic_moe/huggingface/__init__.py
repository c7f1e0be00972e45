"""Models of Hugging Face's `transformers`: their folders read as initial weights, and written from checkpoints.

`config` and `names` need no torch; neither module imports `transformers`.
"""
