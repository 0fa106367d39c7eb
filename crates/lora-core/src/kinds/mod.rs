//! What is trained: the kinds of adapter, what each consists of and how it starts.
//!
//! | kind | change of the weight `[out, in]` | source |
//! |---|---|---|
//! | LoRA | `B A`, with `A: [r, in]`, `B: [out, r]`, less the `B₀ A₀` of its start if that is a part of the weight | Hu et al. 2021, arXiv:2106.09685 |
//! | LoHa | `(w1_a w1_b) ⊙ (w2_a w2_b)`, the `a` `[out, r]`, the `b` `[r, in]` | Hyeon-Woo et al. 2021, arXiv:2108.06098 |
//! | LoKr | `kron(w1, w2)`, either side a matrix or a product of rank `r` | Yeh et al. 2023, arXiv:2309.14859 |
//! | diff | the change itself; in files only: a model takes it into its weight | |
//! | whole | the parameter itself, trained in full (`modules_to_save`, `bias`) | |
//!
//! A kind is a table of parts in `parts`, from which paths, files, shapes, gradients and devices follow, and a file that says
//! what change they make and how they start. Names are PEFT's.

pub(crate) mod dense;
pub(crate) mod factors;
pub(crate) mod lora;
pub(crate) mod lycoris;
pub(crate) mod module;
pub mod parts;
pub(crate) mod spec;
pub(crate) mod split;
pub(crate) mod start;

pub use factors::{Factors, Side};
pub use module::ModuleAdapter;
pub use spec::AdapterSpec;

use burn::tensor::Tensor;

use crate::kinds::factors::{Factor, Layer};
use crate::kinds::parts::{DIFF, Kind};

impl Factors<Factor> {
    /// The change of the weight before the scale, `[out, in]`; `None` for a whole parameter.
    pub(crate) fn delta(&self) -> Option<Tensor<2>> {
        match self.kind() {
            Kind::Lora => Some(lora::delta(self)),
            Kind::Loha => lycoris::loha_delta(self),
            Kind::Lokr => lycoris::lokr_delta(self),
            Kind::Diff => Some(self[DIFF].matrix()),
            Kind::Whole => None,
        }
    }

    /// `result`, `[..., out]`, plus `scale` times what the factors add for the input of the layer, without the dense change
    /// where there is a way (DoRA needs it for its norm, LoHa for the product).
    pub(crate) fn forward<const D: usize>(
        &self,
        scale: f64,
        layer: Layer<D>,
        result: Tensor<D>,
    ) -> Tensor<D> {
        use crate::ops::matmul::times;
        match self.kind() {
            Kind::Lora => lora::forward(self, scale, layer, result),
            Kind::Lokr => lycoris::lokr_forward(self, scale, layer.x, result),
            Kind::Loha | Kind::Diff | Kind::Whole => match self.delta() {
                Some(delta) => {
                    let delta = delta.mul_scalar(scale).transpose();
                    result + times(layer.x, delta, None)
                }
                None => result, // it is `base` already
            },
        }
    }
}
