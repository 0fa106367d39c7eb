//! The FLUX.1 transformer: 19 double-stream and 38 single-stream blocks that predict the velocity `noise - latents`.
//!
//! Fields carry diffusers' names (`transformer_blocks.0.attn.to_q`), so a parameter's path is its checkpoint key and its PEFT
//! path. q, k and v are separate layers, as LoRA files name them; a fused checkpoint is split when it is loaded. Every linear
//! layer is computed by [`lora_core::linear`].
//!
//! The forward pass is enter, the double blocks, the single blocks, leave ([`Velocity`]); training takes the same seams block
//! by block.
//!
//! Source: diffusers 0.38 `transformer_flux.py`; black-forest-labs/flux `src/flux/model.py` (802fb47).

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::{Identity, Linear};
use burn::tensor::{DType, Device, Gradients, Tensor};
use lora_core::files::host::HostTensor;
use lora_core::linear;
use lora_core::training::recompute::{Blocks, TensorTree};

use crate::blocks::{Block, block_path, noisy_tokens};
use crate::error::WeightsError;
use crate::flux1::config::FluxConfig;
use crate::flux1::latent::Position;
use crate::joint_attention::JointAttention;
use crate::layers::{RmsNorm, RotaryTable, linear_layer, sinusoidal_embedding};
use crate::lora::ModelShape;
use crate::modulation::{Embedder, Modulation, vectors};
use crate::network::{Network, Velocity, argument, guidance, numbers, positions};
use crate::network_config::NetworkConfig;
use crate::ops::attention::attention;
use crate::ops::gate::{gated_end, gated_residual};
use crate::ops::gelu::{cat_gelu_tanh, gelu_tanh};
use crate::ops::heads::{norm_rotate, to_heads};
use crate::ops::layer_norm::layer_norm_modulate;
use crate::ops::silu::silu;
use crate::weights::{Checkpoint, Layout};

/// Of every norm in this network.
const EPS: f64 = 1e-6;
/// Base of the rotary frequencies.
const THETA: f64 = 10000.0;
/// Channels of the sinusoidal embeddings of time and guidance.
const TIME_CHANNELS: usize = 256;
use crate::weights::{Compute, Stream};

/// Inputs of one forward pass.
#[derive(Debug, Clone)]
pub struct FluxInput {
    /// Packed noisy latents, `[batch, img_tokens, in_channels]`.
    pub img: Tensor<3>,
    /// Text tokens (T5), `[batch, txt_tokens, joint_attention_dim]`.
    pub txt: Tensor<3>,
    /// Pooled text vector (CLIP), `[batch, pooled_projection_dim]`.
    pub pooled: Tensor<2>,
    /// Noise level of each sample, in `[0, 1]`, 1 = pure noise.
    pub sigma: Vec<f32>,
    /// Guidance strength of each sample; ignored by models without guidance embedding.
    pub guidance: Vec<f32>,
    /// Positions of the text tokens, then of the image tokens.
    pub positions: Vec<Position>,
    /// How many of the image tokens, at their end, are of reference pictures: they have no velocity.
    pub reference_tokens: usize,
}

/// What every block reads besides its input; only `temb` gets a gradient.
#[derive(Debug, Clone)]
pub struct Conditioning {
    /// Time, guidance and pooled text, `[batch, hidden_size]`.
    pub temb: Tensor<2>,
    /// Rotary positions of text and image tokens.
    pub rotary: RotaryTable,
    /// How many of the tokens are text.
    pub txt_tokens: usize,
    /// How many of them, at the end, are of reference pictures.
    pub reference_tokens: usize,
}

impl TensorTree for Conditioning {
    fn lift(self) -> Self {
        Self {
            temb: self.temb.lift(),
            rotary: self.rotary.lift(),
            ..self
        }
    }
    fn leaf(self) -> Self {
        Self {
            temb: self.temb.leaf(),
            rotary: self.rotary.lift(),
            ..self
        }
    }
    fn inner(self) -> Self {
        Self {
            temb: TensorTree::inner(self.temb),
            rotary: self.rotary.inner(),
            ..self
        }
    }
    fn dot(self, gradient: Self) -> Option<Tensor<1>> {
        self.temb.dot(gradient.temb)
    }
    fn take_gradient(&self, from: &mut Gradients) -> Self {
        Self {
            temb: self.temb.take_gradient(from),
            ..self.clone().inner()
        }
    }
    fn plus(self, other: Self) -> Self {
        Self {
            temb: self.temb.plus(other.temb),
            ..self
        }
    }
}

/// The network.
#[derive(Module, Debug)]
pub struct FluxTransformer {
    x_embedder: Linear,
    context_embedder: Linear,
    time_text_embed: TimeTextEmbed,
    transformer_blocks: Vec<DoubleStreamBlock>,
    single_transformer_blocks: Vec<SingleStreamBlock>,
    norm_out: Modulation,
    proj_out: Linear,
    #[module(skip)]
    config: FluxConfig,
    /// Where the blocks are, if not in memory.
    #[module(skip)]
    stream: Option<Stream>,
    #[module(skip)]
    compute: Compute,
}

