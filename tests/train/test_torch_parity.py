"""Optimizer steps beside PyTorch: transformers' models and PEFT, full logits, as a user would write it.

The same weights through files in HF format, the same batches, dropout 0, learning rate 2e-4, the paper's schedule.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file

from cft_jax.checkpoints import from_pretrained, save_pretrained
from cft_jax.objectives.batch_loss import head_options
from cft_jax.sharding.mesh import make_mesh
from cft_jax.train.optimizer import adamw, warmup_cosine
from cft_jax.train.state import initial_state, split_model, state_shardings
from cft_jax.train.step import StepOptions, make_train_step

STEPS, TOTAL, MANY = 10, 60, 50
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def torch_loss(model, batch, kind):
    """Plain PyTorch: logits of the whole sequence, log-softmax, targets gathered at the steps."""
    tokens, index = torch.tensor(batch.tokens).long(), torch.tensor(batch.target_index).long()
    logits = model(tokens, attention_mask=torch.tensor(batch.subtree_end > 0).long()).logits.float()
    log_probs = torch.log_softmax(logits, dim=-1)
    rows = torch.arange(tokens.shape[0])[:, None]
    step = torch.tensor(batch.target_position).long()
    q = torch.tensor(batch.target_probs)
    chosen = log_probs[rows, index[rows, step], torch.tensor(batch.target_ids).long()]
    terms = -q * chosen
    if kind == "soft":
        terms = terms + torch.special.xlogy(q, q)
    per_step = torch.zeros(batch.target_weight.shape).scatter_add(1, step, terms)
    return (per_step * torch.tensor(batch.target_weight)).sum() / float(batch.row_weight.sum())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random Llama with logits of order one."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    directory = tmp_path_factory.mktemp("base")
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def torch_run(base, adapter, batches, kind):
    """Losses, and the gradients of every matrix at every step; `adapter` is written with the starting weights."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(TARGETS)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        model.save_pretrained(adapter)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-4, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(0.03 * TOTAL), TOTAL)
    losses, gradients = [], []
    for batch in batches:
        optimizer.zero_grad()
        loss = torch_loss(model, batch, kind)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.numpy().copy() for name, parameter in trained.items()})
        optimizer.step()
        schedule.step()
    return losses, gradients


def our_step(model, kind, total):
    """Parts, step, first state and frozen weights of a training over `total` steps."""
    optimizer = adamw(weight_decay=0.01, max_grad_norm=0.0)
    parts, weights, frozen = split_model(model)
    rate = functools.partial(warmup_cosine, peak=2e-4, warmup_ratio=0.03, total_steps=total)
    loss = head_options(kind, tau=1.0, softcap=None, mesh=model.mesh)
    options = StepOptions(loss, (), 1, 11, optimizer, rate)
    step = make_train_step(parts, options, state_shardings(weights, optimizer))
    return parts, step, initial_state(weights, optimizer), frozen


def jax_run(base, adapter, batches, kind, put):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = from_pretrained(base, dtype=jnp.float32, param_dtype=jnp.float32, mesh=mesh, adapter=adapter)
    _, step, state, frozen = our_step(model, kind, TOTAL)
    losses, gradients = [], []
    moments = {name: np.zeros(weight.shape, np.float64) for name, weight in state.weights.items()}
    for batch in batches:
        state, metrics = step(state, frozen, put(batch, mesh))
        losses.append(float(metrics.loss))
        # The gradient is what the first moment gained: mu = 0.9 mu + 0.1 g.
        new = {name: np.asarray(mu, np.float64) for name, mu in state.optimizer[0].mu.items()}
        gradients.append({name: (new[name] - 0.9 * moments[name]) / 0.1 for name in new})
        moments = new
    return losses, gradients


def in_torch_names(gradients):
    """Our adapters' gradients [L, *in, R] and [L, R, *out] as PEFT's matrices by name."""
    found = {}
    for name, gradient in gradients.items():
        layer = re.fullmatch(r"stacks/0/0/(attn|mlp)/(\w+)/lora/([ab])", name)
        block = {"attn": "self_attn", "mlp": "mlp"}[layer[1]]
        for index, matrix in enumerate(gradient):
            rank = 4
            flat = matrix.reshape(-1, rank).T if layer[3] == "a" else matrix.reshape(rank, -1).T
            key = f"base_model.model.model.layers.{index}.{block}.{layer[2]}.lora_{layer[3].upper()}.default.weight"
            found[key] = flat
    return found


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_adapters_train_as_in_torch(tmp_path, base, make_batch, put, kind):
    batches = [make_batch(seed, kind=kind) for seed in range(STEPS)]
    losses, gradients = torch_run(base, tmp_path / "adapter", batches, kind)
    our_losses, our_gradients = jax_run(base, tmp_path / "adapter", batches, kind, put)
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    for ours, theirs in zip(map(in_torch_names, our_gradients), gradients, strict=True):
        assert ours.keys() == theirs.keys()
        for name, matrix in theirs.items():
            assert np.linalg.norm(ours[name] - matrix) <= 1e-4 * np.linalg.norm(matrix), name


def test_all_weights_train_as_in_torch(base, make_batch, put):
    batches = [make_batch(seed) for seed in range(STEPS)]
    losses, gradients = torch_run(base, None, batches, "soft")
    our_losses, our_gradients = jax_run(base, None, batches, "soft", put)
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        whole = [np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in side.values())) for side in (ours, theirs)]
        np.testing.assert_allclose(whole[0], whole[1], rtol=1e-5)
        for name, key in (("embed", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
            assert np.linalg.norm(ours[name] - theirs[key]) <= 1e-4 * np.linalg.norm(theirs[key])


def fifty_torch_steps(theirs, adapter, trained, batches, kind):
    """Losses; the adapter is written to `adapter` before and to `trained` after."""
    torch.manual_seed(1)
    model = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(ATTENTION)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(0.03 * MANY), MANY)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = torch_loss(model, batch, kind)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        schedule.step()
    model.save_pretrained(trained)
    return losses


def our_fifty_steps(base, adapter, trained, batches, kind, put):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = from_pretrained(base, dtype=jnp.float32, param_dtype=jnp.float32, mesh=mesh, adapter=adapter)
    parts, step, state, frozen = our_step(model, kind, MANY)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, put(batch, mesh))
        losses.append(float(metrics.loss))
    parts.update(model, state.weights)
    save_pretrained(model, trained, format="adapter")
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_fifty_steps_of_every_family(tmp_path, write_hf, hf_config, make_batch, put, family, kind):
    """The whole schedule; rows are longer than the sliding windows."""
    theirs = write_hf(tmp_path / "base", hf_config(family))
    batches = [make_batch(seed, kind=kind) for seed in range(MANY)]
    losses = fifty_torch_steps(theirs, tmp_path / "adapter", tmp_path / "torch", batches, kind)
    ours = our_fifty_steps(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours", batches, kind, put)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    expected = load_file(tmp_path / "torch" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    before = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, matrix in expected.items():
        moved = np.linalg.norm(matrix - before[name])
        assert moved > 5e-3 * np.linalg.norm(before[name]), name
        # Stricter than 1e-3 of the matrix: Adam makes a full step of the smallest gradient, whatever its rounding.
        assert np.linalg.norm(found[name] - matrix) <= 2e-2 * moved, name
