//! What training, sampling and reference cases may ask of a family of models.
//!
//! [`Network`] is the velocity network as a chain of blocks, [`Family`] an opened pipeline with the rules that hold between
//! its parts. FLUX.1 is [`flux1`](crate::flux1); [`families`](crate::families) finds out of which family a folder is.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use lora_core::files::host::HostTensor;
use serde_json::Value;

use crate::error::WeightsError;
use crate::lora::{Component, ModelShape};
pub use crate::network::{Network, Sees, Velocity};
use crate::network_config::NetworkConfig;
use crate::pipeline::PipelineFolder;
use crate::scheduler::SchedulerConfig;
use crate::weights::{Base, BaseDtype, KeptWeights, Sizes, Stream};

/// The networks that read a prompt, with their tokenizers.
pub trait TextEncoders: Sized {
    /// How many prompts are best encoded together: more than one where the weights are read anew for every call.
    const AT_ONCE: usize;

    /// Every prompt as the tensors [`Family::TEXT`] names, each `[1, ...]`; a longer prompt is cut at `max_sequence_length`
    /// tokens.
    ///
    /// # Errors
    /// A prompt that a tokenizer refuses, a token that an encoder does not know, or weights that cannot be read.
    fn encode(
        &self,
        prompts: &[&str],
        max_sequence_length: usize,
        device: &Device,
    ) -> Result<Vec<Vec<HostTensor>>, WeightsError>;

    /// Changes every network that a LoRA can name.
    ///
    /// # Errors
    /// What `change` returns.
    fn adapt<C: Adapt>(self, change: &C) -> Result<Self, C::Error>;
}

/// Text encoders of a pipeline that are in memory as one module, to be trained with the velocity network. A parameter's path
/// begins with the folder of its encoder, as keys of diffusers' LoRA files do.
pub trait TextModules: Module {
    /// A prompt as the tokens of every encoder.
    type Tokens: Clone + Debug + Send;
    /// Encoded prompts.
    type Text;

    /// Prompts, one row each, as these encoders read them now; `encoded` is what [`TextEncoders::encode`] gives, for what is of an
    /// encoder that is not in here, and may be empty if all are.
    ///
    /// # Errors
    /// Weights that cannot be read.
    fn text(
        &self,
        tokens: &[Self::Tokens],
        encoded: &[HostTensor],
        device: &Device,
    ) -> Result<Self::Text, WeightsError>;

    /// Changes every encoder.
    ///
    /// # Errors
    /// What `change` returns.
    fn adapt<C: Adapt>(self, change: &C) -> Result<Self, C::Error>;

    /// Their architectures.
    fn shape(&self) -> ModelShape;
}

/// Reads a prompt as tokens, of which `max_sequence_length` are kept; an error if a tokenizer refuses it.
pub type Tokenizer<T> = Box<dyn Fn(&str, usize) -> Result<T, WeightsError> + Send + Sync>;

/// How long a prompt is for the text encoders when nothing of it is cut, the tokens put around it included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenCount {
    /// Tokens of the sequence, of which `max_sequence_length` are read.
    pub sequence: usize,
    /// How many tokens a pooled vector is of, where the prompt has more of them.
    pub beyond_pooled: Option<usize>,
}

/// Counts the tokens of a prompt; an error if a tokenizer refuses it.
pub type TokenCounter = Box<dyn Fn(&str) -> Result<TokenCount, WeightsError>>;

/// A change of a network of any type, such as attaching a LoRA.
pub trait Adapt {
    /// Why it cannot be made.
    type Error: From<WeightsError>;

    /// Whether it changes the weights of `component` themselves, which have to be in memory for that.
    fn changes_weights(&self, component: Component) -> bool;

    /// The network of `component`, changed.
    ///
    /// # Errors
    /// See [`Error`](Self::Error).
    fn adapt<M: Module>(&self, component: Component, module: M) -> Result<M, Self::Error>;
}

/// Pictures that a network reads beside noisy tokens and prompts; without any, it makes an image of the prompt alone.
#[derive(Debug, Clone, Default)]
pub struct Condition {
    /// Reference pictures as clean tokens, `[batch, tokens, channels]`, each with its grid; they follow the noisy tokens.
    pub references: Vec<(Tensor<3>, [usize; 2])>,
    /// Further channels of the noisy tokens, `[batch, img_tokens, channels]`, see [`Family::fill_channels`].
    pub channels: Option<Tensor<3>>,
}

impl Condition {
    /// Tokens of all references.
    pub(crate) fn reference_tokens(&self) -> usize {
        let tokens = self.references.iter().map(|(tokens, _)| tokens.dims()[1]);
        tokens.sum()
    }

