//! What an adapter sits on: a parameter of a model, under the name and in the shapes that PEFT's files use.

use crate::kinds::parts::{Convolution, Part};

/// How a weight lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WeightLayout {
    /// `[in, out]`: Burn's `Linear`.
    InOut,
    /// `[out, in, kernel...]`: Burn's convolutions. Of a grouped convolution, `in` are the inputs of one group.
    OutIn,
    /// `[entries, out]`: Burn's `Embedding`.
    Table,
}

/// A parameter that an adapter can sit on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Site {
    /// The layer's path; for a parameter that is trained in full the parameter's, as PyTorch calls it (`norm.weight`).
    pub(crate) key: String,
    pub(crate) layout: WeightLayout,
    /// Shape in the model.
    pub(crate) shape: Vec<usize>,
}

impl Site {
    /// Inputs of the flattened weight `[out, in]`: channels times the size of the kernel.
    pub(crate) fn inputs(&self) -> usize {
        match self.layout {
            WeightLayout::InOut | WeightLayout::Table => self.shape[0],
            WeightLayout::OutIn => self.shape[1..].iter().product(),
        }
    }

    /// Outputs of the layer.
    pub(crate) fn outputs(&self) -> usize {
        match self.layout {
            WeightLayout::InOut | WeightLayout::Table => self.shape[1],
            WeightLayout::OutIn => self.shape[0],
        }
    }

    /// Size of a convolution's kernel by dimension, else empty.
    pub(crate) fn kernel(&self) -> &[usize] {
        match self.layout {
            WeightLayout::OutIn => self.shape.get(2..).unwrap_or_default(),
            WeightLayout::InOut | WeightLayout::Table => &[],
        }
    }

    /// Shape in a file of a part that is `dims` in a model: PEFT's factors of a convolution are convolutions.
    pub(crate) fn file_shape(&self, part: Part, dims: &[usize]) -> Vec<usize> {
        let kernel = self.kernel();
        let ones = || kernel.iter().map(|_| 1);
        let flat: usize = kernel.iter().product();
        match (part.convolution, dims) {
            (Convolution::Kernel, &[rows, columns]) if !kernel.is_empty() => {
                let channels = [rows, columns / flat];
                channels.into_iter().chain(kernel.iter().copied()).collect()
            }
            (Convolution::Ones, &[rows, columns]) => {
                [rows, columns].into_iter().chain(ones()).collect()
            }
            (Convolution::Ones, &[len]) if !kernel.is_empty() => {
                [1, len].into_iter().chain(ones()).collect()
            }
            _ => dims.to_vec(),
        }
    }
}
