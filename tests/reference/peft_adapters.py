"""What PEFT computes with each kind of adapter, for crates/lora-core/tests/peft.rs.

One small model (embedding, convolutions, linear layers in numbered blocks, a norm, a head). For each case: an adapter with
factors that are all random, saved by PEFT itself, and beside it inputs, output, merged output and the gradient of
`sum(output^2)` for every trained tensor, under the names of the adapter file.

    python tests/reference/peft_adapters.py              write crates/lora-core/tests/fixtures/peft
    python tests/reference/peft_adapters.py --load DIR   check that PEFT loads what the Rust test wrote to DIR (see peft.rs)

Versions: torch 2.11, peft 0.19.1.
"""

import argparse
import copy
import json
import pathlib
import shutil
import tempfile

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

FIXTURES = pathlib.Path(__file__).parents[2] / "crates/lora-core/tests/fixtures/peft"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 12)
        self.out = nn.Linear(12, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.fc(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Net(nn.Module):
    """Tokens [2, 3] and an image [2, 4, 6, 6] to [2, 4]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.body = Body()
        self.head = nn.Linear(8, 4)

    def forward(self, tokens, image):
        text = self.embed(tokens).mean(dim=1)
        picture = self.point(torch.tanh(self.conv(image))).mean(dim=(2, 3))
        return self.head(self.body(text + picture))


ALL = ["embed", "conv", "point", "fc", "out"]
NO_EMBED = ["conv", "point", "fc", "out"]
LORA = dict(r=2, lora_alpha=3, init_lora_weights=False)
CASES = {
    "lora": LoraConfig(**LORA, target_modules=ALL),
    "rslora": LoraConfig(**LORA, target_modules=["fc", "conv"], use_rslora=True, rank_pattern={"fc": 4}),
    "dora": LoraConfig(**LORA, target_modules=ALL, use_dora=True),
    "layers": LoraConfig(**LORA, target_modules=["fc", "out"], layers_to_transform=[1], layers_pattern="blocks"),
    "saved": LoraConfig(**LORA, target_modules=["fc"], modules_to_save=["head", "norm", "point"]),
    "bias_all": LoraConfig(**LORA, target_modules=["fc", "conv"], bias="all"),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=NO_EMBED, init_weights=False, modules_to_save=["norm"]),
    "lokr": LoKrConfig(r=2, alpha=3, target_modules=NO_EMBED, init_weights=False),
    "lokr_both": LoKrConfig(r=1, alpha=3, target_modules=NO_EMBED, init_weights=False, decompose_both=True),
    "lokr_full": LoKrConfig(r=16, alpha=4, target_modules=NO_EMBED, init_weights=False, decompose_factor=4),
}


def randomise(model, scale):
    for parameter in model.parameters():
        parameter.data = scale * torch.randn_like(parameter)


def inputs():
    torch.manual_seed(3)
    return torch.randint(0, 7, (2, 3)), torch.randn(2, 4, 6, 6)


def base():
    torch.manual_seed(1)
    net = Net()
    randomise(net, 0.4)
    return net.eval()


def file_name(name):
    """Name in the adapter file of a trained parameter of the PEFT model."""
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def write():
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    tokens, image = inputs()
    net = base()
    common = {f"model.{k}": v for k, v in net.state_dict().items()}
    common |= {"tokens": tokens.float(), "image": image, "output": net(tokens, image).detach()}
    save_file(common, FIXTURES / "model.safetensors")
    for number, (case, config) in enumerate(CASES.items()):
        torch.manual_seed(100 + number)
        model = get_peft_model(copy.deepcopy(net), copy.deepcopy(config)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.5 * torch.randn_like(parameter)
        output = model(tokens, image)
        output.square().sum().backward()
        expected = {"output": output.detach().clone()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                expected[f"grad.{file_name(name)}"] = parameter.grad
        model.save_pretrained(FIXTURES / case)
        (FIXTURES / case / "README.md").unlink(missing_ok=True)
        merged = model.merge_and_unload()
        expected["merged"] = merged(tokens, image).detach()
        for name in ["embed", "conv", "body.blocks.1.fc", "head"]:
            expected[f"weight.{name}"] = merged.get_submodule(name).weight.detach().contiguous()
        save_file(expected, FIXTURES / case / "expected.safetensors")
        saved = set(load_file(FIXTURES / case / "adapter_model.safetensors"))
        trained = {name.removeprefix("grad.") for name in expected if name.startswith("grad.")}
        print(f"{case}: saved but not trained {sorted(saved - trained)}, trained but not saved {sorted(trained - saved)}")
    # A grouped convolution: PEFT's factors are of no change of its weight, which we must refuse.
    grouped = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    config = LoraConfig(**LORA, target_modules=["conv"])
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(grouped, config).save_pretrained(folder)
        shutil.copy(pathlib.Path(folder) / "adapter_model.safetensors", FIXTURES / "grouped.safetensors")


def load(folder):
    """Each case that the Rust test wrote: PEFT must take every tensor and compute the output it recorded."""
    tokens, image = inputs()
    for case in CASES:
        path = pathlib.Path(folder) / case
        model = PeftModel.from_pretrained(base(), path).eval()
        own = load_file(path / "adapter_model.safetensors")
        taken = {file_name(name): p for name, p in model.named_parameters()}
        for name, tensor in own.items():
            if not torch.equal(taken[name], tensor):
                raise SystemExit(f"{case}: PEFT did not take {name}")
        expected = json.loads((path / "output.json").read_text())
        error = (model(tokens, image) - torch.tensor(expected).reshape(2, 4)).abs().max().item()
        print(f"{case}: {len(own)} tensors taken, output differs by {error:.1e}")
        if error > 1e-5:
            raise SystemExit(f"{case}: wrong output")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--load", metavar="DIR")
    arguments = parser.parse_args()
    load(arguments.load) if arguments.load else write()
