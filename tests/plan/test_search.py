"""The estimate by which settings are searched for."""

from cft_jax.plan.programs import papers_work
from cft_jax.plan.search import abstract_mesh, estimate
from cft_jax.plan.topologies import topology


def test_a_gpu_computes_a_batch_whole_where_a_tpu_takes_it_in_parts(configured):
    """See `micro_batches`: what a GPU holds of the larger batch must be counted."""
    config = configured("configs/qwen3.py", "model.checkpoint=Qwen/Qwen3-1.7B", "train.batch_size=256")
    work = papers_work(config)
    found = {
        name: estimate(work, config, abstract_mesh(config, topology(name)), topology(name)).activations
        for name in ("v6e-1", "h100-1")
    }
    assert found["h100-1"] > 2 * found["v6e-1"]
