//! Loading: from a checkpoint's tensors into a network, each tensor used exactly or named in an error.
//!
//! A network's parameter path is its diffusers key, but for two things Burn does otherwise: norms call their parameters
//! `gamma` and `beta`, and a linear weight is `[in, out]`. Single files in BFL's layout are read through [`keys`].
//!
//! [`keys`]: mod@crate::flux1::keys

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::files::quantised::Stored;
use lora_core::files::safetensors::TensorSet;

use crate::autoencoder::AutoencoderConfig;
use crate::error::WeightsError;
use crate::flux1::config::FluxConfig;
use crate::flux1::keys::{self, BflModule};
use crate::flux2;
use crate::found;

/// How a checkpoint names its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// As the network: diffusers and transformers.
    Diffusers,
    /// A T5 encoder, whose embedding may be stored under either or both of two names.
    T5,
    /// A CLIP text encoder, which may bring parts FLUX does not use.
    Clip,
    /// BFL's transformer, of this width.
    BflTransformer {
        /// `hidden_size` of the network.
        hidden: usize,
    },
    /// BFL's autoencoder, with this many resolutions.
    BflAutoencoder {
        /// Number of `block_out_channels`.
        levels: usize,
    },
    /// BFL's FLUX.2 transformer, of this width.
    BflFlux2Transformer {
        /// `hidden_size` of the network.
        hidden: usize,
    },
    /// diffusers' FLUX.2 autoencoder, which also counts the batches its statistics were taken from.
    Flux2Autoencoder,
    /// BFL's FLUX.2 autoencoder, with this many resolutions.
    BflFlux2Autoencoder {
        /// Number of `block_out_channels`.
        levels: usize,
    },
}

/// Where a parameter's values are in the checkpoint.
#[derive(Debug, Clone, PartialEq)]
struct Location {
    key: String,
    rows: Option<Range<usize>>,
    swap_halves: bool,
    /// Stored as a 1x1 convolution.
    pointwise: bool,
}

impl Layout {
    fn locate(self, key: &str) -> Option<Location> {
        let (module, parameter) = key.rsplit_once('.')?;
        let whole = |key: String| Location {
            key,
            rows: None,
            swap_halves: false,
            pointwise: false,
        };
        let transformer = |bfl: BflModule| {
            let parameter = if bfl.name.ends_with("_norm") {
                "scale"
            } else {
                parameter
            };
            Some(Location {
                rows: bfl.rows,
                swap_halves: bfl.swap_halves,
                ..whole(format!("{}.{parameter}", bfl.name))
            })
        };
        let autoencoder = |name: String| {
            let pointwise =
                parameter == "weight" && name.contains(".attn_1.") && !name.ends_with("norm");
            Some(Location {
                pointwise,
                ..whole(format!("{name}.{parameter}"))
            })
        };
        match self {
            Self::Diffusers | Self::T5 | Self::Clip | Self::Flux2Autoencoder => {
                Some(whole(key.into()))
            }
            Self::BflTransformer { hidden } => {
                transformer(keys::bfl_transformer_module(module, hidden)?)
            }
            Self::BflFlux2Transformer { hidden } => {
                transformer(flux2::keys::bfl_transformer_module(module, hidden)?)
            }
            Self::BflAutoencoder { levels } => {
                autoencoder(keys::bfl_autoencoder_module(module, levels)?)
            }
            Self::BflFlux2Autoencoder { levels } => {
                autoencoder(flux2::keys::bfl_autoencoder_module(module, levels)?)
            }
        }
    }

    /// Tensors that may be in a checkpoint without being used.
    fn ignores(self, key: &str) -> bool {
        match self {
            Self::T5 => key == "encoder.embed_tokens.weight", // the same tensor as shared.weight
            Self::Clip => {
                matches!(
                    key,
                    "text_model.embeddings.position_ids" | "text_projection.weight" | "logit_scale"
                )
            }
            Self::Flux2Autoencoder | Self::BflFlux2Autoencoder { .. } => {
                key == "bn.num_batches_tracked"
            }
            _ => false,
        }
    }
}

