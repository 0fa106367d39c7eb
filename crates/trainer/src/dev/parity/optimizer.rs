//! Cases of optimizers: given gradients, through the optimizer that a run of that name has.

use anyhow::{Context, bail};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::training::optimizers::OptimizerConfig;
use lora_core::{Gradients, PathOptimizer};
use serde_json::Value;

use super::case::{Case, Tensors};
use super::report::Report;

/// The parameters of a case, by their number of dimensions.
#[derive(Module, Debug, Default)]
struct Parameters {
    vectors: Vec<Param<Tensor<1>>>,
    matrices: Vec<Param<Tensor<2>>>,
    kernels: Vec<Param<Tensor<4>>>,
}

/// One parameter of a case, and the sum that has its gradient.
trait Parameter {
    fn value(&self) -> HostTensor;
    fn times(&self, gradient: HostTensor, device: &Device) -> Tensor<1>;
}

impl<const D: usize> Parameter for Param<Tensor<D>> {
    fn value(&self) -> HostTensor {
        lora_core::state::host_tensor(self.val().inner())
    }

    fn times(&self, gradient: HostTensor, device: &Device) -> Tensor<1> {
        (self.val() * tensor(gradient, device)).sum()
    }
}

fn tensor<const D: usize>(host: HostTensor, device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(host.to_f32(), host.shape), device)
}

impl Parameters {
    fn add(&mut self, value: HostTensor, device: &Device) -> anyhow::Result<()> {
        match value.shape.len() {
            1 => self.vectors.push(Param::from_tensor(tensor(value, device))),
            2 => self
                .matrices
                .push(Param::from_tensor(tensor(value, device))),
            4 => self.kernels.push(Param::from_tensor(tensor(value, device))),
            rank => bail!("a parameter has {rank} dimensions; 1, 2 and 4 are known"),
        }
        Ok(())
    }

    /// By number of dimensions, then as they were added.
    fn all(&self) -> Vec<&dyn Parameter> {
        let vectors = self.vectors.iter().map(|p| p as &dyn Parameter);
        let matrices = self.matrices.iter().map(|p| p as &dyn Parameter);
        let kernels = self.kernels.iter().map(|p| p as &dyn Parameter);
        vectors.chain(matrices).chain(kernels).collect()
    }
}

/// `optimizer`.
pub(super) fn compute(case: &Case, device: &Device) -> anyhow::Result<Report> {
    let mut settings = case.value("/optimizer")?.clone();
    let rate = settings
        .as_object_mut()
        .and_then(|settings| settings.remove("learning_rate"));
    let rate = rate.as_ref().and_then(Value::as_f64);
    let rate = rate.context("`/optimizer/learning_rate` of case.json is not a number")?;
    let config: OptimizerConfig =
        serde_json::from_value(settings).context("`/optimizer` of case.json")?;
    let steps = case.usize("/steps")?;

    let inputs = case.all_inputs()?;
    let starts = inputs.iter().filter_map(|(name, start)| {
        let name = name.strip_prefix("param.")?;
        Some((name, start))
    });
    let mut starts: Vec<(&str, &HostTensor)> = starts.collect();
    starts.sort_by_key(|(_, start)| start.shape.len());
    let autodiff = device.clone().autodiff();
    let mut model = Parameters::default();
    for (_, start) in &starts {
        model.add((*start).clone(), &autodiff)?;
    }

    let mut optimizer = PathOptimizer::new(&config);
    let mut out = Tensors::new();
    for step in 1..=steps {
        let mut sum = Tensor::<1>::zeros([1], &autodiff);
        for ((name, start), parameter) in starts.iter().zip(model.all()) {
            let all = case.input(&format!("grad.{name}"))?;
            if all.shape.first() != Some(&steps) || all.shape[1..] != start.shape {
                bail!("`grad.{name}` is not [steps, ...] of `param.{name}`");
            }
            let own = all.rows(step - 1..step).to_f32();
            let own = HostTensor::from_f32(start.shape.clone(), &own);
            sum = sum + parameter.times(own, &autodiff);
        }
        let mut gradients = Gradients::default();
        gradients.take("", &model, &mut sum.backward());
        optimizer.step(rate, &mut model, gradients)?;
        out.extend(changes(&format!("step{step}"), &starts, &model));
    }
    if let Some(average) = optimizer.averaged(&model) {
        out.extend(changes("eval", &starts, &average));
    }
    Report::by_tensor(case, out)
}

/// What has become of the parameters, minus what they were.
fn changes<'a>(
    prefix: &str,
    starts: &'a [(&str, &HostTensor)],
    model: &'a Parameters,
) -> Vec<(String, HostTensor)> {
    let pairs = starts.iter().zip(model.all());
    pairs
        .map(|((name, start), parameter)| {
            let (now, before) = (parameter.value().to_f64(), start.to_f64());
            let change = now.iter().zip(&before).map(|(now, before)| now - before);
            let change: Vec<f32> = change.map(|change| change as f32).collect();
            let change = HostTensor::from_f32(start.shape.clone(), &change);
            (format!("{prefix}.{name}"), change)
        })
        .collect()
}
