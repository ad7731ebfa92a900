import itertools
from collections import Counter

import jax
import numpy as np
import pytest
from scipy import stats

from cft_jax.common.errors import UserError
from cft_jax.generate import Sampler, engine
from cft_jax.generate.sampling import request_key, uniforms
from cft_jax.generate.vocabulary import TILE
from cft_jax.models.config import LoraSpec
from cft_jax.sharding.mesh import make_mesh
from cft_jax.text.chat import encode_chat

STOP = 3
PROMPTS = [[11, 60, 4, 9, 33, 2, 71], [8], [20, 5, 19, 44, 27, 6, 7, 8, 9, 10, 31, 90, 55, 14]]


@pytest.fixture
def make_sampler(make_model, small_tokenizer):
    def make(family, *, mesh=None, lora=None, stop_ids=(STOP,), **options):
        return Sampler(make_model(family, mesh=mesh, lora=lora), small_tokenizer, stop_ids=stop_ids, **options)

    return make


def tokens_of(completions):
    return [[item.tokens for item in items] for items in completions]


def logits_after(model, prompt, tokens):
    """Logits after the prompt and after each of the tokens, from one pass over the whole text; float64."""
    text = [*prompt, *tokens]
    # Padded, so that texts of all lengths run through one compiled program.
    width = max(40, len(text))
    mask = np.arange(width)[None] < len(text)
    logits = model(np.pad(text, (0, width - len(text)))[None], mask=mask)
    return np.asarray(logits[0, len(prompt) - 1 : len(text)], np.float64)


def drawn_alone(model, prompt, seed, sample, length):
    """A sample drawn token by token, the whole text run anew for each; float64 on the same random numbers."""
    tokens: list[int] = []
    numbers = uniforms(request_key(seed, prompt, 0)[None], np.array([sample]), np.array([0]), steps=length)[0]
    while len(tokens) < length:
        logits = logits_after(model, prompt, tokens)[-1]
        probs = np.exp(logits - logits.max())
        upper, lower = np.asarray(numbers[len(tokens)], np.float64)
        padded = np.pad(probs, (0, -probs.size % TILE)).reshape(-1, TILE)
        tile = np.searchsorted(padded.sum(1).cumsum(), upper * probs.sum(), side="right")
        within = np.searchsorted(padded[tile].cumsum(), lower * padded[tile].sum(), side="right")
        token = int(tile * TILE + within)
        if token == STOP:
            break
        tokens.append(token)
    return tuple(tokens)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_decode_beyond_the_window_equals_prefill(family, make_model, make_sampler):
    # Windows are 5 and 7; the rows' caches grow from 16 columns on; three rows serve five samples.
    model, length = make_model(family), 21
    found = make_sampler(family, batch_size=3).complete(PROMPTS[:2], num_samples=5, max_new_tokens=length, seed=4)
    for prompt, completions in zip(PROMPTS, found, strict=False):
        for sample in (0, 4):
            assert completions[sample].tokens == drawn_alone(model, prompt, 4, sample, length)


@pytest.mark.parametrize("temperature, top_p", [(1, 1), (0.5, 1), (1, 0.8), (1.3, 0.95)])
def test_texts_follow_the_model(temperature, top_p, make_model, make_sampler):
    model, prompt, vocab = make_model("few_tokens"), [4, 9, 1], 13

    def probs(text):
        scaled = logits_after(model, prompt, text)[-1] / temperature
        p = np.exp(scaled - scaled.max())
        p /= p.sum()
        order = np.argsort(-p)
        p[order[np.cumsum(p[order]) - p[order] >= top_p]] = 0
        return p / p.sum()

    exact = {}
    first = probs([])
    exact[()] = first[STOP]
    for token in set(range(vocab)) - {STOP}:
        second = first[token] * probs([token])
        exact[(token,)] = second[STOP]
        exact |= {(token, other): second[other] for other in range(vocab) if other != STOP}
    count = 20_000
    sampler = make_sampler("few_tokens", batch_size=7)
    drawn = sampler.complete(
        [prompt], num_samples=count, max_new_tokens=2, seed=0, temperature=temperature, top_p=top_p
    )[0]
    observed = dict.fromkeys(exact, 0)
    for item in drawn:
        observed[item.tokens] += 1
    assert sum(exact.values()) == pytest.approx(1)
    assert all(exact[text] > 0 for text, n in observed.items() if n)
    common = [text for text, p in exact.items() if p * count >= 5]
    cells = np.array([[observed[text], exact[text] * count] for text in common])
    rest = count - cells.sum(axis=0)
    if rest[1] >= 1:
        cells = np.vstack([cells, rest])
    got, want = cells.T
    assert stats.chisquare(got, want * got.sum() / want.sum()).pvalue > 1e-3


