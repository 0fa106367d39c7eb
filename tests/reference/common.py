"""What the case generators share: seeds, tiny random models, float64 runs, and writing a case folder.

Written for torch 2.11.0, diffusers 0.38.0, peft 0.19.1, transformers 4.57.6 (see README.md).
"""

import contextlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

sys.dont_write_bytecode = True
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import diffusers  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: E402
from diffusers.models import embeddings  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402, F401
from transformers.models.t5.modeling_t5 import T5LayerNorm  # noqa: E402

transformers.utils.logging.disable_progress_bar()
diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()

PARITY = Path(__file__).resolve().parent.parent / "fixtures" / "parity"
METRIC = "per tensor ||a-b||_2 / ||b||_2, b = expected"
VERSIONS = {m.__name__: m.__version__.split("+")[0] for m in (torch, diffusers, peft, transformers)}

torch.set_num_threads(1)


# ---- random numbers -------------------------------------------------------------------------------------------------


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randomise(model, seed, gain=0.8):
    """Fills every parameter: no zero bias, no unit norm gain, so that a forgotten one shows."""
    g = generator(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            draw = torch.randn(p.shape, generator=g)
            if p.ndim > 1:
                p.copy_(draw * gain / math.sqrt(p[0].numel()))
            elif name.endswith("weight"):
                p.copy_(1 + 0.2 * draw)
            else:
                p.copy_(0.1 * draw)
    return model.eval().requires_grad_(False)


# ---- the transformer ------------------------------------------------------------------------------------------------


def tiny_transformer(seed, **config):
    return randomise(FluxTransformer2DModel(**config), seed)


def image_ids(rows, cols):
    ids = FluxPipeline._prepare_latent_image_ids(1, rows, cols, "cpu", torch.float32)
    return ids.reshape(rows * cols, 3)


def transformer_inputs(config, seed, rows=3, cols=4, text_len=7, batch=2):
    """Random inputs whose sizes come from the model's config; `timestep` is in [0, 1]."""
    g = generator(seed)
    inputs = {
        "hidden_states": torch.randn(batch, rows * cols, config["in_channels"], generator=g),
        "encoder_hidden_states": torch.randn(batch, text_len, config["joint_attention_dim"], generator=g),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=g),
        "timestep": torch.rand(batch, generator=g) * 0.9 + 0.05,
        "img_ids": image_ids(rows, cols),
        "txt_ids": torch.zeros(text_len, 3),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = 1 + 3 * torch.rand(batch, generator=g)
    return inputs


def run_transformer(model, inputs):
    return model(**{k: v.to(model.dtype) for k, v in inputs.items()}, return_dict=False)[0]


def assert_no_dead_parameter(model, output):
    """`output` is a function that runs `model`: every parameter must matter to it."""
    model.requires_grad_(True)
    out = output()
    (out * torch.randn(out.shape, generator=generator(0)).to(out)).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    model.requires_grad_(False).zero_grad()
    assert not dead, dead


# ---- float64 --------------------------------------------------------------------------------------------------------


def _sinusoid(dtype):
    def embed(timesteps, embedding_dim, flip_sin_to_cos=False, downscale_freq_shift=1, scale=1, max_period=10000):
        half = embedding_dim // 2
        exponent = -math.log(max_period) * torch.arange(half, dtype=dtype) / (half - downscale_freq_shift)
        angle = scale * timesteps[:, None].to(dtype) * torch.exp(exponent)[None]
        parts = [torch.cos(angle), torch.sin(angle)] if flip_sin_to_cos else [torch.sin(angle), torch.cos(angle)]
        return torch.cat(parts, dim=-1)

    return embed


def _t5_norm(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@contextlib.contextmanager
def float64(sinusoid=torch.float64):
    """Inside, the libraries' own casts to float32 go to float64; models and inputs must be `.double()`.

    `sinusoid=torch.float32` keeps only the time and guidance sinusoid in float32. Its angles reach 1000 rad or more
    (3500 for guidance), so float32 rounding there moves the output more than everything else together.
    """
    saved = torch.Tensor.float, embeddings.get_timestep_embedding, T5LayerNorm.forward
    torch.Tensor.float = torch.Tensor.double
    embeddings.get_timestep_embedding = _sinusoid(sinusoid)
    T5LayerNorm.forward = _t5_norm
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float, embeddings.get_timestep_embedding, T5LayerNorm.forward = saved


def double(tensors):
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


def relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def compare(ours, reference):
    return {k: {"rel": sig(relative(v, reference[k]))} for k, v in ours.items() if v.is_floating_point()}


def sig(x):
    return float(f"{x:.4g}")


def f32_against_f64(expected, compute):
    """Both float64 comparisons of `float64()`. `compute()` returns the tensors of `expected`, in float64."""
    report = {}
    for key, dtype in ("f32_vs_f64", torch.float64), ("f32_vs_f64_with_f32_sinusoid", torch.float32):
        with float64(dtype), torch.no_grad():
            report[key] = compare(expected, compute())
    return report


def assert_tolerance(tolerance, factor=2):
    """A bound is honest if float32 itself meets it with room: the float64 difference, times `factor`."""
    bounds = {"f32_vs_f64": tolerance["rel"]}
    if "rel_if_sinusoid_is_bit_equal" in tolerance:
        bounds["f32_vs_f64_with_f32_sinusoid"] = tolerance["rel_if_sinusoid_is_bit_equal"]
    for report, bound in bounds.items():
        for tensor, error in tolerance[report].items():
            assert error["rel"] * factor < bound, (report, tensor, error, bound)


# ---- adapters -------------------------------------------------------------------------------------------------------

SCRIPT_TARGETS = [
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
]  # the default of diffusers' train_dreambooth_lora_flux.py


def adapter_metadata(config):
    """A LoraConfig as diffusers stores it, with lists where PEFT has unordered sets."""
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


def save_adapter(model, path, adapter="default"):
    """Writes the file that FluxPipeline.save_lora_weights writes, alpha and patterns in its metadata."""
    path = Path(path)
    FluxPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=adapter_tensors(model, adapter),
        weight_name=path.name,
        transformer_lora_adapter_metadata=adapter_metadata(model.peft_config[adapter]),
    )


def adapter_tensors(model, adapter="default"):
    return {k: v.detach().clone().contiguous() for k, v in get_peft_model_state_dict(model, adapter_name=adapter).items()}


def describe_adapter(config, file):
    return {
        "file": file,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": sorted(config.target_modules),
    }


# ---- case folders ---------------------------------------------------------------------------------------------------


def case_folder(name):
    """An empty folder for the case. Two cases may share a model: then it belongs to one of them."""
    folder = PARITY / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _layout(tensors):
    return {k: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")} for k, v in tensors.items()}


def write_case(folder, kind, description, tolerance, inputs, expected, **fields):
    """`case.json`, `inputs.safetensors` and `expected.safetensors`; `fields` are the kind's own entries."""
    for name, t in {**inputs, **expected}.items():
        assert not t.is_floating_point() or torch.isfinite(t).all(), name
    case = {"kind": kind, "name": Path(folder).name, "description": description, "tolerance": {**tolerance, "metric": METRIC}}
    if "metric" in tolerance:
        case["tolerance"]["metric"] = tolerance["metric"]
    case |= {**fields, "inputs": _layout(inputs), "expected": _layout(expected), "versions": VERSIONS}
    (Path(folder) / "case.json").write_text(json.dumps(case, indent=1, ensure_ascii=False) + "\n")
    save_file({k: v.contiguous() for k, v in inputs.items()}, Path(folder) / "inputs.safetensors")
    save_file({k: v.contiguous() for k, v in expected.items()}, Path(folder) / "expected.safetensors")
    print(f"{case['name']:32s} {kind}")
