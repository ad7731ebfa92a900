"""Peak host memory while a checkpoint is loaded: what the devices hold, and a fraction of the largest tensor."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest

from cft_jax.checkpoints import hf_names
from cft_jax.models.config import GatedMlp, LayerSpec, ModelConfig, Rope
from cft_jax.models.families import llama_to_hf

CONFIG = ModelConfig(
    num_layers=10,
    embed_dim=1024,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=40_000,
    layer_pattern=(LayerSpec(None, Rope(1e4)),),
    mlp=GatedMlp(4096, "silu"),
    norm_eps=1e-5,
    attn_scale=64**-0.5,
    tie_head=False,
)
SIZES = {"N": 16, "K": 8, "H": 64, "D": 1024, "F": 4096, "V": 40_000}
LARGEST = 40_000 * 1024 * 2

# Resident memory is sampled while the checkpoint loads; a small one before it pays for imports and compilers.
SCRIPT = """
import sys, threading, time
import jax, numpy as np
from cft_jax.checkpoints import from_pretrained, write_random_llama
from cft_jax.sharding.mesh import make_mesh
from cft_jax.models.config import *

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

small, large, mesh = sys.argv[1], sys.argv[2], make_mesh(*map(int, sys.argv[3].split(",")))
load = lambda name, **more: from_pretrained(name, dtype="bfloat16", param_dtype="bfloat16", mesh=mesh, **more)
load(small, piece_bytes=900)
start, peak, done = resident(), [0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], resident())

thread = threading.Thread(target=watch)
thread.start()
model = load(large)
done.set()
thread.join()
print(peak[0] - start)
"""


def write_empty(directory):
    """A bfloat16 checkpoint of zeros, as a file with a hole: nothing to write, everything to read."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(llama_to_hf(CONFIG)))
    header, offset = {}, 0
    for name in hf_names.tensor_names(CONFIG):
        shape = name.layout.file_shape(tuple(SIZES[letter] for letter in name.layout.our_letters))
        end = offset + 2 * math.prod(shape)
        header[name.hf] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
@pytest.mark.parametrize("mesh", ["1,4,2"])
def test_the_host_never_holds_a_copy(tmp_path, write_hf, hf_config, mesh):
    write_hf(tmp_path / "small", hf_config("llama"), dtype="bfloat16")
    size = write_empty(tmp_path / "large")
    assert size > 4 * LARGEST
    copies = 8 if mesh == "8,1,1" else 1
    environment = os.environ | {"MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large"), mesh]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    extra = int(run.stdout.split()[-1]) - copies * size
    assert extra <= 1.3 * LARGEST, f"{extra / LARGEST:.2f} of the largest tensor"
