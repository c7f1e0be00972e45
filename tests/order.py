"""In which order the files of the suite are begun: the longest first, so that none is left alone at the end.

Two run side by side: of those that wait, for leases say, and of those that compute, one of each in turn.
"""

import pytest

WAITING = (
    "chaos/test_nodes.py",
    "chaos/test_partitions.py",
    "chaos/test_store.py",
    "launcher/test_watchdog.py",
    "launcher/test_torchrun.py",
    "launcher/test_etcd.py",
    "chaos/test_copies.py",
    "chaos/test_programs.py",
    "launcher/test_agent.py",
    "launcher/test_kv.py",
    "launcher/test_report_truth.py",
    "launcher/test_member.py",
    "launcher/test_drain.py",
    "launcher/test_outage.py",
    "launcher/test_bucket.py",
    "storage/test_service.py",
)
COMPUTING = (
    "demo/test_demo.py",
    "moe/test_training.py",
    "storage/test_s3_deaths.py",
    "storage/test_s3_fault_ranks.py",
    "storage/test_s3_faults.py",
    "integrations/test_on_nodes.py",
    "moe/test_train.py",
    "storage/test_service_deaths.py",
    "storage/test_quarantine.py",
    "storage/test_sharded.py",
    "docs/test_readme.py",
    "storage/test_exchange.py",
    "storage/test_moe_reshard.py",
    "launcher/test_early_variables.py",
    "storage/test_script_end.py",
    "moe/test_sharing.py",
)
FIRST = [path for pair in zip(WAITING, COMPUTING, strict=True) for path in pair]


def place(item: pytest.Item) -> int:
    """The place of a test's file among those that come first; the same for all that follow."""
    path = item.nodeid.partition("::")[0].removeprefix("tests/")
    return FIRST.index(path) if path in FIRST else len(FIRST)
