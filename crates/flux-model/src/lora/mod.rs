//! LoRA files of FLUX.1 and FLUX.2: every format found in the wild, read into one form and written from it.
//!
//! The form is [`LoraSet`]: component and diffusers module path to [`ModuleUpdate`]. A file is read key by key, whatever
//! its name: each key is a prefix, a module and a parameter, and any prefix goes with any spelling of the module.
//!
//! | format | example key | read | write |
//! |---|---|---|---|
//! | diffusers | `transformer.transformer_blocks.0.attn.to_q.lora_A.weight` | yes | yes |
//! | diffusers, old | `….attn.processor.to_q_lora.down.weight`, `….lora_linear_layer.up.weight` | yes | |
//! | PEFT folder | `base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight` | yes | yes |
//! | kohya | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` | yes | yes |
//! | ComfyUI | `diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight` | yes | FLUX.1 |
//! | ai-toolkit for FLUX.2 | `diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight` | yes | FLUX.2 |
//! | SimpleTuner for ComfyUI | `diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight` | yes | |
//! | fal Kontext | `base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight` | yes | |
//! | BFL control | `double_blocks.0.img_attn.qkv.lora_B.bias`, `….query_norm.scale` | yes | |
//! | XLabs, USO | `double_blocks.0.processor.qkv_lora1.down.weight` | yes | |
//! | OneTrainer | `lora_transformer_transformer_blocks_0_attn_to_q.dora_scale` | yes | |
//! | OneTrainer OMI | `transformer.double_blocks.0.img_attn.qkv.1.lora_down.weight` | yes | |
//! | DiffSynth, raw dumps | `transformer_blocks.0.attn.to_q.lora_A.default.weight` | yes | |
//! | LyCORIS (LoKr, LoHa, full) | `lycoris_transformer_blocks_0_attn_to_q.lokr_w1` | yes | kohya, ComfyUI |
//!
//! Decisions:
//! - The rank is that of the tensors. The scale is kept as a number beside the factors, so that nothing is rounded on read.
//! - A fused module becomes several modules that select rows of its tensors; they are put together again on write.
//! - Tensors are [`TensorRef`]s: read when needed, one at a time.
//! - Nothing is dropped silently: [`Report`] names each key that was not used, [`WriteReport`] each module that was not
//!   written.
//!
//! | file | idea |
//! |---|---|
//! | `source`, `read`, `group` | files and configurations; a set from them; one module's keys to an update |
//! | `key`, `names` | keys to prefix, module and parameter; every name of every module |
//! | `shape`, `infer` | the modules of a network, from its configuration or from a file |
//! | `identity` | what a file is that is no LoRA for FLUX |
//! | `readers` | what other programs do with each key |
//! | `tensor`, `rows` | tensors that are read when needed; which rows of them |
//! | `lycoris`, `delta` | the dense change and the low-rank form of each kind; what a module's weight changes by |
//! | `split`, `fuse` | fused modules to parts and back |
//! | `format` | the formats that can be written, and what writing one says |
//! | `write`, `emit`, `emit_peft` | a set to a file, and the keys of each format |
//! | `adapter` | to and from what [`lora_core`] attaches |
//!
//! Source: the loaders and savers of diffusers 0.38, ComfyUI a125cd84, sd-scripts 48d368fa, PEFT 0.19, LyCORIS f49d30d6,
//! OneTrainer 23df3832, ai-toolkit 27a03a91, x-flux 47495425 and BFL flux 802fb471, for the names and what they mean.

mod adapter;
mod compare;
mod delta;
mod emit;
mod emit_peft;
mod error;
mod format;
mod fuse;
mod group;
mod identity;
mod infer;
mod key;
mod lycoris;
mod names;
mod read;
mod readers;
mod rows;
mod shape;
mod source;
mod split;
mod tensor;
mod write;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use lora_core::kinds::parts::{Kind, LORA_A, LORA_B, WHOLE};

pub use adapter::{Change, Residual};
pub use delta::{BaseWeight, delta};
pub use error::{KeyProblem, LoraFormatError};
pub use format::{LoraFormat, Loss, WriteOptions, WriteReport};
pub use identity::Identity;
pub use read::read;
pub use readers::Reading;
pub use rows::Rows;
pub use shape::{ModelShape, ModuleShape};
pub use tensor::TensorRef;
pub use write::write;

