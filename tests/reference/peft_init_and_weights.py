"""What PEFT makes of adapters on a two-layer model: weighted combinations, merged weights, pissa and olora.

torch 2.11.0, peft 0.19.1, seed 81. Writes crates/lora-core/tests/fixtures/peft_combine; crates/lora-core/src/tests_{peft,initial}.rs read it.
Adapter files carry their configuration as `lora_adapter_metadata`, the rest is in expected.safetensors.
"""

import copy
import json
import math
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

OUT = Path(__file__).parents[2] / "crates/lora-core/tests/fixtures/peft_combine"
WIDTH = 12


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def falling(rows, cols, g):
    """A weight whose singular values fall by 0.7 each, as the subspace iteration needs them."""
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, cols), generator=g))
    v, _ = torch.linalg.qr(torch.randn(cols, min(rows, cols), generator=g))
    return u @ torch.diag(2 * 0.7 ** torch.arange(min(rows, cols))) @ v.T


def base_model(g):
    model = Mlp()
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.weight.copy_(falling(*layer.weight.shape, g))
            layer.bias.copy_(0.3 * torch.randn(layer.bias.shape, generator=g))
    return model


ADAPTERS = {
    "r3": dict(r=3, lora_alpha=5.0),
    "r2_up": dict(r=2, lora_alpha=7.0, target_modules=["up"]),
    "r3_low": dict(r=3, lora_alpha=2.0),
    "r2": dict(r=2, lora_alpha=2.0),
    "r4": dict(r=4, lora_alpha=4.0),
    "dora": dict(r=2, lora_alpha=3.0, use_dora=True),
    "with_bias": dict(r=2, lora_alpha=3.0, lora_bias=True),
}


def config(settings):
    return LoraConfig(**{"target_modules": ["up", "down"], "init_lora_weights": True, **settings})


def randomise(model, name, g):
    with torch.no_grad():
        for path, p in sorted(model.named_parameters()):
            if f".{name}." in path or path.endswith(f".{name}"):
                noise = torch.randn(p.shape, generator=g)
                p.copy_(p * (1 + 0.3 * noise) if "magnitude" in path else 0.4 * noise)


def adapter_state(model, name):
    state = {}
    for path, p in model.named_parameters():
        if f".{name}." in path or path.endswith(f".{name}"):
            key = path.removeprefix("base_model.model.").replace(f".{name}", "")
            state[key.removesuffix(".weight") if "magnitude" in key else key] = p.detach().clone()
    return state


def metadata(settings):
    c = config(settings)
    fields = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")
    text = json.dumps({**{k: getattr(c, k) for k in fields}, "target_modules": sorted(c.target_modules)})
    return {"format": "pt", "lora_adapter_metadata": text}


