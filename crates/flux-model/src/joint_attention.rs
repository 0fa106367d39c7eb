//! The attention of a double-stream block, over image and text tokens together.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use lora_core::linear;

use crate::layers::{RmsNorm, RotaryTable, linear_layer};
use crate::ops::attention::attention;
use crate::ops::heads::{norm_rotate, to_heads};

/// Joint attention over image and text, each with its own weights.
///
/// # Source
/// diffusers 0.38 `FluxAttention`, `Flux2Attention` with `added_kv_proj_dim`.
#[derive(Module, Debug)]
pub(crate) struct JointAttention {
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: [Linear; 1],
    norm_added_q: RmsNorm,
    norm_added_k: RmsNorm,
    add_q_proj: Linear,
    add_k_proj: Linear,
    add_v_proj: Linear,
    to_add_out: Linear,
    #[module(skip)]
    heads: usize,
}

impl JointAttention {
    /// `heads` of `head_dim` each; `bias`: whether its linear layers have one.
    pub(crate) fn new(
        [heads, head_dim]: [usize; 2],
        bias: bool,
        eps: f64,
        device: &Device,
    ) -> Self {
        let square = || linear_layer(heads * head_dim, heads * head_dim, bias, device);
        let norm = || RmsNorm::new(head_dim, eps, device);
        Self {
            norm_q: norm(),
            norm_k: norm(),
            to_q: square(),
            to_k: square(),
            to_v: square(),
            to_out: [square()],
            norm_added_q: norm(),
            norm_added_k: norm(),
            add_q_proj: square(),
            add_k_proj: square(),
            add_v_proj: square(),
            to_add_out: square(),
            heads,
        }
    }

    /// # Shapes
    /// - `txt`: `[batch, txt_tokens, hidden]`, `img`: `[batch, img_tokens, hidden]`; returns both, unchanged in shape
    pub(crate) fn forward(
        &self,
        txt: Tensor<3>,
        img: Tensor<3>,
        rotary: &RotaryTable,
    ) -> [Tensor<3>; 2] {
        let (txt_tokens, img_tokens) = (txt.dims()[1], img.dims()[1]);
        let q = [
            (self.norm_added_q).stream(linear(&self.add_q_proj, txt.clone())), // text first
            self.norm_q.stream(linear(&self.to_q, img.clone())),
        ];
        let k = [
            (self.norm_added_k).stream(linear(&self.add_k_proj, txt.clone())),
            self.norm_k.stream(linear(&self.to_k, img.clone())),
        ];
        let v = [linear(&self.add_v_proj, txt), linear(&self.to_v, img)];
        let out = attention(
            norm_rotate(q, self.heads, rotary),
            norm_rotate(k, self.heads, rotary),
            to_heads(v, self.heads),
            rotary.scale(),
            None,
        );
        let txt_out = out.clone().narrow(1, 0, txt_tokens);
        let img_out = out.narrow(1, txt_tokens, img_tokens);
        let img_out = linear(&self.to_out[0], img_out);
        [linear(&self.to_add_out, txt_out), img_out]
    }
}
