"""Pictures of a training, from its `metrics.jsonl`: `story` finds what is to be drawn, `training` draws it.

Only `training` imports matplotlib.
"""