impl FluxTransformer {
    /// A network with lazily initialised weights: nothing is allocated until a weight is read or loaded.
    pub fn new(config: &FluxConfig, device: &Device) -> Self {
        let hidden = config.hidden_size();
        Self {
            x_embedder: linear_layer(config.in_channels, hidden, true, device),
            context_embedder: linear_layer(config.joint_attention_dim, hidden, true, device),
            time_text_embed: TimeTextEmbed {
                timestep_embedder: Embedder::new(TIME_CHANNELS, hidden, true, device),
                guidance_embedder: config
                    .guidance_embeds
                    .then(|| Embedder::new(TIME_CHANNELS, hidden, true, device)),
                text_embedder: Embedder::new(config.pooled_projection_dim, hidden, true, device),
            },
            transformer_blocks: (0..config.num_layers)
                .map(|_| DoubleStreamBlock::new(config, device))
                .collect(),
            single_transformer_blocks: (0..config.num_single_layers)
                .map(|_| SingleStreamBlock::new(config, device))
                .collect(),
            norm_out: Modulation::new(hidden, 2, true, device),
            proj_out: linear_layer(hidden, config.out_channels(), true, device),
            config: config.clone(),
            stream: None,
            compute: Compute::default(),
        }
    }

    /// The architecture.
    pub fn config(&self) -> &FluxConfig {
        &self.config
    }

    /// The conditioning vector, `[batch, hidden_size]`.
    fn condition(&self, input: &FluxInput) -> Tensor<2> {
        let device = input.pooled.device();
        let embed = &self.time_text_embed;
        let time = embed.timestep_embedder.forward(sinusoidal_embedding(
            &input.sigma,
            TIME_CHANNELS,
            &device,
        ));
        let time = match &embed.guidance_embedder {
            Some(guidance) => {
                time + guidance.forward(sinusoidal_embedding(
                    &input.guidance,
                    TIME_CHANNELS,
                    &device,
                ))
            }
            None => time,
        };
        time + embed.text_embedder.forward(input.pooled.clone())
    }
}

impl NetworkConfig for FluxConfig {
    type Network = FluxTransformer;

    fn problem(&self) -> Option<String> {
        Self::problem(self)
    }

    fn of_tensors(
        checkpoint: &Checkpoint,
        hint: Option<&Self>,
    ) -> Result<(Layout, Self), WeightsError> {
        checkpoint.transformer(hint)
    }

    fn normalized(&self) -> Self {
        Self {
            out_channels: Some(self.out_channels()),
            ..self.clone()
        }
    }

    fn network(&self, device: &Device) -> FluxTransformer {
        FluxTransformer::new(self, device)
    }
}

impl Velocity for FluxTransformer {
    type Input = FluxInput;

    /// Text and image tokens at the width of the network, and the conditioning.
    fn enter(&self, input: FluxInput) -> Result<(Vec<Tensor<3>>, Conditioning), WeightsError> {
        let conditioning = Conditioning {
            temb: self.condition(&input),
            rotary: RotaryTable::new(
                &input.positions,
                &self.config.axes_dims_rope,
                THETA,
                &input.img.device(),
            ),
            txt_tokens: input.txt.dims()[1],
            reference_tokens: input.reference_tokens,
        };
        let img = linear(&self.x_embedder, input.img);
        let txt = linear(&self.context_embedder, input.txt);
        Ok((self.compute.lower(vec![txt, img]), conditioning))
    }

    /// Drops text and references and projects to the velocity.
    fn leave(&self, tokens: Vec<Tensor<3>>, c: &Conditioning) -> Tensor<3> {
        let img = noisy_tokens(tokens, c.txt_tokens, c.reference_tokens).cast(DType::F32);
        let [scale, shift] = vectors(self.norm_out.forward(silu(c.temb.clone()))); // the other way round in BFL's layout
        linear(&self.proj_out, layer_norm_modulate(img, scale, shift, EPS))
    }
}