/// One LoRA: what it changes in each component, and how it was read.
#[derive(Debug, Clone, Default)]
pub struct LoraSet {
    /// Updates of the velocity network, by diffusers module path.
    pub transformer: BTreeMap<String, ModuleUpdate>,
    /// Updates of CLIP, by transformers module path.
    pub clip: BTreeMap<String, ModuleUpdate>,
    /// Updates of T5, by transformers module path.
    pub t5: BTreeMap<String, ModuleUpdate>,
    /// The networks the paths belong to: as given, or as far as the file shows them.
    pub shape: ModelShape,
    /// Header of the file.
    pub metadata: BTreeMap<String, String>,
    /// Input channels of `x_embedder` if the LoRA needs more than the network has: pad its weight with zeros on the right,
    /// up to this width, before applying the LoRA (FLUX.1 control LoRAs).
    pub in_channels: Option<usize>,
    /// What was used and what was not.
    pub report: Report,
}

impl LoraSet {
    /// The updates of one component.
    pub fn modules(&self, component: Component) -> &BTreeMap<String, ModuleUpdate> {
        match component {
            Component::Transformer => &self.transformer,
            Component::ClipL => &self.clip,
            Component::T5 => &self.t5,
        }
    }

    /// The updates of one component, to be changed.
    pub fn modules_mut(&mut self, component: Component) -> &mut BTreeMap<String, ModuleUpdate> {
        match component {
            Component::Transformer => &mut self.transformer,
            Component::ClipL => &mut self.clip,
            Component::T5 => &mut self.t5,
        }
    }

    /// Every update, with its component and module path.
    pub fn iter(&self) -> impl Iterator<Item = (Component, &str, &ModuleUpdate)> {
        Component::ALL.into_iter().flat_map(|component| {
            let modules = self.modules(component).iter();
            modules.map(move |(path, update)| (component, path.as_str(), update))
        })
    }

    /// Number of modules that are changed.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// Whether nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// Reads every tensor once.
    ///
    /// # Errors
    /// The first tensor that cannot be read or holds NaN or infinity.
    pub fn validate(&self) -> Result<(), LoraFormatError> {
        for (_, _, update) in self.iter() {
            for tensor in update.tensors() {
                tensor.load()?;
            }
        }
        Ok(())
    }
}

/// A network that a LoRA can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Component {
    /// The velocity network.
    Transformer,
    /// The CLIP-L text encoder.
    ClipL,
    /// The T5 text encoder.
    T5,
}

impl Component {
    /// All components.
    pub const ALL: [Self; 3] = [Self::Transformer, Self::ClipL, Self::T5];
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transformer => "transformer",
            Self::ClipL => "text_encoder",
            Self::T5 => "text_encoder_2",
        })
    }
}

/// What a LoRA does to one module.
#[derive(Debug, Clone)]
pub struct ModuleUpdate {
    /// Change of the weight `[out, in]`, or of a norm's gain `[len]`, before the scale; `None` if only the bias changes.
    pub factors: Option<Factors>,
    /// Rows of what the factors make that belong to this module; `None` for all. A Kronecker product of which a module is
    /// a part that its outer factor does not show.
    pub rows: Option<Rows>,
    /// Factor of the weight's change: alpha over rank, or whatever the format says. Not folded into the factors.
    pub scale: f64,
    /// Alpha as the file states it.
    pub alpha: Option<f64>,
    /// Change of the bias.
    pub bias: Option<Bias>,
    /// DoRA: the length of each row or column of the changed weight.
    pub magnitude: Option<Magnitude>,
}

/// The parts of an adapter, in files. Biases and magnitudes are not among them.
pub type Factors = lora_core::kinds::Factors<TensorRef>;

/// Change of a bias `[out]`.
#[derive(Debug, Clone)]
pub enum Bias {
    /// Added after multiplication with [`ModuleUpdate::scale`]: the bias of `lora_B`.
    Scaled(TensorRef),
    /// Added as it is: `diff_b`.
    Added(TensorRef),
    /// The new bias.
    Replaced(TensorRef),
}

impl Bias {
    /// The values, whatever they mean.
    pub fn tensor(&self) -> &TensorRef {
        match self {
            Self::Scaled(tensor) | Self::Added(tensor) | Self::Replaced(tensor) => tensor,
        }
    }

