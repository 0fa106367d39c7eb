//! Parameters that are trained in full, `modules_to_save` and `bias`: their values as a file and as a model holds them.
//!
//! A file holds them as PyTorch does, a linear weight as `[out, in]`; a model holds them flat, in its own order.

use burn::tensor::Device;

use crate::files::host::HostTensor;
use crate::site::{Site, WeightLayout};

/// The first values of a parameter that is trained in full, in the order of the model.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) site: Site,
    pub(crate) values: Vec<f32>,
    pub(crate) device: Device,
}

/// The shape that a file gives the parameter.
pub(crate) fn file_shape(site: &Site) -> Vec<usize> {
    let mut shape = site.shape.clone();
    if site.layout == WeightLayout::InOut {
        shape.reverse();
    }
    shape
}

/// The values of a file in the order of the model.
pub(crate) fn from_file(site: &Site, tensor: &HostTensor) -> Vec<f32> {
    match (site.layout, tensor.shape.len()) {
        (WeightLayout::InOut, 2) => tensor.transposed().to_f32(),
        _ => tensor.to_f32(),
    }
}

/// The values of a model, flat, as a file has them.
pub(crate) fn to_file(site: &Site, values: &HostTensor) -> HostTensor {
    let values = HostTensor {
        shape: site.shape.clone(),
        ..values.clone()
    };
    match (site.layout, site.shape.len()) {
        (WeightLayout::InOut, 2) => values.transposed(),
        _ => values,
    }
}