/// A checkpoint opened for one network: its tensors, without the prefix that an all-in-one file puts before them.
pub struct Checkpoint {
    tensors: TensorSet,
    /// Weights in few bits, by their name with prefix.
    quantised: BTreeMap<String, Stored>,
    /// To which of them a tensor belongs.
    parts: BTreeMap<String, String>,
    prefix: &'static str,
    path: PathBuf,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a shard index, or a component folder with either.
    ///
    /// # Errors
    /// Nothing to open, or a malformed file.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let file = if path.is_dir() {
            found::component_file(path)?
        } else {
            path.to_path_buf()
        };
        let tensors = TensorSet::open(&file)?;
        if let Some(program) = found::quantised(tensors.names()) {
            return Err(WeightsError::Unusable {
                path: file,
                what: format!(
                    "is quantised by {program}, which is not read here; take the bf16 or fp8 checkpoint, or one by bitsandbytes"
                ),
            });
        }
        let quantised = Stored::all(&tensors)?;
        let parts = quantised.iter().flat_map(|(weight, stored)| {
            stored
                .parts()
                .map(|part| (part.to_string(), weight.clone()))
        });
        let prefix = ["model.diffusion_model.", "diffusion_model."]
            .into_iter()
            .find(|prefix| tensors.names().any(|name| name.starts_with(prefix)))
            .unwrap_or_default();
        Ok(Self {
            tensors,
            parts: parts.collect(),
            quantised,
            prefix,
            path: file,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, without prefix.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors
            .names()
            .filter_map(|name| name.strip_prefix(self.prefix))
    }

    /// Shape of a tensor, by its name without prefix; of one in few bits, the shape that it stands for.
    pub(crate) fn shape(&self, key: &str) -> Option<&[usize]> {
        let name = format!("{}{key}", self.prefix);
        match self.quantised.get(&name) {
            Some(stored) => Some(stored.shape()),
            None => Some(&self.tensors.info(&name)?.shape),
        }
    }

    fn read(&self, location: &Location) -> Result<HostTensor, WeightsError> {
        let name = format!("{}{}", self.prefix, location.key);
        if let Some(stored) = self.quantised.get(&name) {
            let tensor = stored.read(&self.tensors, location.rows.clone())?;
            return Ok(HostTensor::from_f32(tensor.shape(), &tensor.to_f32()));
        }
        Ok(match &location.rows {
            Some(rows) => self.tensors.read_rows(&name, rows.clone())?,
            None => self.tensors.read(&name)?,
        })
    }

    /// The weight in few bits that a tensor belongs to, both without prefix.
    pub(crate) fn owner(&self, key: &str) -> Option<&str> {
        let weight = self.parts.get(&format!("{}{key}", self.prefix))?;
        weight.strip_prefix(self.prefix)
    }

    /// The transformer's layout, and its architecture as far as tensor shapes tell it.
    ///
    /// The rotary axes are in no tensor: they are those of `hint`, or FLUX's for a head width of 128.
    ///
    /// # Errors
    /// A file that holds no FLUX.1 transformer.
    pub fn transformer(
        &self,
        hint: Option<&FluxConfig>,
    ) -> Result<(Layout, FluxConfig), WeightsError> {
        let unknown = |reason: &str| WeightsError::UnknownLayout {
            path: self.path.clone(),
            what: "FLUX.1 transformer",
            reason: reason.into(),
        };
        for (key, model) in [
            ("double_stream_modulation_img.lin.weight", "it is FLUX.2"),
            ("distilled_guidance_layer.in_proj.weight", "it is Chroma"),
            ("input_blocks.0.0.weight", "it is Stable Diffusion"),
        ] {
            if self.shape(key).is_some() {
                return Err(unknown(model));
            }
        }
        let bfl = self.shape("img_in.weight").is_some();
        let dims = |bfl_key: &str, diffusers_key: &str| {
            let key = if bfl { bfl_key } else { diffusers_key };
            match self.shape(key) {
                Some(&[rows, columns]) => Ok((rows, columns)),
                _ => Err(unknown(&format!("it has no matrix `{key}`"))),
            }
        };
        let (hidden, in_channels) = dims("img_in.weight", "x_embedder.weight")?;
        let (_, joint_attention_dim) = dims("txt_in.weight", "context_embedder.weight")?;
        let (_, pooled_projection_dim) = dims(
            "vector_in.in_layer.weight",
            "time_text_embed.text_embedder.linear_1.weight",
        )?;
        let (out_channels, _) = dims("final_layer.linear.weight", "proj_out.weight")?;
        let norms = [
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "single_blocks.0.norm.query_norm.scale",
            "transformer_blocks.0.attn.norm_q.weight",
            "single_transformer_blocks.0.attn.norm_q.weight",
        ];
        let attention_head_dim = match norms.iter().find_map(|key| self.shape(key)) {
            Some(&[width]) if width > 0 && hidden % width == 0 => width,
            _ => return Err(unknown("its attention heads cannot be told from its norms")),
        };
        let (double, single) = if bfl {
            ("double_blocks.", "single_blocks.")
        } else {
            ("transformer_blocks.", "single_transformer_blocks.")
        };
        let axes_dims_rope = match hint {
            Some(config) => config.axes_dims_rope.clone(),
            None if attention_head_dim == 128 => vec![16, 56, 56],
            None => {
                return Err(unknown(&format!(
                    "the rotary axes of a head width of {attention_head_dim} are not known"
                )));
            }
        };
        let config = FluxConfig {
            patch_size: 1,
            in_channels,
            out_channels: (out_channels != in_channels).then_some(out_channels),
            num_layers: self.blocks(double),
            num_single_layers: self.blocks(single),
            attention_head_dim,
            num_attention_heads: hidden / attention_head_dim,
            joint_attention_dim,
            pooled_projection_dim,
            guidance_embeds: self.shape("guidance_in.in_layer.weight").is_some()
                || self
                    .shape("time_text_embed.guidance_embedder.linear_1.weight")
                    .is_some(),
            axes_dims_rope,
        };
        if let Some(reason) = config.problem() {
            return Err(unknown(&reason));
        }
        Ok((
            if bfl {
                Layout::BflTransformer { hidden }
            } else {
                Layout::Diffusers
            },
            config,
        ))
    }

    /// The autoencoder's layout, and its architecture as far as tensor shapes tell it.
    ///
    /// Groups and scale factors are in no tensor: they are those of `hint`, or FLUX's.
    ///
    /// # Errors
    /// A file that holds no autoencoder.
    pub fn autoencoder(
        &self,
        hint: Option<&AutoencoderConfig>,
    ) -> Result<(Layout, AutoencoderConfig), WeightsError> {
        let unknown = |reason: String| WeightsError::UnknownLayout {
            path: self.path.clone(),
            what: "autoencoder",
            reason,
        };
        let known = hint.cloned().unwrap_or_else(AutoencoderConfig::flux);
        if self.shape("encoder.down.0.block.0.conv1.weight").is_none() {
            return match self.shape("encoder.down_blocks.0.resnets.0.conv1.weight") {
                Some(_) => Ok((Layout::Diffusers, known)),
                None => Err(unknown("it has no encoder".into())),
            };
        }
        let channels = |key: String, axis: usize| match self.shape(&key) {
            Some(shape @ [_, _, _, _]) => Ok(shape[axis]),
            _ => Err(unknown(format!("it has no convolution `{key}`"))),
        };
        let levels = self.blocks("encoder.down.");
        let config = AutoencoderConfig {
            in_channels: channels("encoder.conv_in.weight".into(), 1)?,
            out_channels: channels("decoder.conv_out.weight".into(), 0)?,
            block_out_channels: (0..levels)
                .map(|level| channels(format!("encoder.down.{level}.block.0.conv1.weight"), 0))
                .collect::<Result<_, _>>()?,
            layers_per_block: self.blocks("encoder.down.0.block."),
            latent_channels: channels("decoder.conv_in.weight".into(), 1)?,
            use_quant_conv: false,
            use_post_quant_conv: false,
            mid_block_add_attention: self.shape("encoder.mid.attn_1.q.weight").is_some(),
            ..known
        };
        match config.problem() {
            Some(reason) => Err(unknown(reason)),
            None => Ok((Layout::BflAutoencoder { levels }, config)),
        }
    }

    /// One more than the largest index after `prefix`.
    pub(crate) fn blocks(&self, prefix: &str) -> usize {
        self.names()
            .filter_map(|name| {
                name.strip_prefix(prefix)?
                    .split('.')
                    .next()?
                    .parse::<usize>()
                    .ok()
            })
            .max()
            .map_or(0, |index| index.saturating_add(1))
    }

    /// Fills `module` with this checkpoint's values as f32 on `device`, without gradients.
    ///
    /// # Errors
    /// A tensor that is missing, left over, of another shape, or not finite.
    pub fn load<M: Module>(
        &self,
        module: M,
        layout: Layout,
        device: &Device,
    ) -> Result<M, WeightsError> {
        let mut load = Load::new(self, layout, device);
        let module = module.map(&mut load);
        if let Some(error) = load.error {
            return Err(error);
        }
        let unused: Vec<&str> = self.names().filter(|key| !load.is_used(key)).collect();
        match unused.first() {
            None => Ok(module),
            Some(key) => Err(WeightsError::Leftover {
                path: self.path.clone(),
                key: key.to_string(),
                count: unused.len(),
            }),
        }
    }

    /// Fills `module`, which is the part at `path` of the network in this checkpoint; other tensors are not looked at.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or not finite.
    pub(crate) fn load_part<M: Module>(
        &self,
        module: M,
        path: &str,
        device: &Device,
    ) -> Result<M, WeightsError> {
        let mut load = Load::new(self, Layout::Diffusers, device);
        load.walk.path.extend(path.split('.').map(String::from));
        let module = module.map(&mut load);
        match load.error {
            None => Ok(module),
            Some(error) => Err(error),
        }
    }

    /// One row of the matrix `key`, as f32.
    ///
    /// # Errors
    /// No such row, or a value that is not finite.
    pub(crate) fn row(&self, key: &str, row: usize) -> Result<Vec<f32>, WeightsError> {
        let location = Location {
            key: key.into(),
            rows: Some(row..row + 1),
            swap_halves: false,
            pointwise: false,
        };
        let values = self.read(&location)?.to_f32();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(WeightsError::NotFinite {
                path: self.path.clone(),
                key: key.into(),
                index: row * values.len() + index,
            }),
        }
    }
}

