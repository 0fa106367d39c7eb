//! Whole files: built here, read, compared with changes computed without the code under test.

mod dora;
mod edges;
mod flux2;
mod formats;
mod lycoris;
mod malformed;
mod proof;
mod readers;
mod round_trip;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::serialize;

use super::*;
use crate::flux1::config::FluxConfig;
use crate::text::clip::ClipConfig;
use crate::text::t5::T5Config;

/// Width of the networks of these tests.
const HIDDEN: usize = 8;

/// A network with every kind of module and no two equal widths.
fn flux() -> FluxConfig {
    FluxConfig {
        in_channels: 6,
        out_channels: Some(4),
        num_layers: 2,
        num_single_layers: 3,
        attention_head_dim: 4,
        num_attention_heads: 2,
        joint_attention_dim: 10,
        pooled_projection_dim: 5,
        ..FluxConfig::dev()
    }
}

fn shape() -> ModelShape {
    let clip = ClipConfig {
        hidden_size: 6,
        intermediate_size: 12,
        num_hidden_layers: 2,
        ..ClipConfig::clip_l()
    };
    let t5 = T5Config {
        d_model: 6,
        d_kv: 2,
        num_heads: 2,
        d_ff: 10,
        num_layers: 2,
        ..T5Config::xxl()
    };
    ModelShape {
        transformer: Some(flux()),
        clip: Some(clip),
        t5: Some(t5),
        ..ModelShape::default()
    }
}

/// A module of BFL's: its name, its inputs, and the diffusers modules it consists of, with their heights.
type Bfl = (String, usize, Vec<(String, usize)>);

/// BFL's modules of a network as `flux()`. Written down from the two implementations, not from the table under test.
fn modules() -> Vec<Bfl> {
    let (h, m) = (HIDDEN, 4 * HIDDEN);
    let mut all = Vec::new();
    let mut add = |bfl: String, input: usize, parts: &[(String, usize)]| {
        all.push((bfl, input, parts.to_vec()))
    };
    for i in 0..2 {
        let bfl = |name: &str| format!("double_blocks.{i}.{name}");
        let own = |name: &str| format!("transformer_blocks.{i}.{name}");
        let qkv = ["attn.to_q", "attn.to_k", "attn.to_v"].map(|name| (own(name), h));
        add(bfl("img_attn.qkv"), h, &qkv);
        let qkv =
            ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"].map(|name| (own(name), h));
        add(bfl("txt_attn.qkv"), h, &qkv);
        add(bfl("img_attn.proj"), h, &[(own("attn.to_out.0"), h)]);
        add(bfl("txt_attn.proj"), h, &[(own("attn.to_add_out"), h)]);
        add(bfl("img_mlp.0"), h, &[(own("ff.net.0.proj"), m)]);
        add(bfl("img_mlp.2"), m, &[(own("ff.net.2"), h)]);
        add(bfl("txt_mlp.0"), h, &[(own("ff_context.net.0.proj"), m)]);
        add(bfl("txt_mlp.2"), m, &[(own("ff_context.net.2"), h)]);
        add(bfl("img_mod.lin"), h, &[(own("norm1.linear"), 6 * h)]);
        add(
            bfl("txt_mod.lin"),
            h,
            &[(own("norm1_context.linear"), 6 * h)],
        );
    }
    for i in 0..3 {
        let bfl = |name: &str| format!("single_blocks.{i}.{name}");
        let own = |name: &str| format!("single_transformer_blocks.{i}.{name}");
        let [q, k, v] = ["attn.to_q", "attn.to_k", "attn.to_v"].map(|name| (own(name), h));
        add(bfl("linear1"), h, &[q, k, v, (own("proj_mlp"), m)]);
        add(bfl("linear2"), h + m, &[(own("proj_out"), h)]);
        add(bfl("modulation.lin"), h, &[(own("norm.linear"), 3 * h)]);
    }
    for (bfl, input, own, out) in [
        ("img_in", 6, "x_embedder", h),
        ("txt_in", 10, "context_embedder", h),
        (
            "time_in.in_layer",
            256,
            "time_text_embed.timestep_embedder.linear_1",
            h,
        ),
        (
            "time_in.out_layer",
            h,
            "time_text_embed.timestep_embedder.linear_2",
            h,
        ),
        (
            "vector_in.in_layer",
            5,
            "time_text_embed.text_embedder.linear_1",
            h,
        ),
        (
            "vector_in.out_layer",
            h,
            "time_text_embed.text_embedder.linear_2",
            h,
        ),
        (
            "guidance_in.in_layer",
            256,
            "time_text_embed.guidance_embedder.linear_1",
            h,
        ),
        (
            "guidance_in.out_layer",
            h,
            "time_text_embed.guidance_embedder.linear_2",
            h,
        ),
        (
            "final_layer.adaLN_modulation.1",
            h,
            "norm_out.linear",
            2 * h,
        ),
        ("final_layer.linear", h, "proj_out", 4),
    ] {
        add(bfl.into(), input, &[(own.into(), out)]);
    }
    all
}

/// Numbers in -0.5..0.5 that depend on `seed` alone.
fn noise(seed: &str, count: usize) -> Vec<f32> {
    let mut state = seed.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32) / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn tensor(rows: usize, columns: usize, values: &[f32]) -> HostTensor {
    HostTensor::from_f32([rows, columns], values)
}