    /// The noisy tokens with their further channels, then the references.
    pub(crate) fn with(self, noisy: Tensor<3>) -> Tensor<3> {
        let noisy = match self.channels {
            Some(channels) => Tensor::cat(vec![noisy, channels], 2),
            None => noisy,
        };
        if self.references.is_empty() {
            return noisy;
        }
        let references = self.references.into_iter().map(|(tokens, _)| tokens);
        Tensor::cat([noisy].into_iter().chain(references).collect(), 1)
    }
}

/// How a network was trained to read reference pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadsReferences {
    /// As clean tokens behind the noisy ones, which is what is done here.
    BehindNoise,
    /// Not at all; it can learn to.
    NotTrained,
    /// In a way that is not done here; why, and what to take instead.
    OtherWay(&'static str),
}

/// How a reference picture is brought to whole tokens, as the pipeline in diffusers does it: resized, its aspect kept or not, then
/// cut in the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReferenceFit {
    /// Width and height in pixels that it is resized to.
    pub resized: [u32; 2],
    /// Width and height in pixels that are left.
    pub cropped: [u32; 2],
}

/// Steps and guidance that an image is made with where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Steps from noise to image.
    pub num_inference_steps: usize,
    /// Guidance strength.
    pub guidance_scale: f32,
}

