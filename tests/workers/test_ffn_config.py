"""How many groups, shards and replicas each way to spread FFNs makes."""

import pytest

from afd_server.core.topology import FFNParallel
from afd_server.workers.config import ffn_config


@pytest.mark.parametrize(
    ("parallel", "num_workers", "shards_groups_replicas"),
    [
        (FFNParallel.TENSOR, 4, (4, 1, 1)),
        (FFNParallel.REPLICATE, 4, (1, 4, 4)),
        (FFNParallel.EXPERT, 4, (1, 4, 3)),
        (FFNParallel.HYBRID, 6, (2, 3, 3)),
        (FFNParallel.COLOCATED, 0, (1, 1, 1)),
    ],
)
def test_workers_make_groups_of_shards(parallel, num_workers, shards_groups_replicas):
    config = ffn_config(parallel, num_workers, num_replicas=3, num_shards=2)
    assert (config.num_parts, config.num_groups, config.num_replicas) == shards_groups_replicas
    if num_workers:
        assert config.num_parts * config.num_groups == num_workers