def test_batch_size_number_and_order_change_nothing(make_sampler):
    ask = {"max_new_tokens": 9, "seed": 5}
    whole = tokens_of(make_sampler("llama", batch_size=1000).complete(PROMPTS, num_samples=16, **ask))
    assert len({tokens for items in whole for tokens in items}) > 40
    for batch_size in (1, 7):
        sampler = make_sampler("llama", batch_size=batch_size)
        assert tokens_of(sampler.complete(PROMPTS[::-1], num_samples=12, **ask)) == [x[:12] for x in whole[::-1]]
    alone = [make_sampler("llama", batch_size=7).complete([prompt], num_samples=12, **ask)[0] for prompt in PROMPTS]
    assert tokens_of(alone) == [items[:12] for items in whole]


def test_seeds(make_sampler):
    sampler, ask = make_sampler("qwen3"), {"num_samples": 4, "max_new_tokens": 6}
    first = tokens_of(sampler.complete(PROMPTS, seed=1, **ask))
    assert tokens_of(sampler.complete(PROMPTS, seed=[1, 2, 1], **ask))[::2] == first[::2]
    assert tokens_of(sampler.complete(PROMPTS, seed=2, **ask))[0] != first[0]
    # Equal prompts of a call differ from each other; the first is the prompt's own answer.
    twice = tokens_of(sampler.complete([PROMPTS[0]] * 3, seed=1, **ask))
    assert twice[0] == first[0] != twice[1] != twice[2] != twice[0]
    with pytest.raises(TypeError, match="seed"):
        sampler.complete(PROMPTS, **ask)


def test_many_prompts_refill_few_rows(make_sampler, random_strings):
    prompts = [list(string) for string in random_strings(17, seed=8, longest=30, alphabet=40)]
    ask = {"num_samples": 2, "max_new_tokens": 16, "seed": 3}
    stops = (STOP, *range(60, 75))
    few = make_sampler("llama", batch_size=8, stop_ids=stops).complete(prompts, **ask)
    many = make_sampler("llama", stop_ids=stops).complete(prompts, **ask)
    assert few == many
    lengths = [len(item.tokens) for items in few for item in items]
    assert min(lengths) < 5 and max(lengths) == 16


def test_stop_tokens_and_lengths(make_sampler):
    free = make_sampler("few_tokens", stop_ids=()).complete([[4, 9]], num_samples=60, max_new_tokens=8, seed=0)[0]
    assert all(len(item.tokens) == 8 and item.reason == "length" for item in free)
    stopped = make_sampler("few_tokens", stop_ids=(7, 2)).complete([[4, 9]], num_samples=60, max_new_tokens=8, seed=0)
    for item, whole in zip(stopped[0], free, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in (2, 7)]
        assert item.tokens == whole.tokens[: ends[0] if ends else 8]
        assert item.reason == ("stop" if ends else "length")
    assert len({item.tokens for item in stopped[0]}) > 20


def test_stop_strings_cut_the_text(make_sampler, small_tokenizer):
    sampler, ask = make_sampler("llama", stop_ids=()), {"num_samples": 60, "max_new_tokens": 14, "seed": 2}
    whole = sampler.sample([PROMPTS[0]], **ask)[0]
    # A frequent letter, and two characters that follow each other somewhere: one token or two.
    letters = Counter(letter for text in whole for letter in text if letter.isascii())
    pairs = Counter(a + b for text in whole for a, b in itertools.pairwise(text) if (a + b).isascii())
    stop = [pairs.most_common(3)[-1][0], letters.most_common(1)[0][0]]
    cut = sampler.sample([PROMPTS[0]], stop=stop, **ask)[0]
    assert sum(a != b for a, b in zip(cut, whole, strict=True)) > 5
    for short, long in zip(cut, whole, strict=True):
        places = [long.find(text) for text in stop if text in long]
        assert short == long[: min(places, default=len(long))]
    ended = sampler.complete([PROMPTS[0]], stop=stop[1], **ask)[0]
    for item, long in zip(ended, whole, strict=True):
        assert (item.reason == "stop_string") == (stop[1] in long)
        assert small_tokenizer.decode(list(item.tokens[:-1])).find(stop[1]) == -1


