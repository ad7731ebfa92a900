"""The two backends on the same weights: equal probabilities, samples of the same distribution.

Tolerance 1e-4 for float32 log-probabilities of torch and JAX on CPU.
"""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file
from scipy import stats

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.common.errors import UserError
from cft_jax.distributions import OutputSpace
from cft_jax.evaluate.backends.hf_backend import HfBackend, load_hf_model
from cft_jax.evaluate.backends.jax_backend import JaxBackend
from cft_jax.generate.stops import all_stop_ids
from cft_jax.models.config import LoraSpec
from cft_jax.models.layers import LoraParam
from cft_jax.text import build_trie
from cft_jax.text.scratch import save_tokenizer, train_tokenizer

SPACE = OutputSpace(("0", "1", "12", "-3.5", "-3.25", "7.125"), np.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]))
PROMPTS = ([5, 9, 33, 40, 8], [7, 70, 11])

pytestmark = pytest.mark.filterwarnings("ignore:.*target_parameters:UserWarning")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SPACE.values)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, write_hf, hf_config, tokenizer):
    """Directories in HF format by family, made once."""
    made = {}

    def directory(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            write_hf(path, hf_config(family, vocab_size=len(tokenizer)))
            save_tokenizer(tokenizer, path)
            # Two stop tokens, and a checkpoint's own sampling settings, which must not act.
            stops = [tokenizer.eos_token_id, 6]
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops, "top_k": 1}))
            made[family] = path
        return path if family not in made else made[family]

    return directory


def jax_backend(directory, tokenizer, **options):
    return JaxBackend(from_pretrained(directory, dtype=jnp.float32, param_dtype=jnp.float32, **options), tokenizer)


def hf_backend(directory, tokenizer):
    model, _ = load_hf_model(str(directory), dtype="float32", revision="main", local_files_only=True)
    return HfBackend(model, tokenizer, stop_ids=[tokenizer.eos_token_id, 6])


def loaded_hf_backend(directory, tokenizer):
    """With the stop tokens that the files name."""
    model, named = load_hf_model(str(directory), dtype="float32", revision="main", local_files_only=True)
    return HfBackend(model, tokenizer, stop_ids=all_stop_ids(named, tokenizer, vocab_size=len(tokenizer)))


def assert_scores_agree(one, other, tokenizer):
    trie = build_trie(tokenizer, SPACE, tokenizer.eos_token_id)
    some = np.unique([0, *[trie.find(trie.leaves()[0][1][:n]) for n in range(2)]])
    for prefixes in (None, [np.arange(trie.num_prefixes), some]):
        pairs = zip(
            one.score(PROMPTS, [trie, trie], prefixes=prefixes),
            other.score(PROMPTS, [trie, trie], prefixes=prefixes),
            strict=True,
        )
        for mine, theirs in pairs:
            assert np.isfinite(mine.child_log_probs[: trie.child_offsets[1]]).all()
            for name in ("child_log_probs", "prefix_log_probs", "string_log_probs", "other_stop_log_probs"):
                np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), atol=1e-4, err_msg=name)


# The other families: llama with the adapter below, gpt-oss like Gemma has windows, and every family against torch in
# the tests of the models.
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_scores_agree(family, checkpoint, tokenizer):
    assert_scores_agree(
        hf_backend(checkpoint(family), tokenizer), jax_backend(checkpoint(family), tokenizer), tokenizer
    )


def test_an_exported_adapter_scores_alike(checkpoint, tokenizer, tmp_path):
    lora = LoraSpec(4, 8.0, 0.0, ("q_proj", "v_proj"))
    model = from_pretrained(checkpoint("llama"), dtype=jnp.float32, param_dtype=jnp.float32, lora=lora)
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model, LoraParam)):
        if path[-1] == "b":
            variable.set_value(jnp.asarray(rng.normal(0, 0.3, variable.shape), jnp.float32))
    save_pretrained(model, tmp_path / "export", format="adapter")
    exported = hf_backend(tmp_path / "export", tokenizer)
    assert_scores_agree(exported, JaxBackend(model, tokenizer), tokenizer)
    assert exported.fingerprint != hf_backend(checkpoint("llama"), tokenizer).fingerprint