/// Path and owner of the parameter a walk is at.
#[derive(Default)]
struct Walk {
    path: Vec<String>,
    owner: Vec<String>,
}

impl Walk {
    fn enter(&mut self, name: &str, container: &str) {
        self.path.push(name.into());
        self.owner.push(container.into());
    }

    fn exit(&mut self) {
        self.path.pop();
        self.owner.pop();
    }

    /// The parameter's key in diffusers' layout.
    fn key(&self) -> String {
        let mut path = self.path.clone();
        if let Some(last) = path.last_mut() {
            match last.as_str() {
                "gamma" => *last = "weight".into(),
                "beta" => *last = "bias".into(),
                _ => {}
            }
        }
        path.join(".")
    }

    /// Burn keeps `[in, out]` where checkpoints keep `[out, in]`.
    fn is_transposed(&self, rank: usize) -> bool {
        rank == 2
            && self
                .owner
                .last()
                .is_some_and(|owner| owner == "Struct:Linear")
    }

    /// The shape the checkpoint gives this parameter.
    fn stored_shape(&self, shape: &[usize]) -> Vec<usize> {
        let mut shape = shape.to_vec();
        if self.is_transposed(shape.len()) {
            shape.reverse();
        }
        shape
    }
}

struct Load<'a> {
    checkpoint: &'a Checkpoint,
    layout: Layout,
    device: &'a Device,
    walk: Walk,
    /// Checkpoint key to the rows that were read.
    used: BTreeMap<String, usize>,
    error: Option<WeightsError>,
}

