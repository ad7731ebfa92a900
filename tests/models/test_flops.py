"""Operations of a step, against counts written out by hand and the published active parameters."""

import pytest

from cft_jax.models.families import PUBLISHED
from cft_jax.models.flops import Operations, peak_flops


def test_operations_of_a_dense_model():
    operations = Operations.of(PUBLISHED["Qwen/Qwen3-1.7B"], lora=True)
    # Config of the hub: width 2048, 28 layers, 16 heads and 8 key/value heads of 128, feed-forward 6144, norms of
    # 2 x 2048 + 2 x 128; vocabulary 151,936, embedding and head tied.
    attention, mlp, norms = 2048 * 128 * (16 + 8 + 8 + 16), 3 * 2048 * 6144, 2 * 2048 + 2 * 128
    assert operations.per_token == 4 * 28 * (attention + mlp + norms)
    assert operations.per_step == 4 * 151936 * 2048
    assert operations.count(tokens=1000, steps=10) == 1000 * operations.per_token + 10 * operations.per_step


@pytest.mark.parametrize(("name", "active"), [("openai/gpt-oss-20b", 3.61e9)])
def test_a_mixture_counts_the_experts_that_a_token_reaches(name, active):
    # Active parameters of the model card (arXiv 2508.10925, table 1): head included, embedding left out.
    operations = Operations.of(PUBLISHED[name], lora=False)
    assert (operations.per_token + operations.per_step) / 6 == pytest.approx(active, rel=2e-3)


def test_trained_weights_cost_half_as_much_again():
    config = PUBLISHED["google/gemma-3-1b-it"]
    lora, full = Operations.of(config, lora=True), Operations.of(config, lora=False)
    assert full.per_token * 2 == lora.per_token * 3
    assert full.per_step * 2 == lora.per_step * 3


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("cpu", None),
    ],
)
def test_peaks_by_the_kinds_that_jax_reports(kind, teraflops):
    found = peak_flops(kind)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))
