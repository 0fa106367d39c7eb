//! What a configuration is, and what each mistake in one is answered with.

use std::path::Path;

use super::{ConfigError, RunConfig};

mod changes;
mod files;
mod mistakes;
mod schema;
mod sections;
mod set;
mod written;

/// The two keys every configuration needs, given as overrides so that the text may open any section.
const REQUIRED: [&str; 2] = ["model.path=flux", "dataset.path=cats"];

fn read_with(text: &str, overrides: &[&str]) -> Result<RunConfig, ConfigError> {
    let overrides = REQUIRED.iter().chain(overrides).map(ToString::to_string);
    let overrides: Vec<String> = overrides.collect();
    RunConfig::from_toml(text, Path::new("run.toml"), &overrides)
}

fn read(text: &str) -> Result<RunConfig, ConfigError> {
    read_with(text, &[])
}

#[track_caller]
fn assert_refused(text: &str, message: &str) {
    let error = read(text).expect_err("the configuration is bad");
    assert_eq!(error.to_string(), message);
}

#[track_caller]
fn assert_set_refused(set: &str, message: &str) {
    let error = read_with("", &[set]).expect_err("the override is bad");
    assert_eq!(error.to_string(), message);
}

const EVERYTHING: &str = r#"
[model]
path = "flux"
transformer = "flux1-dev.safetensors"
vae = "ae.safetensors"

[dataset]
path = "cats"
resolution = 768
bucket_step = 32
random_flip = true
caption_extension = "caption"
caption_dropout = 0.1
max_sequence_length = 256

[lora]
r = 4
lora_alpha = 8
target_modules = "all-linear"
exclude_modules = ["proj_out"]
rank_pattern = { "attn.to_k" = 8, "single.*" = 2 }
alpha_pattern = { "attn.to_k" = 1.5 }
use_rslora = true
use_dora = true
lora_dropout = 0.05
init_lora_weights = true
init_from = "first.safetensors"

[optimizer]
name = "adamw"
learning_rate = 2e-5
betas = [0.8, 0.99]
eps = 1e-6
weight_decay = 0
max_grad_norm = "none"

[lr_scheduler]
name = "constant_with_warmup"
warmup_steps = 10
num_cycles = 1.5

[train]
steps = 7
batch_size = 2
gradient_accumulation_steps = 3
seed = 9223372036854775807
guidance = 3.5
timestep_sampling = "logit_normal"
logit_mean = -0.5
logit_std = 0.5
mode_scale = 0.8
sigmoid_scale = 2.0
shift = "flux"
loss_weighting = "sigma_sqrt"
divergence_factor = "none"

[memory]
limit = "8GiB"
base = "resident"
recompute = 3

[checkpoint]
every = 5
keep = 3

[logging]
tensorboard = false
csv = false

[sample]
prompts = ["a cat", "two\ncats, \"ü\""]
every = 4
at_start = false
num_inference_steps = 8
guidance_scale = 0
height = 768
width = 512
seed = 1
"#;

fn everything() -> RunConfig {
    RunConfig::from_toml(EVERYTHING, Path::new("run.toml"), &[]).expect("a good configuration")
}