impl Network for FluxTransformer {
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
            transformer: Some(self.config.clone()),
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
    ) -> Result<FluxInput, String> {
        let sigma = numbers(tensors, "timestep")?;
        Ok(FluxInput {
            img: argument(tensors, "hidden_states", device)?,
            txt: argument(tensors, "encoder_hidden_states", device)?,
            pooled: argument(tensors, "pooled_projections", device)?,
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

impl Blocks for FluxTransformer {
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
struct TimeTextEmbed {
    timestep_embedder: Embedder,
    guidance_embedder: Option<Embedder>,
    text_embedder: Embedder,
}

#[derive(Module, Debug)]
struct FeedForward {
    net: (GeluProjection, Identity, Linear), // 1 is dropout upstream
}

#[derive(Module, Debug)]
struct GeluProjection {
    proj: Linear,
}

impl FeedForward {
    fn new(hidden: usize, device: &Device) -> Self {
        let proj = linear_layer(hidden, 4 * hidden, true, device);
        Self {
            net: (
                GeluProjection { proj },
                Identity::new(),
                linear_layer(4 * hidden, hidden, true, device),
            ),
        }
    }

    /// `x + gate * mlp(hidden)`.
    fn end(&self, x: Tensor<3>, gate: Tensor<3>, hidden: Tensor<3>) -> Tensor<3> {
        let hidden = gelu_tanh(linear(&self.net.0.proj, hidden));
        gated_end(x, gate, &self.net.2, hidden)
    }
}

/// Joint attention over image and text, each with its own weights.
#[derive(Module, Debug)]
pub struct DoubleStreamBlock {
    norm1: Modulation,
    norm1_context: Modulation,
    attn: JointAttention,
    ff: FeedForward,
    ff_context: FeedForward,
}

impl DoubleStreamBlock {
    fn new(config: &FluxConfig, device: &Device) -> Self {
        let hidden = config.hidden_size();
        Self {
            norm1: Modulation::new(hidden, 6, true, device),
            norm1_context: Modulation::new(hidden, 6, true, device),
            attn: JointAttention::new(
                [config.num_attention_heads, config.attention_head_dim],
                true,
                EPS,
                device,
            ),
            ff: FeedForward::new(hidden, device),
            ff_context: FeedForward::new(hidden, device),
        }
    }

    /// # Shapes
    /// - `txt`: `[batch, txt_tokens, hidden]`, `img`: `[batch, img_tokens, hidden]`; returns both, unchanged in shape
    pub fn forward(&self, [txt, img]: [Tensor<3>; 2], c: &Conditioning) -> [Tensor<3>; 2] {
        let activated = silu(c.temb.clone()); // the only use of temb: per-block recompute relies on it
        let [shift1, scale1, gate1, shift2, scale2, gate2] =
            vectors(self.norm1.forward(activated.clone()));
        let [
            txt_shift1,
            txt_scale1,
            txt_gate1,
            txt_shift2,
            txt_scale2,
            txt_gate2,
        ] = vectors(self.norm1_context.forward(activated));

        let [txt_attn, img_attn] = self.attn.forward(
            layer_norm_modulate(txt.clone(), txt_scale1, txt_shift1, EPS),
            layer_norm_modulate(img.clone(), scale1, shift1, EPS),
            &c.rotary,
        );

        let img = gated_residual(img, gate1, img_attn);
        let mlp = layer_norm_modulate(img.clone(), scale2, shift2, EPS);
        let img = self.ff.end(img, gate2, mlp);

        let txt = gated_residual(txt, txt_gate1, txt_attn);
        let mlp = layer_norm_modulate(txt.clone(), txt_scale2, txt_shift2, EPS);
        let txt = self.ff_context.end(txt, txt_gate2, mlp);
        [txt, img]
    }
}

/// Attention and MLP in parallel over the joined text and image tokens.
#[derive(Module, Debug)]
pub struct SingleStreamBlock {
    norm: Modulation,
    proj_mlp: Linear,
    proj_out: Linear,
    attn: SingleAttention,
}

#[derive(Module, Debug)]
struct SingleAttention {
    norm_q: RmsNorm,
    norm_k: RmsNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    #[module(skip)]
    heads: usize,
}

impl SingleStreamBlock {
    fn new(config: &FluxConfig, device: &Device) -> Self {
        let hidden = config.hidden_size();
        let square = || linear_layer(hidden, hidden, true, device);
        let norm = || RmsNorm::new(config.attention_head_dim, EPS, device);
        Self {
            norm: Modulation::new(hidden, 3, true, device),
            proj_mlp: linear_layer(hidden, 4 * hidden, true, device),
            proj_out: linear_layer(5 * hidden, hidden, true, device),
            attn: SingleAttention {
                norm_q: norm(),
                norm_k: norm(),
                to_q: square(),
                to_k: square(),
                to_v: square(),
                heads: config.num_attention_heads,
            },
        }
    }

    /// # Shapes
    /// - `hidden`: `[batch, txt_tokens + img_tokens, hidden]`, unchanged
    pub fn forward(&self, hidden: Tensor<3>, c: &Conditioning) -> Tensor<3> {
        let [shift, scale, gate] = vectors(self.norm.forward(silu(c.temb.clone())));
        let x = layer_norm_modulate(hidden.clone(), scale, shift, EPS);
        let (attn, heads) = (&self.attn, self.attn.heads);
        let q = attn.norm_q.stream(linear(&attn.to_q, x.clone()));
        let k = attn.norm_k.stream(linear(&attn.to_k, x.clone()));
        let v = linear(&attn.to_v, x.clone());
        let attn = attention(
            norm_rotate([q], heads, &c.rotary),
            norm_rotate([k], heads, &c.rotary),
            to_heads([v], heads),
            c.rotary.scale(),
            None,
        );
        let x = cat_gelu_tanh(attn, linear(&self.proj_mlp, x)); // attention first
        gated_end(hidden, gate, &self.proj_out, x)
    }
}