def test_texts_and_messages(make_sampler, small_tokenizer):
    sampler = make_sampler("llama", stop_ids=None)
    assert sampler.stop_ids == (small_tokenizer.eos_token_id,)
    messages = [{"role": "user", "content": "ten"}]
    ids = encode_chat(small_tokenizer, messages)
    ask = {"num_samples": 3, "max_new_tokens": 5, "seed": 0}
    found = sampler.complete([ids], **ask)[0]
    texts = sampler.sample([messages, ids], **ask)
    assert texts[0] == [small_tokenizer.decode(list(item.tokens), skip_special_tokens=True) for item in found]


def test_greedy_is_transformers_greedy(tmp_path, write_hf, hf_config, small_tokenizer):
    import torch

    from cft_jax.checkpoints import from_pretrained

    theirs = write_hf(tmp_path, hf_config("qwen3"), seed=3)
    prompts = [[5, 9, 40, 33, 2, 71], [8, 8, 60, 4, 9, 33, 2, 71, 20, 5, 19, 44]]
    sampler = Sampler(from_pretrained(tmp_path, dtype="float32", param_dtype="float32"), small_tokenizer, stop_ids=())
    found = sampler.complete(prompts, num_samples=2, max_new_tokens=24, temperature=0, seed=0)
    for prompt, (one, other) in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, min_new_tokens=24,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert list(one.tokens) == want[0, len(prompt) :].tolist()
        assert one == other


def test_mesh_and_unmerged_adapters(make_sampler):
    lora = LoraSpec(rank=2, alpha=4.0, dropout=0.1, targets=("q_proj", "o_proj", "down_proj"))
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    ask = {"num_samples": 8, "max_new_tokens": 6, "seed": 1}
    one = make_sampler("llama", lora=lora).complete(PROMPTS, **ask)
    assert one == make_sampler("llama", lora=lora, mesh=mesh).complete(PROMPTS, **ask)


def test_long_texts_in_little_memory(make_model, make_sampler, monkeypatch):
    held = []
    kept = engine.decode
    monkeypatch.setattr(engine, "decode", lambda *args, **named: held.append(args[2].keys) or kept(*args, **named))
    # One token takes 2 * 2 layers * 3 heads * 8 * 4 bytes = 384 bytes: 60 columns of at most two rows and their copy.
    sampler = make_sampler("qwen3", stop_ids=(), cache_bytes=2 * 2 * 60 * 384)
    found = sampler.complete(PROMPTS[:1], num_samples=3, max_new_tokens=60, temperature=0.8, seed=0)[0]
    assert max(x.shape[1] * x.shape[2] for keys in held for x in jax.tree.leaves(keys)) <= 120
    logits = logits_after(make_model("qwen3"), PROMPTS[0], found[2].tokens) / 0.8
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mean = np.mean([log_probs[i, token] for i, token in enumerate(found[2].tokens)])
    entropy = -(np.exp(log_probs) * log_probs).sum(-1).mean()
    # The mean log-probability of draws is minus the entropy, give or take the spread of 60 of them.
    assert abs(mean + entropy) < 0.6


def test_refused_arguments(make_sampler):
    sampler, ask = make_sampler("qwen3"), {"num_samples": 1, "max_new_tokens": 1, "seed": 0}
    for prompts, changes, message in [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [5, 97]], {}, "prompt 1 holds token 97"),
        ([[1]], {"num_samples": 0}, "num_samples=0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1"),
        ([[1]], {"top_p": 0.0}, r"top_p=0\.0"),
        ([[1]], {"seed": [1, 2]}, "seed has 2 numbers for 1 prompts"),
        ([[1]], {"stop": [""]}, "stop="),
    ]:
        with pytest.raises(UserError, match=message):
            sampler.sample(prompts, **(ask | changes))
    assert sampler.sample([], **ask) == []