    /// The same meaning of other values.
    pub(crate) fn with(&self, values: TensorRef) -> Self {
        match self {
            Self::Scaled(_) => Self::Scaled(values),
            Self::Added(_) => Self::Added(values),
            Self::Replaced(_) => Self::Replaced(values),
        }
    }
}

/// DoRA: with `V = W + scale * delta`, the new weight is `values * V / norm(V)`.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// One value a row (`[out]`) or a column (`[in]`).
    pub values: TensorRef,
    /// What the norm is taken over.
    pub axis: Axis,
}

/// What the values of a DoRA magnitude count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Axis {
    /// Outputs: the norm of each row.
    Output,
    /// Inputs: the norm of each column, taken over the rows of all these modules together (the parts of a fused one).
    Input {
        /// Module paths.
        across: Vec<String>,
    },
}

impl ModuleUpdate {
    /// An update of low rank.
    pub fn low_rank(down: TensorRef, up: TensorRef, scale: f64) -> Self {
        Self::of(Some(Factors::lora(down, up)), scale)
    }

    pub(crate) fn of(factors: Option<Factors>, scale: f64) -> Self {
        Self {
            factors,
            rows: None,
            scale,
            alpha: None,
            bias: None,
            magnitude: None,
        }
    }

    /// The kind of the weight's change.
    pub fn kind(&self) -> Option<Kind> {
        self.factors.as_ref().map(Factors::kind)
    }

    /// Down and up projection of a low-rank update.
    pub(crate) fn pair(&self) -> Option<(&TensorRef, &TensorRef)> {
        let factors = self.factors.as_ref()?;
        Some((factors.get(LORA_A)?, factors.get(LORA_B)?))
    }

    /// The new value of the weight, if it is not a change.
    pub(crate) fn replacement(&self) -> Option<&TensorRef> {
        self.factors.as_ref()?.get(WHOLE)
    }

    /// Rank of a low-rank update.
    pub fn rank(&self) -> Option<usize> {
        Some(self.pair()?.0.size().0)
    }

    /// Rows and columns of the weight that changes.
    pub fn size(&self) -> Option<(usize, usize)> {
        let [out, input] = self.factors.as_ref()?.size(TensorRef::axes);
        Some((self.rows.as_ref().map_or(out, Rows::count), input))
    }

    /// Every tensor of the update.
    pub fn tensors(&self) -> Vec<&TensorRef> {
        let factors = self.factors.iter().flat_map(Factors::iter);
        let mut tensors: Vec<_> = factors.map(|(_, tensor)| tensor).collect();
        tensors.extend(self.bias.as_ref().map(Bias::tensor));
        tensors.extend(self.magnitude.as_ref().map(|magnitude| &magnitude.values));
        tensors
    }
}

/// How a file was read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Formats and algorithms seen, with the number of modules of each.
    pub formats: BTreeMap<String, usize>,
    /// Keys that were used.
    pub used: usize,
    /// Keys that were not used, with the reason.
    pub ignored: Vec<(String, String)>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// What other programs do with the file.
    pub readings: Vec<Reading>,
    /// Whether neither a model nor the file says if it is for FLUX.1, which it was read for, or FLUX.2 klein 4B; a warning says
    /// so too.
    pub is_of_either: bool,
}

impl Report {
    /// The keys that were not used, one line a reason: how many, and the first few by name.
    pub fn ignored_lines(&self) -> Vec<String> {
        by_reason("ignored", &self.ignored)
    }
}

/// What was done to keys, one line a reason: how many, and the first few by name.
fn by_reason(done: &str, keys: &[(String, String)]) -> Vec<String> {
    const NAMED: usize = 3;
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (key, reason) in keys {
        reasons.entry(reason).or_default().push(key);
    }
    let line = |(reason, keys): (&str, Vec<&str>)| {
        let named: Vec<_> = keys
            .iter()
            .take(NAMED)
            .map(|key| format!("`{key}`"))
            .collect();
        let more = match keys.len() - named.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let count = keys.len();
        let noun = if count == 1 { "key" } else { "keys" };
        let named = named.join(", ");
        format!("{done} {count} {noun}, {named}{more}: {reason}")
    };
    reasons.into_iter().map(line).collect()
}
