"""Read by every Python of a run of torch's tests, those that tests start as well: what the run is to be made on."""

import os

if "ELASTIC_MOE_UPSTREAM" in os.environ:
    from tests.upstream import instead

    instead.let_run_without_gpus()
    if os.environ["ELASTIC_MOE_UPSTREAM"] == "ours":
        instead.install()