def loaded(base, states, names):
    """A fresh model with the named adapters, all active, in this order."""
    model = get_peft_model(copy.deepcopy(base), config(ADAPTERS[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(ADAPTERS[name]))
    with torch.no_grad():
        for name in names:
            for key, value in states[name].items():
                layer, part = key.split(".", 1)
                module = getattr(model.base_model.model, layer)
                group, _, leaf = part.partition(".")
                getattr(getattr(module, group)[name], leaf or "weight").copy_(value)
    model.base_model.set_adapter(names)
    return model.eval()


def combinations(base, states, out):
    cases = {
        "linear": (["r3", "r3_low"], [0.7, -0.4], "linear", None),
        "cat": (["r3", "r2_up"], [0.7, 1.3], "cat", None),
        "svd_scale_1": (["r2", "r4"], [0.6, -0.9], "svd", 3),
        "svd": (["r3", "r2_up"], [0.6, 0.9], "svd", 2),
        "single": (["r3"], [-0.5], "cat", None),
    }
    for case, (names, weights, kind, rank) in cases.items():
        model = loaded(base, states, names)
        model.base_model.add_weighted_adapter(names, weights, "new", kind, svd_rank=rank)
        for layer in ("up", "down"):
            module = getattr(model.base_model.model, layer)
            out[f"{case}.{layer}.delta"] = module.get_delta_weight("new")
            if case == "linear":
                out[f"{case}.{layer}.lora_A"] = module.lora_A["new"].weight
                out[f"{case}.{layer}.lora_B"] = module.lora_B["new"].weight


def merges(base, states, x, out):
    for case in ("r3 r2_up", "dora", "dora r3", "r3 dora", "with_bias r3"):
        names = case.split()
        model = loaded(base, states, names)
        case = "+".join(names)
        out[f"forward.{case}"] = model(x)
        model.base_model.merge_adapter(safe_merge=True)
        out[f"forward_merged.{case}"] = model(x)
        for layer in ("up", "down"):
            out[f"merged.{case}.{layer}.weight"] = getattr(model.base_model.model, layer).base_layer.weight
            out[f"merged.{case}.{layer}.bias"] = getattr(model.base_model.model, layer).base_layer.bias


def splits(base, x, g, out):
    for init in ("pissa", "pissa_niter_32", "olora"):
        for rslora in (False, True):
            settings = dict(r=3, lora_alpha=6.0, use_rslora=rslora, init_lora_weights=init)
            case = f"{init}{'_rslora' if rslora else ''}"
            torch.manual_seed(0)
            model = get_peft_model(copy.deepcopy(base), config(settings))
            for layer in ("up", "down"):
                module = getattr(model.base_model.model, layer)
                out[f"{case}.{layer}.residual"] = module.base_layer.weight
                out[f"{case}.{layer}.lora_A"] = module.lora_A["default"].weight
                out[f"{case}.{layer}.lora_B"] = module.lora_B["default"].weight
            out = {k: v.detach().clone() for k, v in out.items()} | {}
            with tempfile.TemporaryDirectory() as folder:
                folder = Path(folder)
                model.peft_config["default"].init_lora_weights = True
                model.save_pretrained(folder / "initial")
                model.peft_config["default"].init_lora_weights = init
                with torch.no_grad():
                    for path, p in sorted(model.named_parameters()):
                        if "lora_" in path:
                            p.add_(0.2 * torch.randn(p.shape, generator=g))
                out[f"{case}.forward"] = model(x)
                for layer in ("up", "down"):
                    module = getattr(model.base_model.model, layer)
                    out[f"{case}.{layer}.trained_A"] = module.lora_A["default"].weight
                    out[f"{case}.{layer}.trained_B"] = module.lora_B["default"].weight
                model.save_pretrained(
                    folder / "plain", path_initial_model_for_weight_conversion=str(folder / "initial")
                )
                converted = PeftModel.from_pretrained(copy.deepcopy(base), folder / "plain").eval()
                assert torch.allclose(converted(x), out[f"{case}.forward"], atol=1e-5), case
                plain = load_file(folder / "plain" / "adapter_model.safetensors")
                for key, value in plain.items():
                    key = key.removeprefix("base_model.model.").removesuffix(".weight")
                    out[f"{case}.plain.{key}"] = value
                alpha = json.loads((folder / "plain" / "adapter_config.json").read_text())["lora_alpha"]
                assert math.isclose(alpha, 6.0 * (math.sqrt(2) if rslora else 2)), alpha
    return out


def split_dora(base, x, g, out):
    settings = dict(r=3, lora_alpha=6.0, use_dora=True, init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(base), config(settings)).eval()
    for layer in ("up", "down"):
        module = getattr(model.base_model.model, layer)
        out[f"pissa_dora.{layer}.lora_A"] = module.lora_A["default"].weight.detach().clone()
        out[f"pissa_dora.{layer}.lora_B"] = module.lora_B["default"].weight.detach().clone()
        with torch.no_grad():
            for p in (module.lora_A["default"].weight, module.lora_B["default"].weight):
                p.add_(0.2 * torch.randn(p.shape, generator=g))
            magnitude = module.lora_magnitude_vector["default"].weight
            out[f"pissa_dora.{layer}.magnitude"] = magnitude.detach().clone()
            magnitude.mul_(1 + 0.3 * torch.randn(magnitude.shape, generator=g))
    out["pissa_dora.forward"] = model(x)
    model(x).square().sum().backward()
    for layer in ("up", "down"):
        module = getattr(model.base_model.model, layer)
        for part, p in (
            ("A", module.lora_A["default"].weight),
            ("B", module.lora_B["default"].weight),
            ("magnitude", module.lora_magnitude_vector["default"].weight),
        ):
            out[f"pissa_dora.{layer}.trained_{part}"] = p
            out[f"pissa_dora.{layer}.gradient_{part}"] = p.grad


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    g = torch.Generator().manual_seed(81)
    base = base_model(g)
    x = torch.randn(5, WIDTH, generator=g)
    states = {}
    for name, settings in ADAPTERS.items():
        model = get_peft_model(copy.deepcopy(base), config(settings), adapter_name=name)
        randomise(model, name, g)
        states[name] = adapter_state(model, name)
        save_file(states[name], OUT / f"{name}.safetensors", metadata=metadata(settings))
    out = {"x": x, **{f"base.{k}": v for k, v in base.state_dict().items()}}
    combinations(base, states, out)
    merges(base, states, x, out)
    out = splits(base, x, g, out)
    split_dora(base, x, g, out)
    out = {k: v.detach().clone().contiguous() for k, v in out.items()}
    save_file(out, OUT / "expected.safetensors")
    print(sum(p.stat().st_size for p in OUT.iterdir()), "bytes")
    for case in ("r3+r2_up", "dora", "dora+r3", "r3+dora", "with_bias+r3"):
        print(case, (out[f"forward.{case}"] - out[f"forward_merged.{case}"]).abs().max().item())


main()
