"""Puts the node's name into the folders of its workers' logs: nodes may share one `--log-dir`."""

from __future__ import annotations

import re

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, LogsSpecs

_RUN_ID = "TORCHELASTIC_RUN_ID"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_ODD = re.compile(r"[^\w.-]")


class NodeLogs(LogsSpecs):
    """torch's own log folders, as `RUN_NODE_xxxxxxxx/attempt_N/LOCAL_RANK` instead of `RUN_xxxxxxxx/...`."""

    def __init__(self, specs: DefaultLogsSpecs, node_id: str) -> None:
        super().__init__()
        self._specs = specs
        self._node = _ODD.sub("-", node_id)

    @property
    def root_log_dir(self) -> str:
        """The folder that holds all others, as torch has it."""
        return self._specs.root_log_dir

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Say where each worker's output goes; sets its error file in `envs`, as torch does.

        torch names the folder by the run id that it finds there.
        """
        named = {rank: {**env, _RUN_ID: f"{env.get(_RUN_ID, 'run')}_{self._node}"} for rank, env in envs.items()}
        found = self._specs.reify(named)
        for rank, env in envs.items():
            env[_ERROR_FILE] = named[rank][_ERROR_FILE]
        return found


def name_node(specs: LogsSpecs, node_id: str) -> LogsSpecs:
    """Return torch's specs with the node's name in them; those of a plug-in (`--logs-specs`) as they are."""
    return NodeLogs(specs, node_id) if isinstance(specs, DefaultLogsSpecs) else specs
