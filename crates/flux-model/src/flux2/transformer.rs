//! The FLUX.2 transformer: double-stream and single-stream blocks that predict the velocity `noise - latents`.
//!
//! What differs from FLUX.1: shift, scale and gate of all blocks of a kind come from one layer, computed once a step; no
//! layer has a bias; MLPs are gated; a single block has one layer before and one after its attention; positions have four
//! axes, and text is rotated; there is no pooled text.
//!
//! Fields carry diffusers' names, so a parameter's path is its checkpoint key and its PEFT path. Every linear layer is
//! computed by [`lora_core::linear`].
//!
//! The forward pass is enter, the double blocks, the single blocks, leave ([`Velocity`]).
//!
//! Source: diffusers 0.38 `transformer_flux2.py`; black-forest-labs/flux2 `model.py` (ab7cca6).

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Gradients, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::linear;
use lora_core::training::recompute::{Blocks, TensorTree};

use crate::blocks::{Block, block_path, noisy_tokens};
use crate::error::WeightsError;
use crate::flux2::config::Flux2Config;
use crate::flux2::latent::Position;
use crate::joint_attention::JointAttention;
use crate::layers::{RmsNorm, RotaryTable, linear_layer, sinusoidal_embedding};
use crate::lora::ModelShape;
use crate::modulation::{Embedder, Modulation, vectors};
use crate::network::{Network, Velocity, argument, guidance, numbers, positions};
use crate::ops::attention::attention;
use crate::ops::gate::{gated_end, gated_residual};
use crate::ops::heads::{norm_rotate, to_heads};
use crate::ops::layer_norm::layer_norm_modulate;
use crate::ops::silu::{silu, swiglu};
use crate::weights::{Compute, Stream};

/// Inputs of one forward pass.
#[derive(Debug, Clone)]
pub struct Flux2Input {
    /// Noisy latents as tokens, reference pictures after them, `[batch, img_tokens, in_channels]`.
    pub img: Tensor<3>,
    /// Text tokens, `[batch, txt_tokens, joint_attention_dim]`.
    pub txt: Tensor<3>,
    /// Noise level of each sample, in `[0, 1]`, 1 = pure noise.
    pub sigma: Vec<f32>,
    /// Guidance strength of each sample; ignored by models without guidance embedding.
    pub guidance: Vec<f32>,
    /// Positions of the text tokens, then of the image tokens.
    pub positions: Vec<Position>,
    /// How many of the image tokens, at their end, are of reference pictures: they have no velocity.
    pub reference_tokens: usize,
}

/// What every block reads besides its input; the rotary positions get no gradient.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Time and guidance, `[batch, hidden_size]`.
    pub temb: Tensor<2>,
    /// Of the image stream of every double block: shift, scale, gate of the attention, then of the MLP,
    /// `[batch, 6 * hidden_size]`.
    pub img_mod: Tensor<2>,
    /// Of the text stream, likewise.
    pub txt_mod: Tensor<2>,
    /// Of every single block: shift, scale, gate, `[batch, 3 * hidden_size]`.
    pub single_mod: Tensor<2>,
    /// Rotary positions of text and image tokens.
    pub rotary: RotaryTable,
    /// How many of the tokens are text.
    pub txt_tokens: usize,
    /// How many of them, at the end, are of reference pictures.
    pub reference_tokens: usize,
}

impl Conditioning {
    /// With every vector changed by `vector`, and the positions by `rotary`.
    fn map(
        self,
        mut vector: impl FnMut(Tensor<2>) -> Tensor<2>,
        rotary: impl FnOnce(RotaryTable) -> RotaryTable,
    ) -> Self {
        Self {
            temb: vector(self.temb),
            img_mod: vector(self.img_mod),
            txt_mod: vector(self.txt_mod),
            single_mod: vector(self.single_mod),
            rotary: rotary(self.rotary),
            txt_tokens: self.txt_tokens,
            reference_tokens: self.reference_tokens,
        }
    }

    fn into_vectors(self) -> Vec<Tensor<2>> {
        vec![self.temb, self.img_mod, self.txt_mod, self.single_mod]
    }
}

