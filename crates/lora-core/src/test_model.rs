//! A small model for the tests of this crate: two linear layers, computed by the fast or the dense path.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};

use crate::random::{Stream, name_hash};

#[derive(Module, Debug)]
pub(crate) struct Mlp {
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

impl Mlp {
    /// Weights by path, the same in every test.
    pub(crate) fn new(width: usize, device: &Device) -> Self {
        struct Fill(Vec<String>, Device);
        impl ModuleMapper for Fill {
            fn enter_module(&mut self, name: &str, _: &str) {
                self.0.push(name.into());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.0.pop();
            }
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let shape = param.lazy_shape();
                let values = Stream::new(9, "model", 0, name_hash(&self.0.join(".")))
                    .normals(shape.num_elements());
                let values = values.into_iter().map(|v| 0.3 * v).collect();
                Param::initialized(
                    param.id,
                    Tensor::from_data(TensorData::new::<f32, _>(values, shape), &self.1),
                )
            }
        }
        let layer = |inputs, outputs| LinearConfig::new(inputs, outputs).init(device);
        let model = Self {
            up: layer(width, 2 * width),
            down: layer(2 * width, width),
        };
        model.map(&mut Fill(Vec::new(), device.clone()))
    }

    pub(crate) fn fast(&self, x: Tensor<2>) -> Tensor<2> {
        crate::linear(&self.down, crate::linear(&self.up, x).tanh())
    }

    pub(crate) fn dense(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(self.up.forward(x).tanh())
    }
}

pub(crate) fn input(rows: usize, width: usize, device: &Device) -> Tensor<2> {
    let values = Stream::new(3, "input", 0, 0).normals(rows * width);
    Tensor::from_data(TensorData::new(values, [rows, width]), device)
}

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

/// `‖a - b‖ / ‖b‖`.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().copied().map(square).sum::<f64>()).sqrt()
}