impl<'a> Load<'a> {
    fn new(checkpoint: &'a Checkpoint, layout: Layout, device: &'a Device) -> Self {
        Self {
            checkpoint,
            layout,
            device,
            walk: Walk::default(),
            used: BTreeMap::new(),
            error: None,
        }
    }

    fn is_used(&self, key: &str) -> bool {
        let key = self.checkpoint.owner(key).unwrap_or(key);
        let all = |used: &usize| {
            self.checkpoint
                .shape(key)
                .is_none_or(|s| s.first().is_none_or(|rows| used == rows))
        };
        self.used.get(key).is_some_and(all) || key == "scaled_fp8" || self.layout.ignores(key)
    }

    fn values(&mut self, shape: &[usize]) -> Result<Vec<f32>, WeightsError> {
        let key = self.walk.key();
        let path = || self.checkpoint.path.clone();
        let mut location = self
            .layout
            .locate(&key)
            .ok_or_else(|| WeightsError::Missing {
                path: path(),
                key: key.clone(),
            })?;
        if self.layout == Layout::T5
            && key == "shared.weight"
            && self.checkpoint.shape(&key).is_none()
        {
            location.key = "encoder.embed_tokens.weight".into();
        }
        let found = self
            .checkpoint
            .shape(&location.key)
            .ok_or_else(|| WeightsError::Missing {
                path: path(),
                key: location.key.clone(),
            })?
            .to_vec();
        let expected = self.walk.stored_shape(shape);
        let mut available = found.clone();
        if location.pointwise && found.ends_with(&[1, 1]) && found.len() == 4 {
            available.truncate(2);
        }
        if let (Some(rows), Some(first)) = (&location.rows, available.first_mut()) {
            if rows.end > *first {
                return Err(WeightsError::Shape {
                    path: path(),
                    key: location.key,
                    expected,
                    found,
                });
            }
            *first = rows.len();
        }
        if available != expected {
            return Err(WeightsError::Shape {
                path: path(),
                key: location.key,
                expected,
                found,
            });
        }
        let mut tensor = self.checkpoint.read(&location)?;
        let rows = tensor.shape.first().copied().unwrap_or(1);
        *self.used.entry(location.key.clone()).or_default() += rows;
        tensor.shape = expected;
        if location.swap_halves {
            let half = tensor.bytes.len() / 2;
            tensor.bytes.rotate_left(half);
        }
        if self.walk.is_transposed(shape.len()) {
            tensor = tensor.transposed();
        }
        let values = tensor.to_f32();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(WeightsError::NotFinite {
                path: path(),
                key: location.key,
                index,
            }),
        }
    }
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.walk.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.walk.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let shape = param.lazy_shape().to_vec();
        match self.values(&shape) {
            Ok(values) => {
                let tensor = Tensor::from_data(TensorData::new(values, shape), self.device);
                Param::initialized(param.id, tensor)
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

/// Name and shape of every tensor a checkpoint of `module` must hold; allocates no weight.
pub fn checkpoint_tensors<M: Module>(module: &M, layout: Layout) -> BTreeMap<String, Vec<usize>> {
    struct Expect {
        layout: Layout,
        walk: Walk,
        tensors: BTreeMap<String, Vec<usize>>,
    }
    impl ModuleVisitor for Expect {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let mut shape = self.walk.stored_shape(param.lazy_shape().as_slice());
            let Some(location) = self.layout.locate(&self.walk.key()) else {
                return;
            };
            if location.pointwise {
                shape.extend([1, 1]);
            }
            let fused = self.tensors.entry(location.key).or_insert_with(|| {
                let mut empty = shape.clone();
                empty[0] = 0;
                empty
            });
            fused[0] += shape[0];
        }
    }
    let mut expect = Expect {
        layout,
        walk: Walk::default(),
        tensors: BTreeMap::new(),
    };
    module.visit(&mut expect);
    expect.tensors
}

/// Values of the parameters whose diffusers key `wanted` picks, in the checkpoint's shape.
pub fn tensors_of<M: Module>(
    module: &M,
    wanted: impl Fn(&str) -> bool,
) -> BTreeMap<String, HostTensor> {
    struct Collect<F> {
        wanted: F,
        walk: Walk,
        tensors: BTreeMap<String, HostTensor>,
    }
    impl<F: Fn(&str) -> bool> ModuleVisitor for Collect<F> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.exit();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let key = self.walk.key();
            if (self.wanted)(&key) {
                let tensor = lora_core::state::host_tensor(param.val());
                let tensor = if self.walk.is_transposed(D) {
                    tensor.transposed()
                } else {
                    tensor
                };
                self.tensors.insert(key, tensor);
            }
        }
    }
    let mut collect = Collect {
        wanted,
        walk: Walk::default(),
        tensors: BTreeMap::new(),
    };
    module.visit(&mut collect);
    collect.tensors
}