impl TensorTree for Conditioning {
    fn lift(self) -> Self {
        self.map(TensorTree::lift, RotaryTable::lift)
    }
    fn leaf(self) -> Self {
        self.map(TensorTree::leaf, RotaryTable::lift)
    }
    fn inner(self) -> Self {
        self.map(TensorTree::inner, RotaryTable::inner)
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        self.into_vectors().dot(gradient.into_vectors())
    }
    fn take_gradient(&self, from: &mut Gradients) -> Self {
        let vector = |vector: Tensor<2>| vector.take_gradient(from);
        self.clone().map(vector, RotaryTable::inner)
    }
    fn plus(self, other: Self) -> Self {
        let mut others = other.into_vectors().into_iter();
        self.map(
            |vector| match others.next() {
                Some(other) => vector + other,
                None => vector,
            },
            |rotary| rotary,
        )
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct Flux2Transformer {
    x_embedder: Linear,
    context_embedder: Linear,
    time_guidance_embed: TimeGuidanceEmbed,
    double_stream_modulation_img: Modulation,
    double_stream_modulation_txt: Modulation,
    single_stream_modulation: Modulation,
    transformer_blocks: Vec<DoubleStreamBlock>,
    single_transformer_blocks: Vec<SingleStreamBlock>,
    norm_out: Modulation,
    proj_out: Linear,
    #[module(skip)]
    config: Flux2Config,
    /// Where the blocks are, if not in memory.
    #[module(skip)]
    stream: Option<Stream>,
    #[module(skip)]
    compute: Compute,
}

impl Flux2Transformer {
    /// A network with lazily initialised weights: nothing is allocated until a weight is read or loaded.
    pub fn new(config: &Flux2Config, device: &Device) -> Self {
        let hidden = config.hidden_size();
        let embedder = || Embedder::new(config.timestep_guidance_channels, hidden, false, device);
        Self {
            x_embedder: linear_layer(config.in_channels, hidden, false, device),
            context_embedder: linear_layer(config.joint_attention_dim, hidden, false, device),
            time_guidance_embed: TimeGuidanceEmbed {
                timestep_embedder: embedder(),
                guidance_embedder: config.guidance_embeds.then(embedder),
            },
            double_stream_modulation_img: Modulation::new(hidden, 6, false, device),
            double_stream_modulation_txt: Modulation::new(hidden, 6, false, device),
            single_stream_modulation: Modulation::new(hidden, 3, false, device),
            transformer_blocks: (0..config.num_layers)
                .map(|_| DoubleStreamBlock::new(config, device))
                .collect(),
            single_transformer_blocks: (0..config.num_single_layers)
                .map(|_| SingleStreamBlock::new(config, device))
                .collect(),
            norm_out: Modulation::new(hidden, 2, false, device),
            proj_out: linear_layer(hidden, config.out_channels(), false, device),
            config: config.clone(),
            stream: None,
            compute: Compute::default(),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &Flux2Config {
        &self.config
    }

    /// Everything that is computed once a step.
    fn condition(&self, input: &Flux2Input) -> Conditioning {
        let device = input.img.device();
        let embed = &self.time_guidance_embed;
        let sinusoid =
            |t: &[f32]| sinusoidal_embedding(t, self.config.timestep_guidance_channels, &device);
        let temb = embed.timestep_embedder.forward(sinusoid(&input.sigma));
        let temb = match &embed.guidance_embedder {
            Some(guidance) => temb + guidance.forward(sinusoid(&input.guidance)),
            None => temb,
        };
        let activated = silu(temb.clone());
        Conditioning {
            temb,
            img_mod: self.double_stream_modulation_img.forward(activated.clone()),
            txt_mod: self.double_stream_modulation_txt.forward(activated.clone()),
            single_mod: self.single_stream_modulation.forward(activated),
            rotary: RotaryTable::new(
                &input.positions,
                &self.config.axes_dims_rope,
                self.config.rope_theta,
                &device,
            ),
            txt_tokens: input.txt.dims()[1],
            reference_tokens: input.reference_tokens,
        }
    }
}

impl Velocity for Flux2Transformer {
    type Input = Flux2Input;

    /// Text and image tokens at the width of the network, and everything that is computed once a step.
    fn enter(&self, input: Flux2Input) -> Result<(Vec<Tensor<3>>, Conditioning), WeightsError> {
        let conditioning = self.condition(&input);
        let img = linear(&self.x_embedder, input.img);
        let txt = linear(&self.context_embedder, input.txt);
        Ok((self.compute.lower(vec![txt, img]), conditioning))
    }

    /// Drops text and references and projects to the velocity.
    fn leave(&self, tokens: Vec<Tensor<3>>, c: &Conditioning) -> Tensor<3> {
        let img = noisy_tokens(tokens, c.txt_tokens, c.reference_tokens).cast(DType::F32);
        let [scale, shift] = vectors(self.norm_out.forward(silu(c.temb.clone()))); // the other way round in BFL's layout
        let x = layer_norm_modulate(img, scale, shift, self.config.eps);
        linear(&self.proj_out, x)
    }
}

impl Network for Flux2Transformer {
    fn width(&self) -> usize {
        self.config.hidden_size()
    }

    fn heads(&self) -> usize {
        self.config.num_attention_heads
    }

    fn streams(&self, index: usize) -> usize {
        match index < self.transformer_blocks.len() {
            true => 2,
            false => 1,
        }
    }

    fn with_stream(self, stream: Stream) -> Self {
        Self {
            stream: Some(stream),
            ..self
        }
    }

    fn with_compute(self, compute: Compute) -> Self {
        Self { compute, ..self }
    }

    fn shape(&self) -> ModelShape {
        ModelShape {
            flux2: Some(self.config.clone()),
            ..ModelShape::default()
        }
    }

    fn reads_guidance(&self) -> bool {
        self.config.guidance_embeds
    }

    fn named_input(
        &self,
        tensors: &BTreeMap<String, HostTensor>,
        device: &Device,
    ) -> Result<Flux2Input, String> {
        let sigma = numbers(tensors, "timestep")?;
        Ok(Flux2Input {
            img: argument(tensors, "hidden_states", device)?,
            txt: argument(tensors, "encoder_hidden_states", device)?,
            guidance: guidance(self, tensors, sigma.len())?,
            sigma,
            positions: [
                positions(tensors, "txt_ids")?,
                positions(tensors, "img_ids")?,
            ]
            .concat(),
            reference_tokens: 0,
        })
    }
}

impl Blocks for Flux2Transformer {
    type Block = Block<DoubleStreamBlock, SingleStreamBlock>;
    type Carry = Vec<Tensor<3>>;
    type Shared = Conditioning;
    type Error = WeightsError;

    fn count(&self) -> usize {
        self.transformer_blocks.len() + self.single_transformer_blocks.len()
    }

    fn block(&self, index: usize) -> Result<Self::Block, WeightsError> {
        let (double, single) = (&self.transformer_blocks, &self.single_transformer_blocks);
        let block = Block::at(double, single, index);
        match &self.stream {
            None => Ok(block),
            Some(stream) => stream.fill(index, block),
        }
    }

    fn path(&self, index: usize) -> String {
        block_path(self.transformer_blocks.len(), index)
    }

    fn apply(block: &Self::Block, tokens: Vec<Tensor<3>>, c: &Conditioning) -> Vec<Tensor<3>> {
        block.forward(
            tokens,
            |block, tokens| block.forward(tokens, c),
            |block, hidden| block.forward(hidden, c),
        )
    }
}

#[derive(Module, Debug)]
struct TimeGuidanceEmbed {
    timestep_embedder: Embedder,
    guidance_embedder: Option<Embedder>,
}

#[derive(Module, Debug)]
struct FeedForward {
    linear_in: Linear,
    linear_out: Linear,
}

impl FeedForward {
    fn new(config: &Flux2Config, device: &Device) -> Self {
        let (hidden, inner) = (config.hidden_size(), config.mlp_hidden());
        Self {
            linear_in: linear_layer(hidden, 2 * inner, false, device),
            linear_out: linear_layer(inner, hidden, false, device),
        }
    }

    /// `x + gate * mlp(hidden)`.
    fn end(&self, x: Tensor<3>, gate: Tensor<3>, hidden: Tensor<3>) -> Tensor<3> {
        let hidden = swiglu(linear(&self.linear_in, hidden));
        gated_end(x, gate, &self.linear_out, hidden)
    }
}

/// Joint attention over image and text, each with its own weights.
#[derive(Module, Debug)]
pub struct DoubleStreamBlock {
    attn: JointAttention,
    ff: FeedForward,
    ff_context: FeedForward,
    #[module(skip)]
    eps: f64,
}

impl DoubleStreamBlock {
    fn new(config: &Flux2Config, device: &Device) -> Self {
        Self {
            attn: JointAttention::new(
                [config.num_attention_heads, config.attention_head_dim],
                false,
                config.eps,
                device,
            ),
            ff: FeedForward::new(config, device),
            ff_context: FeedForward::new(config, device),
            eps: config.eps,
        }
    }

    /// # Shapes
    /// - `txt`: `[batch, txt_tokens, hidden]`, `img`: `[batch, img_tokens, hidden]`; returns both, unchanged in shape
    pub fn forward(&self, [txt, img]: [Tensor<3>; 2], c: &Conditioning) -> [Tensor<3>; 2] {
        let [shift1, scale1, gate1, shift2, scale2, gate2] = vectors(c.img_mod.clone());
        let [
            txt_shift1,
            txt_scale1,
            txt_gate1,
            txt_shift2,
            txt_scale2,
            txt_gate2,
        ] = vectors(c.txt_mod.clone());
        let norm =
            |x: &Tensor<3>, scale, shift| layer_norm_modulate(x.clone(), scale, shift, self.eps);

        let [txt_attn, img_attn] = self.attn.forward(
            norm(&txt, txt_scale1, txt_shift1),
            norm(&img, scale1, shift1),
            &c.rotary,
        );

        let img = gated_residual(img, gate1, img_attn);
        let mlp = norm(&img, scale2, shift2);
        let img = self.ff.end(img, gate2, mlp);

        let txt = gated_residual(txt, txt_gate1, txt_attn);
        let mlp = norm(&txt, txt_scale2, txt_shift2);
        let txt = self.ff_context.end(txt, txt_gate2, mlp);
        [txt, img]
    }
}

/// Attention and MLP in parallel over the joined text and image tokens, one layer before and one after both.
#[derive(Module, Debug)]
pub struct SingleStreamBlock {
    attn: SingleAttention,
    #[module(skip)]
    eps: f64,
}

#[derive(Module, Debug)]
struct SingleAttention {
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    to_qkv_mlp_proj: Linear,
    to_out: Linear,
    #[module(skip)]
    heads: usize,
}

impl SingleStreamBlock {
    fn new(config: &Flux2Config, device: &Device) -> Self {
        let (hidden, mlp) = (config.hidden_size(), config.mlp_hidden());
        let norm = || RmsNorm::new(config.attention_head_dim, config.eps, device);
        Self {
            attn: SingleAttention {
                norm_q: norm(),
                norm_k: norm(),
                to_qkv_mlp_proj: linear_layer(hidden, 3 * hidden + 2 * mlp, false, device),
                to_out: linear_layer(hidden + mlp, hidden, false, device),
                heads: config.num_attention_heads,
            },
            eps: config.eps,
        }
    }

    /// # Shapes
    /// - `hidden`: `[batch, txt_tokens + img_tokens, hidden]`, unchanged
    pub fn forward(&self, hidden: Tensor<3>, c: &Conditioning) -> Tensor<3> {
        let [shift, scale, gate] = vectors(c.single_mod.clone());
        let x = layer_norm_modulate(hidden.clone(), scale, shift, self.eps);
        gated_end(
            hidden,
            gate,
            &self.attn.to_out,
            self.attn.forward(x, &c.rotary),
        )
    }
}

impl SingleAttention {
    /// What `to_out` projects.
    fn forward(&self, x: Tensor<3>, rotary: &RotaryTable) -> Tensor<3> {
        let width = x.dims()[2];
        let fused = linear(&self.to_qkv_mlp_proj, x); // q, k, v, gate of the MLP, its values
        let part = |i| fused.clone().narrow(2, i * width, width);
        let attn = attention(
            norm_rotate([self.norm_q.stream(part(0))], self.heads, rotary),
            norm_rotate([self.norm_k.stream(part(1))], self.heads, rotary),
            to_heads([part(2)], self.heads),
            rotary.scale(),
            None,
        );
        let mlp = fused.dims()[2] - 3 * width;
        let mlp = swiglu(fused.narrow(2, 3 * width, mlp));
        Tensor::cat(vec![attn, mlp], 2) // attention first
    }
}