/// A file of weights below a pipeline folder, and name and shape of every tensor in it.
pub type ComponentFile = (&'static str, BTreeMap<String, Vec<usize>>);

/// An opened pipeline of one family.
///
/// *Model space* is where the network sees latents, `[batch, channels, height, width]`; a *grid* is the height and width
/// there.
pub trait Family: Sized + Debug + Sync {
    /// The velocity network.
    type Network: Network;
    /// Its configuration.
    type Config: NetworkConfig<Network = Self::Network>;
    /// What reads prompts.
    type TextEncoders: TextEncoders;
    /// Those of them that can be trained.
    type TextModules: TextModules<Text = Self::Text>;
    /// Pixels to latents and back.
    type Autoencoder: Debug;
    /// An encoded prompt on a device.
    type Text: Clone + Debug;

    /// The family's name, for people.
    const NAME: &'static str;
    /// Folders of the pipeline that decide what a prompt becomes.
    const TEXT_FOLDERS: &'static [&'static str];
    /// Names of the tensors that a prompt becomes, as diffusers' pipelines call them.
    const TEXT: &'static [&'static str];
    /// The text encoders that can be trained.
    const TRAINABLE_TEXT: &'static [Component];
    /// Path endings of the layers that a LoRA adapts when none are named: those of diffusers' training script.
    const TARGETS: &'static [&'static str];
    /// Names of the tensors that an image becomes.
    const LATENTS: &'static [&'static str];

    /// Reads the configurations that the rules below need.
    ///
    /// # Errors
    /// One that is missing, or describes no pipeline of this family.
    fn open(folder: PipelineFolder) -> Result<Self, WeightsError>;

    /// The architectures that a folder states, as far as LoRA files are read against them.
    ///
    /// # Errors
    /// A configuration that is missing or describes no network.
    fn shape(folder: &PipelineFolder) -> Result<ModelShape, WeightsError>;

    /// Files of weights that a complete pipeline has beside its configurations, and the tensors in each; nothing is allocated on
    /// `device`.
    ///
    /// # Errors
    /// As [`shape`](Self::shape).
    fn weights(
        folder: &PipelineFolder,
        device: &Device,
    ) -> Result<Vec<ComponentFile>, WeightsError>;

    /// Where its parts are.
    fn folder(&self) -> &PipelineFolder;

    /// Architectures and schedule in lines, for people.
    ///
    /// # Errors
    /// As [`shape`](Self::shape).
    fn describe(&self) -> Result<String, WeightsError>;

    /// Loads the velocity network, its base weights held as `base` says.
    ///
    /// # Errors
    /// A malformed file, or a tensor that is missing, left over or of another shape.
    fn network(&self, base: Base, device: &Device) -> Result<Self::Network, WeightsError> {
        let path = self.folder().transformer_path();
        Self::Config::load(path, self.stated().as_ref(), base, device)
    }

    /// As [`network`](Self::network), with the weights that `kept` has taken from there: what [`Stream::keep`] of
    /// [`to_keep`](Self::to_keep) made of this network.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    fn network_with(
        &self,
        base: Base,
        kept: Option<KeptWeights>,
        device: &Device,
    ) -> Result<Self::Network, WeightsError> {
        let path = self.folder().transformer_path();
        let (checkpoint, layout, config) = Self::Config::open(path, self.stated().as_ref())?;
        let checkpoint = checkpoint.keeping(kept);
        checkpoint.load_network(config.network(device), layout, base, device)
    }

    /// The velocity network's blocks, whose weights are to be kept in few bits.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    fn to_keep(&self, base: BaseDtype, device: &Device) -> Result<Stream, WeightsError> {
        let path = self.folder().transformer_path();
        let (checkpoint, layout, config) = Self::Config::open(path, self.stated().as_ref())?;
        let (_, stream) =
            checkpoint.stream_network(config.network(device), layout, base, device)?;
        Ok(stream)
    }

    /// What the folder states of the velocity network, where it does.
    fn stated(&self) -> Option<Self::Config> {
        transformer_config(self.folder()).ok()
    }

    /// The velocity network as configurations and headers describe it, without a weight: for what can be checked before it is
    /// loaded. Its parameters have shapes, and must not be asked for values.
    ///
    /// # Errors
    /// As [`network`](Self::network), as far as headers show it.
    fn outline(&self, device: &Device) -> Result<Self::Network, WeightsError> {
        let path = self.folder().transformer_path();
        let (_, _, config) = Self::Config::open(path, self.stated().as_ref())?;
        Ok(config.network(device))
    }

    /// Sizes of the velocity network, its base weights kept as `base` says.
    ///
    /// # Errors
    /// As [`outline`](Self::outline).
    fn sizes(&self, base: BaseDtype, device: &Device) -> Result<Sizes, WeightsError> {
        let path = self.folder().transformer_path();
        let (checkpoint, layout, config) = Self::Config::open(path, self.stated().as_ref())?;
        Ok(checkpoint.sizes(&config.network(device), layout, base, device))
    }

    /// The network of an architecture as `config.json` says it, with lazily initialised weights.
    ///
    /// # Errors
    /// What describes no network of this family, in words.
    fn new_network(config: Value, device: &Device) -> Result<Self::Network, String> {
        Ok(Self::Config::parse(config)?.network(device))
    }

    /// Loads a velocity network from a component folder or a single file, whose tensors must be those of the architecture
    /// that `config` states; all of it, its matrices as `dtype`.
    ///
    /// # Errors
    /// As [`network`](Self::network), or tensors of another architecture.
    fn network_at(
        path: &Path,
        config: Option<&Value>,
        dtype: BaseDtype,
        device: &Device,
    ) -> Result<Self::Network, WeightsError> {
        let mismatch = |reason| WeightsError::Config {
            path: path.into(),
            reason,
        };
        let stated = config.cloned().map(Self::Config::parse).transpose();
        let stated = stated.map_err(mismatch)?;
        let (checkpoint, layout, found) = Self::Config::open(path, stated.as_ref())?;
        match stated.and_then(|stated| stated.difference(&found)) {
            Some(reason) => Err(mismatch(reason)),
            None => checkpoint.load(found.network(device), layout, dtype, device),
        }
    }

    /// What to train instead, where this network was distilled to few steps: those are lost, or what is learned does not show.
    fn distilled_from(&self) -> Option<String> {
        None
    }

    /// How the pipeline is meant to be sampled.
    fn sampling(&self) -> Sampling;

    /// Whether `network` paints where a mask says: then it reads [`fill_channels`](Self::fill_channels), always.
    fn reads_mask(&self, _: &Self::Network) -> bool {
        false
    }

    /// How the pipeline's network was trained to read reference pictures.
    fn reads_references(&self) -> ReadsReferences;

    /// What sampling makes of a reference picture of this size.
    fn reference_fit(&self, width_px: u32, height_px: u32) -> ReferenceFit;

    /// Why `network` cannot be run here, if so.
    fn problem(&self, network: &Self::Network) -> Option<String>;

    /// Loads the autoencoder.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    fn autoencoder(&self, device: &Device) -> Result<Self::Autoencoder, WeightsError> {
        self.autoencoder_at(self.folder().autoencoder_path(), device)
    }

    /// Loads another autoencoder for the same latents, a component folder or a single file.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    fn autoencoder_at(
        &self,
        path: &Path,
        device: &Device,
    ) -> Result<Self::Autoencoder, WeightsError>;

    /// Why the autoencoder at `path` does not decode this pipeline's latents, as far as configurations and headers tell.
    ///
    /// # Errors
    /// A folder or file that is missing or holds no autoencoder.
    fn preview_problem(&self, path: &Path) -> Result<Option<String>, WeightsError>;

    /// Loads the text encoders.
    ///
    /// # Errors
    /// As [`network`](Self::network), or a tokenizer that cannot be read.
    fn text_encoders(&self, device: &Device) -> Result<Self::TextEncoders, WeightsError>;

    /// Loads these text encoders with all of their weights, as they are stored; without any, as [`outline`](Self::outline) does, if
    /// `is_outline`.
    ///
    /// # Errors
    /// As [`network`](Self::network).
    fn text_modules(
        &self,
        components: &[Component],
        is_outline: bool,
        device: &Device,
    ) -> Result<Self::TextModules, WeightsError>;

    /// Loads the tokenizers alone, to read prompts for [`text_modules`](Self::text_modules).
    ///
    /// # Errors
    /// A tokenizer that cannot be read.
    fn tokenizer(
        &self,
    ) -> Result<Tokenizer<<Self::TextModules as TextModules>::Tokens>, WeightsError>;

    /// Loads the tokenizers alone, to count the tokens of prompts.
    ///
    /// # Errors
    /// A tokenizer that cannot be read.
    fn token_counter(&self) -> Result<TokenCounter, WeightsError>;

    /// The files whose bytes decide what prompts and images become.
    fn encoder_paths(&self) -> Vec<PathBuf> {
        let folder = self.folder();
        let text = Self::TEXT_FOLDERS
            .iter()
            .map(|name| folder.root().join(name));
        text.chain([folder.autoencoder_path().into()]).collect()
    }

    /// Encoded prompts, one row each, on `device`.
    fn text(parts: Vec<HostTensor>, device: &Device) -> Self::Text;

    /// The prompt that sampling steers away from at this guidance scale, where the network runs twice a step.
    fn negative_prompt(&self, guidance_scale: f32) -> Option<&'static str>;

    /// An image `[1, 3, height, width]` in `[-1, 1]` as the tensors [`LATENTS`](Self::LATENTS) names, each `[1, ...]`; the
    /// first has the shape of model space.
    fn encode_image(autoencoder: &Self::Autoencoder, image: Tensor<4>) -> Vec<HostTensor>;

    /// The latents of an encoded image in model space; `normals` gives as many standard normals as it is asked for.
    fn latents(&self, parts: &[HostTensor], normals: impl FnOnce(usize) -> Vec<f32>) -> Vec<f32>;

    /// The latents of an encoded image at the distribution's mean: a picture that nothing is added to.
    fn clean_latents(&self, parts: &[HostTensor]) -> Vec<f32> {
        self.latents(parts, |count| vec![0.0; count])
    }

    /// What a network that [reads a mask](Self::reads_mask) gets: tokens of a picture that is 0 where the mask is 1, and of the
    /// mask, side by side.
    ///
    /// # Shapes
    /// - `masked`: model space; `mask`: pixels, `[batch, 1, height, width]`, 1 where the picture is to be painted
    /// # Source
    /// diffusers 0.38 `FluxFillPipeline.prepare_mask_latents`.
    fn fill_channels(masked: Tensor<4>, mask: Tensor<4>) -> Tensor<3> {
        let [batch, _, height, width] = masked.dims();
        let side = mask.dims()[2] / height;
        let mask = mask
            .reshape([batch, height, side, width, side])
            .permute([0, 2, 4, 1, 3]) // (b, side, side, height, width)
            .reshape([batch, side * side, height, width]);
        Tensor::cat(vec![Self::pack(masked), Self::pack(mask)], 2)
    }

    /// Latents of model space as an image, `[batch, 3, height, width]`, roughly in `[-1, 1]`.
    fn decode(autoencoder: &Self::Autoencoder, latents: Tensor<4>) -> Tensor<4>;

    /// Pixels on which the sides of an image must lie; smaller ones have no latents.
    fn pixel_step(&self) -> usize;

    /// Channels and grid of an image, whose sides are rounded down to the [`pixel_step`](Self::pixel_step).
    fn latent_shape(&self, height_px: usize, width_px: usize) -> [usize; 3];

    /// Tokens of a grid.
    fn image_tokens(grid: [usize; 2]) -> usize;

    /// Latents of model space as tokens, `[batch, img_tokens, channels of a token]`.
    fn pack(latents: Tensor<4>) -> Tensor<3>;

    /// The inverse of [`pack`](Self::pack).
    fn unpack(tokens: Tensor<3>, grid: [usize; 2]) -> Tensor<4>;

    /// What the network reads: noisy tokens of a grid, the prompts, a noise level in `[0, 1]` and a guidance strength for each
    /// row, and pictures beside them. It says the velocity of the noisy tokens alone.
    fn input(
        tokens: Tensor<3>,
        grid: [usize; 2],
        text: Self::Text,
        sigma: Vec<f32>,
        guidance: Vec<f32>,
        condition: Condition,
    ) -> <Self::Network as Velocity>::Input;

    /// The scheduler's configuration.
    fn scheduler(&self) -> &SchedulerConfig;

    /// Noise levels for `steps` steps, from 1 down, with a final 0.
    fn sigmas(&self, steps: usize, image_tokens: usize) -> Vec<f32>;

    /// Exponent of the shift by image size that training's `flux` shift applies.
    fn training_mu(&self, image_tokens: usize) -> f64;
}

/// The configuration of a folder's transformer.
pub(crate) fn transformer_config<C: NetworkConfig>(
    folder: &PipelineFolder,
) -> Result<C, WeightsError> {
    folder.config("transformer/config.json", C::problem)
}
