//! A pipeline with random weights, from configurations alone: for trying the program out, and for tests.
//!
//! Matrices and convolutions are normal with standard deviation `0.7 / sqrt(inputs)`, so that activations keep their size;
//! norms and variances are one, biases zero. The weights are a function of (seed, tensor name), the same on every platform.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor, TensorData};
use flux_model::WeightsError;
use flux_model::families::{self, Visitor};
use flux_model::family::{ComponentFile, Family};
use flux_model::pipeline::PipelineFolder;
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::serialize;
use lora_core::random::{Stream, name_hash};

/// Copies `folder` to `out` and adds weights to every component.
///
/// # Errors
/// A folder that lacks a configuration, one that describes no network, a file that cannot be written.
pub fn fill(folder: &Path, out: &Path, seed: u64) -> anyhow::Result<()> {
    let files = files_of(folder)?;
    copy_folder(folder, out)?;
    for (file, tensors) in files {
        write(out, file, tensors, seed)?;
    }
    Ok(())
}

/// The files of weights that the configurations in `folder` describe.
///
/// # Errors
/// A folder that lacks a configuration, or one that describes no network.
pub(super) fn files_of(folder: &Path) -> anyhow::Result<Vec<ComponentFile>> {
    struct Weights<'a>(&'a PipelineFolder, &'a Device);
    impl Visitor for Weights<'_> {
        type Output = Result<Vec<ComponentFile>, WeightsError>;
        fn visit<F: Family>(self) -> Self::Output {
            F::weights(self.0, self.1)
        }
    }
    let pipeline = PipelineFolder::open(folder)?;
    let device = crate::device::open(crate::device::default_name())?.device; // nothing is allocated on it
    Ok(families::of_folder(
        &pipeline,
        Weights(&pipeline, &device),
    )??)
}

fn write(
    out: &Path,
    file: &str,
    shapes: BTreeMap<String, Vec<usize>>,
    seed: u64,
) -> anyhow::Result<()> {
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let tensor = random_tensor(&name, shape, seed);
        (name, tensor)
    });
    let path = out.join(file);
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    fs::write(&path, serialize(&tensors.collect(), &metadata))
        .with_context(|| format!("write {}", path.display()))
}

/// What a tensor of the random model consists of.
pub(super) enum Fill {
    /// Normals of this standard deviation.
    Normal(f32),
    /// One number throughout.
    Constant(f32),
}

/// By a tensor's name and shape.
pub(super) fn fill_of(name: &str, shape: &[usize]) -> Fill {
    let is_one = ["weight", "scale", "running_var"];
    match shape {
        [_, inputs @ ..] if !inputs.is_empty() => {
            let fan_in = inputs.iter().product::<usize>();
            let is_embedding = name.contains("embedding") || name.starts_with("shared");
            Fill::Normal(match is_embedding {
                true => 1.0,
                false => 0.7 / (fan_in as f32).sqrt(),
            })
        }
        _ if is_one.iter().any(|end| name.ends_with(end)) => Fill::Constant(1.0),
        _ => Fill::Constant(0.0),
    }
}

/// One tensor of the random model.
pub fn random_tensor(name: &str, shape: Vec<usize>, seed: u64) -> HostTensor {
    let count = shape.iter().product::<usize>();
    let values = match fill_of(name, &shape) {
        Fill::Normal(std) => {
            let normals = Stream::new(seed, "random_weights", 0, name_hash(name)).normals(count);
            normals.into_iter().map(|v| v * std).collect()
        }
        Fill::Constant(value) => vec![value; count],
    };
    HostTensor::from_f32(shape, &values)
}

pub(super) fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
        let (source, target) = {
            let entry = entry?;
            (entry.path(), to.join(entry.file_name()))
        };
        if source.is_dir() {
            copy_folder(&source, &target)?;
        } else {
            fs::copy(&source, &target).with_context(|| format!("copy {}", source.display()))?;
        }
    }
    Ok(())
}

/// The same weights, put into a module in memory.
pub fn fill_module<M: Module>(module: M, seed: u64, device: &Device) -> M {
    struct Fill<'a> {
        path: Vec<String>,
        seed: u64,
        device: &'a Device,
    }
    impl ModuleMapper for Fill<'_> {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let mut shape = param.lazy_shape().to_vec();
            shape.reverse(); // a linear weight is [in, out] here and [out, in] in files
            let tensor = random_tensor(&self.path.join("."), shape.clone(), self.seed);
            let tensor = if D == 2 { tensor.transposed() } else { tensor };
            let data = TensorData::new(tensor.to_f32(), param.lazy_shape());
            Param::initialized(param.id, Tensor::from_data(data, self.device))
        }
    }
    module.map(&mut Fill {
        path: Vec::new(),
        seed,
        device,
    })
}