fn random(seed: &str, rows: usize, columns: usize) -> HostTensor {
    tensor(rows, columns, &noise(seed, rows * columns))
}

/// `scale * up * down`, the plain way.
fn product(up: &HostTensor, down: &HostTensor, scale: f64) -> Vec<f32> {
    let (out, rank, input) = (up.shape[0], up.shape[1], down.shape[1]);
    let (up, down) = (up.to_f32(), down.to_f32());
    let entry = |i: usize, j: usize| -> f64 {
        (0..rank)
            .map(|r| f64::from(up[i * rank + r]) * f64::from(down[r * input + j]))
            .sum()
    };
    (0..out * input)
        .map(|at| (scale * entry(at / input, at % input)) as f32)
        .collect()
}

fn rows(values: &[f32], columns: usize, rows: Range<usize>) -> Vec<f32> {
    values[rows.start * columns..rows.end * columns].to_vec()
}

/// The two halves of the rows exchanged.
fn swapped(values: &[f32]) -> Vec<f32> {
    let (first, second) = values.split_at(values.len() / 2);
    [second, first].concat()
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let size = norm(&mut expected.iter().map(|x| f64::from(*x)));
    let error = norm(
        &mut actual
            .iter()
            .zip(expected)
            .map(|(x, y)| f64::from(*x) - f64::from(*y)),
    );
    assert!(
        error <= 2e-6 * size,
        "{what}: relative error {}",
        error / size
    );
}

/// A file in the making.
#[derive(Default, Clone)]
struct Builder {
    tensors: BTreeMap<String, HostTensor>,
    metadata: BTreeMap<String, String>,
}

impl Builder {
    fn put(&mut self, key: &str, tensor: HostTensor) -> &mut Self {
        let earlier = self.tensors.insert(key.into(), tensor);
        assert!(earlier.is_none(), "{key} twice");
        self
    }

    fn scalar(&mut self, key: &str, value: f32) -> &mut Self {
        self.put(key, HostTensor::from_f32([], &[value]))
    }

    fn header(&mut self, key: &str, value: &str) -> &mut Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    fn save(&self, path: &Path) -> PathBuf {
        std::fs::write(path, serialize(&self.tensors, &self.metadata)).expect("a writable folder");
        path.into()
    }

    /// Writes the file to a fresh folder and reads it.
    fn read_as(&self, shape: &ModelShape) -> Result<LoraSet, LoraFormatError> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        // The file stays open, so the set outlives the folder.
        read(&self.save(&folder.path().join("lora.safetensors")), shape)
    }

    #[track_caller]
    fn read(&self) -> LoraSet {
        self.read_as(&shape()).expect("a valid file")
    }

    /// The message of the error, without the folder.
    #[track_caller]
    fn error(&self) -> String {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = self.save(&folder.path().join("lora.safetensors"));
        let error = read(&path, &shape())
            .expect_err("a malformed file")
            .to_string();
        error.replace(&format!("{}/", folder.path().display()), "")
    }
}

/// Change of the weight of a transformer module.
#[track_caller]
fn change(set: &LoraSet, path: &str) -> Vec<f32> {
    let update = set
        .transformer
        .get(path)
        .unwrap_or_else(|| panic!("{path} is missing"));
    delta(update, None).expect("a readable update")
}

/// Both sets change the same modules of all components in the same way.
#[track_caller]
fn assert_same(actual: &LoraSet, expected: &LoraSet) {
    for component in Component::ALL {
        let paths = |set: &LoraSet| set.modules(component).keys().cloned().collect::<Vec<_>>();
        assert_eq!(paths(actual), paths(expected));
        for (path, update) in actual.modules(component) {
            let other = &expected.modules(component)[path];
            let mut base = |path: &str| {
                let (_, shape) = shape()
                    .modules(component)
                    .into_iter()
                    .find(|(own, _)| own == path)?;
                match shape {
                    ModuleShape::Linear { out, input } => Some(noise(path, out * input)),
                    ModuleShape::Norm { len } => Some(noise(path, len)),
                }
            };
            let weights = [actual, expected].map(|set| {
                set.weight_delta(component, path, &mut base)
                    .expect("readable")
            });
            match &weights {
                [Some(actual), Some(expected)] => assert_close(actual, expected, path),
                [None, None] => {}
                _ => panic!("{path}: only one set changes the weight"),
            }
            let bias = |update: &ModuleUpdate| {
                update
                    .bias_values()
                    .expect("readable")
                    .map(|bias| bias.to_f32())
            };
            match (bias(update), bias(other)) {
                (Some(actual), Some(expected)) => assert_close(&actual, &expected, path),
                (None, None) => {}
                _ => panic!("{path}: only one set changes the bias"),
            }
        }
    }
}

/// Writes the set in a format, reads it back.
#[track_caller]
fn through(set: &LoraSet, format: LoraFormat, options: &WriteOptions) -> LoraSet {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("out.safetensors");
    write(set, format, &path, options).expect("a set the format can hold");
    let back = read(&path, &shape()).expect("what was written");
    assert_eq!(back.report.ignored, [], "{format}");
    back
}

fn f32_options() -> WriteOptions {
    WriteOptions {
        dtype: Some(Dtype::F32),
        ..WriteOptions::default()
    }
}