/// Adds `strength * values` to parameters by their diffusers key, or replaces them where the flag says so; values are in the
/// checkpoint's shape. Also returns the keys that name no parameter of that shape.
pub fn change_parameters<M: Module>(
    module: M,
    changes: BTreeMap<String, (bool, HostTensor)>,
    strength: f64,
) -> (M, Vec<String>) {
    struct Edit {
        walk: Walk,
        changes: BTreeMap<String, (bool, HostTensor)>,
        strength: f64,
    }
    impl ModuleMapper for Edit {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.walk.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.walk.exit();
        }
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let key = self.walk.key();
            let shape = param.lazy_shape().to_vec();
            let stored = self.walk.stored_shape(&shape);
            if self
                .changes
                .get(&key)
                .is_none_or(|(_, values)| values.shape != stored)
            {
                return param;
            }
            let Some((replace, values)) = self.changes.remove(&key) else {
                return param;
            };
            let values = if self.walk.is_transposed(D) {
                values.transposed()
            } else {
                values
            };
            let base = param.base();
            let values =
                Tensor::<D>::from_data(TensorData::new(values.to_f32(), shape), &base.device());
            let changed = if replace {
                values
            } else {
                base + values.mul_scalar(self.strength)
            };
            Param::initialized(param.id, changed.detach().set_require_grad(false))
        }
    }
    let mut edit = Edit {
        walk: Walk::default(),
        changes,
        strength,
    };
    let module = module.map(&mut edit);
    (module, edit.changes.into_keys().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::autoencoder::Autoencoder;
    use crate::flux1::transformer::FluxTransformer;
    use crate::text::clip::{ClipConfig, ClipText};
    use crate::text::t5::{T5Config, T5Encoder};

    fn count(tensors: &BTreeMap<String, Vec<usize>>) -> (usize, usize) {
        (
            tensors.len(),
            tensors
                .values()
                .map(|shape| shape.iter().product::<usize>())
                .sum(),
        )
    }

    /// Tensors and parameters of a full-size transformer in both layouts; nothing is allocated.
    fn transformer(config: &FluxConfig) -> ((usize, usize), (usize, usize)) {
        let model = FluxTransformer::new(config, &Device::flex());
        let bfl = Layout::BflTransformer {
            hidden: config.hidden_size(),
        };
        (
            count(&checkpoint_tensors(&model, Layout::Diffusers)),
            count(&checkpoint_tensors(&model, bfl)),
        )
    }

    #[test]
    fn full_size_transformers_have_the_tensors_of_the_published_files() {
        for (name, config, parameters, tensors) in [
            (
                "dev, Krea, Kontext, Redux",
                FluxConfig::dev(),
                11_901_408_320,
                (1160, 780),
            ),
            (
                "schnell",
                FluxConfig::schnell(),
                11_891_178_560,
                (1156, 776),
            ),
            (
                "Canny, Depth",
                FluxConfig::control(),
                11_901_604_928,
                (1160, 780),
            ),
            ("Fill", FluxConfig::fill(), 11_902_391_360, (1160, 780)),
        ] {
            let found = transformer(&config);
            assert_eq!(
                found,
                ((tensors.0, parameters), (tensors.1, parameters)),
                "{name}"
            );
        }
    }

    #[test]
    fn names_and_shapes_in_both_layouts() {
        let model = FluxTransformer::new(&FluxConfig::dev(), &Device::flex());
        let diffusers = checkpoint_tensors(&model, Layout::Diffusers);
        let bfl = checkpoint_tensors(&model, Layout::BflTransformer { hidden: 3072 });
        for (tensors, key, shape) in [
            (&diffusers, "x_embedder.weight", vec![3072, 64]),
            (&diffusers, "context_embedder.weight", vec![3072, 4096]),
            (
                &diffusers,
                "time_text_embed.guidance_embedder.linear_1.weight",
                vec![3072, 256],
            ),
            (
                &diffusers,
                "time_text_embed.text_embedder.linear_1.weight",
                vec![3072, 768],
            ),
            (
                &diffusers,
                "transformer_blocks.18.norm1_context.linear.weight",
                vec![18432, 3072],
            ),
            (
                &diffusers,
                "transformer_blocks.0.attn.to_out.0.bias",
                vec![3072],
            ),
            (
                &diffusers,
                "transformer_blocks.0.attn.norm_added_k.weight",
                vec![128],
            ),
            (
                &diffusers,
                "transformer_blocks.0.ff.net.0.proj.weight",
                vec![12288, 3072],
            ),
            (
                &diffusers,
                "transformer_blocks.0.ff_context.net.2.weight",
                vec![3072, 12288],
            ),
            (
                &diffusers,
                "single_transformer_blocks.37.proj_out.weight",
                vec![3072, 15360],
            ),
            (&diffusers, "norm_out.linear.weight", vec![6144, 3072]),
            (&diffusers, "proj_out.weight", vec![64, 3072]),
            (&bfl, "img_in.weight", vec![3072, 64]),
            (
                &bfl,
                "double_blocks.0.img_attn.qkv.weight",
                vec![9216, 3072],
            ),
            (
                &bfl,
                "double_blocks.18.txt_attn.norm.query_norm.scale",
                vec![128],
            ),
            (&bfl, "double_blocks.3.txt_mlp.2.weight", vec![3072, 12288]),
            (&bfl, "single_blocks.37.linear1.weight", vec![21504, 3072]),
            (&bfl, "single_blocks.0.linear1.bias", vec![21504]),
            (&bfl, "single_blocks.0.linear2.weight", vec![3072, 15360]),
            (
                &bfl,
                "single_blocks.5.modulation.lin.weight",
                vec![9216, 3072],
            ),
            (
                &bfl,
                "final_layer.adaLN_modulation.1.weight",
                vec![6144, 3072],
            ),
            (&bfl, "guidance_in.out_layer.bias", vec![3072]),
        ] {
            assert_eq!(tensors.get(key), Some(&shape), "{key}");
        }
    }

    #[test]
    fn full_size_encoders_have_the_tensors_of_the_published_files() {
        let device = Device::flex();
        let clip = ClipText::new(&ClipConfig::clip_l(), &device);
        assert_eq!(
            count(&checkpoint_tensors(&clip, Layout::Clip)),
            (196, 123_060_480)
        );
        let t5 = T5Encoder::new(&T5Config::xxl(), &device);
        let tensors = checkpoint_tensors(&t5, Layout::T5);
        assert_eq!(count(&tensors), (219, 4_762_310_656));
        assert_eq!(
            tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"],
            [32, 64]
        );
        assert_eq!(
            tensors["encoder.block.23.layer.1.DenseReluDense.wi_1.weight"],
            [10240, 4096]
        );

        let vae = Autoencoder::new(&AutoencoderConfig::flux(), &device);
        let diffusers = checkpoint_tensors(&vae, Layout::Diffusers);
        let bfl = checkpoint_tensors(&vae, Layout::BflAutoencoder { levels: 4 });
        assert_eq!(count(&diffusers), (244, 83_819_683));
        assert_eq!(count(&bfl), (244, 83_819_683));
        for (tensors, key, shape) in [
            (
                &diffusers,
                "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
                vec![256, 128, 1, 1],
            ),
            (
                &diffusers,
                "decoder.up_blocks.2.resnets.0.conv1.weight",
                vec![256, 512, 3, 3],
            ),
            (
                &diffusers,
                "decoder.mid_block.attentions.0.to_out.0.weight",
                vec![512, 512],
            ),
            (
                &bfl,
                "encoder.down.1.block.0.nin_shortcut.weight",
                vec![256, 128, 1, 1],
            ),
            (
                &bfl,
                "decoder.up.1.block.0.conv1.weight",
                vec![256, 512, 3, 3],
            ),
            (
                &bfl,
                "decoder.up.3.upsample.conv.weight",
                vec![512, 512, 3, 3],
            ),
            (
                &bfl,
                "decoder.mid.attn_1.proj_out.weight",
                vec![512, 512, 1, 1],
            ),
            (&bfl, "encoder.mid.block_2.norm1.weight", vec![512]),
            (&bfl, "decoder.conv_out.weight", vec![3, 128, 3, 3]),
        ] {
            assert_eq!(tensors.get(key), Some(&shape), "{key}");
        }
    }
}
