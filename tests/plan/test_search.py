"""What a plan is worked out from: the model, its memory by the estimate, and the operations of a step."""

import math

from cft_jax.models.abstract import abstract_model
from cft_jax.models.flops import Operations
from cft_jax.plan.programs import papers_work, train_program
from cft_jax.plan.search import abstract_mesh, estimate
from cft_jax.plan.topologies import topology
from cft_jax.runs.base import model_options
from cft_jax.sharding.mesh import make_mesh


def test_a_gpu_computes_a_batch_whole_where_a_tpu_takes_it_in_parts(configured):
    """See `micro_batches`: what a GPU holds of the larger batch must be counted."""
    config = configured("configs/qwen3.py", "model.checkpoint=Qwen/Qwen3-1.7B", "train.batch_size=256")
    work = papers_work(config)
    found = {
        name: estimate(work, config, abstract_mesh(config, topology(name)), topology(name)).activations
        for name in ("v6e-1", "h100-1")
    }
    assert found["h100-1"] > 2 * found["v6e-1"]


def test_what_is_kept_counts_among_the_operations(configured):
    """By hand: 2 rows of 256 tokens, forwards and backwards through the model, forwards through its base."""
    options = ("model.checkpoint=Qwen/Qwen3-0.6B", "train.keep.weight=0.1", "train.keep.rows=2")
    found = {}
    for kind in ("none", "kl", "replay"):
        config = configured("configs/qwen3.py", *(() if kind == "none" else (*options, f"train.keep.kind={kind}")))
        work = papers_work(config)
        model = abstract_model(work.model, **model_options(config.model, make_mesh()))
        found[kind] = train_program(work, config, model, work.shapes(8)[0]).ideal_flops
    each = Operations.forward(work.model).count(tokens=512, steps=512)
    assert found["replay"] - found["none"] == 2 * each
    assert math.isclose(found["kl"] - found["none"], 3 * each)


def test_a_base_that_is_made_first_gives_the_papers_shapes_its_model(configured, tmp_path):
    (tmp_path / "base.py").write_text(
        "from cft_jax.config import default_config_dict\n"
        "def get_config():\n"
        "    config = default_config_dict()\n"
        "    config.model.checkpoint = 'Qwen/Qwen3-0.6B'\n"
        "    config.export.format = 'merged'\n"
        "    return config\n"
    )
    config = configured("configs/qwen3.py", "model.checkpoint=", f"model.base={tmp_path / 'base.py'}")
    assert papers_work(config).model.embed_dim == 1024
