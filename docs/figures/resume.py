"""Draws docs/figures/resume.svg: how far the losses of resumed runs are from those of the run that was never stopped.

    cargo xtask run random-weights examples/tiny-flux --out runs/tiny-flux
    cargo xtask faults --quick canaries                # builds the program, and the same with known faults
    pip install matplotlib
    python docs/figures/resume.py
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "target/release/flux-lora"
WITH_FAULTS = ROOT / "target/release/flux-lora-canary"
KILLS = [17, 41, 66, 92, 113]
FAULTS = {
    "moment": "one moment tensor dropped",
    "random": "random numbers one draw ahead",
    "cursor": "data one sample ahead",
}


def command(folder, run, *args, program=PROGRAM):
    return [program, "train", folder / "run.toml", "--output", run, *args]


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def kill_after(step, arguments, run):
    """SIGKILL once this step is logged."""
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    log = run / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def straight_run(folder):
    text = (ROOT / "examples/photos.toml").read_text()
    text = text.split("[sample]")[0]  # previews change nothing here and take time
    text = text.replace('"../runs/tiny-flux"', json.dumps(str(ROOT / "runs/tiny-flux")))
    text = text.replace('"photos"', json.dumps(str(ROOT / "examples/photos")))
    (folder / "run.toml").write_text(text)
    subprocess.run(command(folder, folder / "straight"), check=True)


def killed_run(folder):
    killed, resume = folder / "killed", []
    for step in KILLS:
        kill_after(step, command(folder, killed, *resume), killed)
        resume = ["--resume"]
    subprocess.run(command(folder, killed, "--resume"), check=True)
    for name in ("lora.safetensors", "metrics.jsonl"):
        same = (killed / name).read_bytes() == (folder / "straight" / name).read_bytes()
        assert same, f"{name} differs"


def faulty_runs(folder):
    """One run, killed once; then resumed by the program with each of its known faults, and with none."""
    half = folder / "half"
    kill_after(66, command(folder, half), half)
    for fault in ["none", *FAULTS]:
        shutil.copytree(half, folder / fault)
        # Another binary than the one that began is refused otherwise.
        arguments = command(folder, folder / fault, "--resume", "--allow-inexact", program=WITH_FAULTS)
        subprocess.run(arguments, check=True, env={**os.environ, "FLUX_LORA_CANARY": fault})
    assert losses(folder / "none") == losses(folder / "straight"), "no fault, but other losses"


def draw(folder):
    straight = losses(folder / "straight")
    curves = {f"killed after steps {', '.join(map(str, KILLS))}": losses(folder / "killed")}
    curves |= {f"resumed at 60, {label}": losses(folder / fault) for fault, label in FAULTS.items()}
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "flux-lora"})
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.8), sharex=True, height_ratios=[1, 1.3])
    steps = range(1, len(straight) + 1)
    above.plot(steps, straight, color="black", linewidth=0.8)
    above.set_ylabel("loss")
    above.set_title("the photos, never stopped", fontsize=9)
    colors = ["black", "tab:blue", "tab:orange", "tab:red"]
    for (label, curve), color in zip(curves.items(), colors, strict=True):
        difference = [abs(a - b) for a, b in zip(curve, straight, strict=True)]
        print(label, max(difference))
        label = f"{label}: at most {max(difference):.2g}"
        below.plot(steps, difference, color=color, linewidth=1.0, label=label)
    for step in KILLS:
        below.axvline(step, color="black", linewidth=0.4, linestyle=":")
    below.set_yscale("symlog", linthresh=1e-7)
    below.set_ylim(-3e-8, 3)
    below.set_ylabel("|difference of the loss|")
    below.set_xlabel("step (dotted: kill -9)")
    below.legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/figures/resume.svg", metadata={"Date": None})


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for work in (straight_run, killed_run, faulty_runs, draw):
            work(folder)


if __name__ == "__main__":
    main()