def test_the_fingerprint_sees_more_than_weights(checkpoint, tokenizer, tmp_path):
    """The scale of an adapter and every number of config.json that changes the mathematics."""
    base = checkpoint("llama")
    lora = LoraSpec(4, 32.0, 0.0, ("q_proj",))
    model = from_pretrained(base, dtype=jnp.float32, param_dtype=jnp.float32, lora=lora)
    model.stacks[0][0].attn.q_proj.lora.b.set_value(model.stacks[0][0].attn.q_proj.lora.b[...] + 0.1)
    save_pretrained(model, tmp_path / "alpha32", format="adapter")
    for copy, file, change in (
        (tmp_path / "alpha2000", "adapter_config.json", {"lora_alpha": 2000}),
        (tmp_path / "eps", "config.json", {"rms_norm_eps": 1e-3}),
        (tmp_path / "stops", "generation_config.json", {"eos_token_id": 9}),
    ):
        shutil.copytree(tmp_path / "alpha32" if "alpha" in copy.name else base, copy)
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | change))
    for backend in (jax_backend, loaded_hf_backend):
        prints = [backend(where, tokenizer).fingerprint for where in (base, *sorted(tmp_path.iterdir()))]
        assert len(set(prints)) == 5
        assert backend(tmp_path / "eps", tokenizer).fingerprint == prints[3]


def test_pickled_weights_are_never_loaded(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), copy)
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        load_hf_model(str(copy), dtype="float32", revision="main", local_files_only=True)


def test_samples_follow_the_same_distribution(checkpoint, tokenizer):
    """First tokens of 1,000 draws by each backend: a chi-square test of equal distributions."""
    counts = []
    for backend in (hf_backend(checkpoint("qwen3"), tokenizer), jax_backend(checkpoint("qwen3"), tokenizer)):
        texts = backend.sample(PROMPTS[:1], seeds=[3], num_samples=1000, max_new_tokens=1, temperature=1.0, top_p=1.0)[
            0
        ]
        assert len(texts) == 1000
        counts.append({text: texts.count(text) for text in set(texts)})
    common = sorted(set(counts[0]) | set(counts[1]))
    table = np.array([[count.get(text, 0) for text in common] for count in counts])
    rare = table.sum(axis=0) < 10
    table = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_the_seed_decides_the_samples(checkpoint, tokenizer):
    backend = hf_backend(checkpoint("qwen3"), tokenizer)
    settings = {"num_samples": 5, "max_new_tokens": 6, "temperature": 0.7, "top_p": 0.9}
    both = backend.sample(PROMPTS, seeds=[1, 2], **settings)
    assert backend.sample(PROMPTS[1:], seeds=[2], **settings) == both[1:]
    assert backend.sample(PROMPTS[1:], seeds=[3], **settings) != both[1:]
    greedy = backend.sample(PROMPTS[:1], seeds=[1], **(settings | {"temperature": 0.0}))[0]
    assert len(set(greedy)) == 1


def test_likelihoods_agree(checkpoint, tokenizer):
    one, other = hf_backend(checkpoint("qwen3"), tokenizer), jax_backend(checkpoint("qwen3"), tokenizer)
    requests = [(PROMPTS[0], [4, 40, 7]), (PROMPTS[1], [9]), (PROMPTS[0], [11]), (PROMPTS[0], [])]
    rows = [[*PROMPTS[1], 5, 6, 60], PROMPTS[0], [3]]
    for mine, theirs in zip(other.log_likelihoods(requests), one.log_likelihoods(requests), strict=True):
        assert mine.log_prob == pytest.approx(theirs.log_prob, abs=1e-4)
        assert mine.greedy == theirs.greedy
    for mine, theirs in zip(other.token_log_probs(rows), one.token_log_probs(rows), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_stop_strings_end_both_alike(checkpoint, tokenizer):
    settings = {"seeds": [1, 1], "num_samples": 1, "max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0}
    one, other = hf_backend(checkpoint("qwen3"), tokenizer), jax_backend(checkpoint("qwen3"), tokenizer)
    whole = one.sample(PROMPTS, **settings)
    assert other.sample(PROMPTS, **settings) == whole
    text = max((texts[0] for texts in whole), key=len)
    stop = text[len(text) // 2 :][:2]
    cut = [[texts[0].partition(stop)[0]] for texts in whole]
    assert cut != whole
    assert one.sample(PROMPTS, **settings, stop=[stop]) == other.sample(PROMPTS, **settings, stop=[stop]) == cut
