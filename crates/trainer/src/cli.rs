//! The command line, as clap reads it.

use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use flux_model::weights::Compute;

use crate::config::preset;
use crate::output::Output;

/// Fine-tune FLUX image models with LoRA; a stopped run resumes to the same bits.
#[derive(Debug, Parser)]
#[command(
    name = "flux-lora",
    version,
    after_help = "For people who work on this program there are also parity, bench and random-weights: see `flux-lora COMMAND --help`."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say warnings and the result alone
    #[arg(long, short, global = true, conflicts_with = "json")]
    pub quiet: bool,
    /// For programs: everything that is said is a JSON object, one a line, on stdout
    #[arg(long, global = true)]
    pub json: bool,
}

impl Cli {
    /// To whom the program speaks.
    pub fn output(&self) -> Output {
        match (self.quiet, self.json) {
            (true, _) => Output::Quiet,
            (_, true) => Output::Json,
            _ => Output::Person,
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a LoRA from a folder of pictures with captions
    #[command(
        after_help = "Examples:\n  flux-lora check cats.toml\n  flux-lora train cats.toml --output runs/cats\n  flux-lora train cats.toml --output runs/cats --resume\n  flux-lora train cats.toml --set optimizer.learning_rate=2e-4 --json | jq .loss"
    )]
    Train(TrainArgs),
    /// Encode the pictures and captions of a run, and train nothing
    Cache(CacheArgs),
    /// Make images from prompts, with LoRAs
    #[command(
        after_help = "Examples:\n  flux-lora sample --model /models/FLUX.1-dev --lora runs/cats/lora.safetensors=0.8 --prompt \"a cat\" --out cat.png\n  flux-lora sample --model black-forest-labs/FLUX.1-schnell --steps 4 --prompt \"a cat\" --out cat.png\n  flux-lora sample --model /models/FLUX.1-dev --lora cats.safetensors --compare --prompt \"a cat\" --prompt \"a dog\" --seed 1,2,3 --out grid.png"
    )]
    Sample(SampleArgs),
    /// Write a LoRA in another format
    #[command(
        after_help = "Examples:\n  flux-lora convert lora.safetensors lora-kohya.safetensors --to kohya\n  flux-lora convert runs/cats cats.safetensors --to all --dtype bf16"
    )]
    Convert(ConvertArgs),
    /// Add LoRAs to a pipeline on disk
    Merge {
        /// Pipeline folder, or a Hub repository, `OWNER/NAME[@REVISION]`
        #[arg(long)]
        model: PathBuf,
        /// Never touch the network: a Hub repository must be in the cache
        #[arg(long)]
        offline: bool,
        /// LoRA file or PEFT folder, with an optional weight
        #[arg(long, value_name = "FILE[=WEIGHT]", required = true)]
        lora: Vec<String>,
        /// New folder for the merged pipeline
        #[arg(long)]
        out: PathBuf,
    },
    /// Show what is in a LoRA file, a model folder, a run folder or a checkpoint
    Inspect {
        /// A .safetensors file or a folder
        path: PathBuf,
    },
    /// Check a run without starting it: data, targets, sizes, disk; exits with 0 if it would train
    Check(RunArgs),
    /// Write a run as one HTML page: curves, samples, configuration
    Report {
        /// Run folder
        run: PathBuf,
        /// File to write (default: report.html in the run folder)
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Serve the same page on this machine, live while the run goes
    #[command(after_help = "Examples:\n  flux-lora watch runs/cats")]
    Watch {
        /// Run folder
        run: PathBuf,
        /// Port on 127.0.0.1 (default: 8765, or any that is free)
        #[arg(long)]
        port: Option<u16>,
    },
    /// Show in what two runs differ: settings, data, curves, result
    Compare {
        /// Run folder
        a: PathBuf,
        /// Another run folder
        b: PathBuf,
    },
    /// Make a folder to upload of a finished run: LoRA, samples and a model card
    #[command(
        after_help = "Examples:\n  flux-lora export runs/cats --name cats --trigger \"sks cat\" --to diffusers,kohya"
    )]
    Export(ExportArgs),
    /// Print what completes commands in a shell
    #[command(
        after_help = "Examples:\n  flux-lora completions bash > ~/.local/share/bash-completion/completions/flux-lora\n  flux-lora completions zsh > ~/.zfunc/_flux-lora"
    )]
    Completions {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages, one for each command
    Man {
        /// Folder to write to
        folder: PathBuf,
    },
    /// Print the JSON schema of a run configuration, with which editors complete and explain its keys
    #[command(
        after_help = "Examples:\n  flux-lora schema > flux-lora.schema.json   # and `#:schema ./flux-lora.schema.json` as the first line of run.toml"
    )]
    Schema,
    /// Renew the tables of keys in docs/configuration.md
    #[command(hide = true)]
    Reference {
        /// The file
        file: PathBuf,
    },
    /// Run reference cases made with diffusers and PEFT, and compare
    #[command(hide = true)]
    Parity(ParityArgs),
    /// List what this binary can run on
    Devices,
    /// Time what the benchmarks in the documentation time
    #[command(subcommand, hide = true)]
    Bench(BenchCommand),
    /// Show what the bundled quickstart has learned: before-after.png, and two numbers
    #[command(hide = true)]
    Quickstart(QuickstartArgs),
    /// Fill a pipeline folder that has configurations but no weights with random weights
    #[command(hide = true)]
    RandomWeights {
        /// Folder with model_index.json, configurations and tokenizers
        folder: PathBuf,
        /// Folder to write the complete pipeline to
        #[arg(long)]
        out: PathBuf,
        /// Seed of the weights
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
}

impl Command {
    /// Whether networks are run, for more than a moment.
    pub fn runs_networks(&self) -> bool {
        use Command::{Bench, Cache, Parity, Quickstart, Sample, Train};
        matches!(
            self,
            Train(_) | Cache(_) | Sample(_) | Quickstart(_) | Parity(_) | Bench(_)
        )
    }
}

/// An argument that does not fit.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// What says which run is meant: all of `flux-lora check`, and the beginning of `flux-lora train` and `flux-lora cache`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Run configuration (TOML)
    pub config: PathBuf,
    /// Begin from a run preset: the configuration counts before it, and needs the paths alone
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(preset::names()))]
    pub preset: Option<String>,
    /// Device: flex, ndarray, wgpu, cuda; with an index as in cuda:1; several, as cuda:0,cuda:1 or flex,flex, share the passes
    /// of train.gradient_accumulation_steps (default: the first this binary contains)
    #[arg(long)]
    pub device: Option<String>,
    /// Run folder (default: runs/NAME for NAME.toml)
    #[arg(long)]
    pub output: Option<PathBuf>,
    /// Optimizer steps in the whole run, in place of train.steps
    #[arg(long)]
    pub steps: Option<u64>,
    /// Override one configuration value
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Train on a model that was distilled to few steps
    #[arg(long)]
    pub yes_distilled: bool,
    /// Never touch the network: a Hub repository must be in the cache
    #[arg(long)]
    pub offline: bool,
}

/// `flux-lora train`
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// The run.
    #[command(flatten)]
    pub run: RunArgs,
    /// Continue: the newest valid checkpoint of the run folder, or of the run folder or checkpoint given
    #[arg(long, value_name = "RUN_OR_CHECKPOINT", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Leave out images that cannot be read, instead of refusing the dataset; the run keeps the list as dataset.skip
    #[arg(long)]
    pub skip_bad: bool,
    /// Resume although binary, device or CPU features differ
    #[arg(long)]
    pub allow_inexact: bool,
    /// Resume although images, captions or the base model changed
    #[arg(long)]
    pub adopt_data: bool,
    /// Resume although settings changed that earlier steps depended on
    #[arg(long)]
    pub adopt_config: bool,
}

/// `flux-lora export`
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Run folder
    pub run: PathBuf,
    /// Folder to write (default: export in the run folder)
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Which weights of the run
    #[arg(long, value_enum, default_value_t = Which::Finished)]
    pub which: Which,
    /// Formats: diffusers, peft, kohya, comfyui or all (default: diffusers and kohya; of a LoHa or LoKr, all that can hold it)
    #[arg(long, value_delimiter = ',')]
    pub to: Vec<String>,
    /// Name of the files (default: the run folder's)
    #[arg(long)]
    pub name: Option<String>,
    /// Word in the captions that stands for what was learned (default: dataset.trigger_word)
    #[arg(long)]
    pub trigger: Option<String>,
    /// Repository of the base model, OWNER/NAME (default: as the configuration names it)
    #[arg(long)]
    pub base: Option<String>,
    /// Write into a folder that exists
    #[arg(long)]
    pub overwrite: bool,
}

/// Which weights of a run are exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// The LoRA that the run has ended in, lora.safetensors
    Finished,
    /// That of the best validation, best.safetensors
    Best,
    /// The weights of the newest checkpoint
    Last,
    /// The average of the weights that the newest checkpoint has
    Average,
}

/// `flux-lora cache`
#[derive(Debug, Args)]
pub struct CacheArgs {
    /// The run, whose cache is filled.
    #[command(flatten)]
    pub run: RunArgs,
    /// Leave out images that cannot be read, instead of refusing the dataset; the run keeps the list as dataset.skip
    #[arg(long)]
    pub skip_bad: bool,
}

/// `flux-lora sample`
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Pipeline folder, a single transformer file in one, or a Hub repository, `OWNER/NAME[@REVISION]`
    #[arg(long)]
    pub model: PathBuf,
    /// A single transformer file in place of the model's
    #[arg(long, value_name = "FILE")]
    pub transformer: Option<PathBuf>,
    /// LoRA file, with an optional weight
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    pub lora: Vec<String>,
    /// What to show; given several times, a grid is made with a column for each
    #[arg(long, required = true)]
    pub prompt: Vec<String>,
    /// Reference picture, for FLUX.2 and FLUX.1 Kontext: the prompt says what to do with it. May be given several times
    #[arg(long, value_name = "FILE")]
    pub reference: Vec<PathBuf>,
    /// Picture to start from; with --mask, for FLUX.1 Fill, to paint in
    #[arg(long, value_name = "FILE", conflicts_with = "reference")]
    pub image: Option<PathBuf>,
    /// How much of the picture to make anew, above 0 and at most 1 (default: 0.6)
    #[arg(long, requires = "image", conflicts_with = "mask")]
    pub strength: Option<f64>,
    /// Where to paint: what is white in this picture, which has the size of --image
    #[arg(long, value_name = "FILE", requires = "image")]
    pub mask: Option<PathBuf>,
    /// Denoising steps (default: 28, for FLUX.2 klein base and dev 50, for schnell and distilled klein 4)
    #[arg(long)]
    pub steps: Option<usize>,
    /// Guidance strength (default: 3.5, for Kontext 2.5, for Fill 30, for FLUX.2 klein base and dev 4)
    #[arg(long)]
    pub guidance: Option<f32>,
    /// Height in pixels (default: 1024, or that of the first --reference or --image, up to about a megapixel in all)
    #[arg(long)]
    pub height: Option<usize>,
    /// Width in pixels, likewise
    #[arg(long)]
    pub width: Option<usize>,
    /// Seed of the starting noise; several, as in 1,2,3, make a row of the grid each
    #[arg(long, value_delimiter = ',', default_value = "0")]
    pub seed: Vec<u64>,
    /// Show everything without the LoRAs too, in a row above
    #[arg(long, requires = "lora")]
    pub compare: bool,
    /// Longest prompt in tokens of the text encoder
    #[arg(long, default_value_t = 512)]
    pub max_sequence_length: usize,
    /// Image file to write: .png, .jpg or .webp; of several images the grid, and each beside it as NAME-1.png, NAME-2.png ...,
    /// row by row
    #[arg(long)]
    pub out: PathBuf,
    /// Replace image files that exist
    #[arg(long)]
    pub overwrite: bool,
    /// Device, as for train
    #[arg(long)]
    pub device: Option<String>,
    /// Never touch the network: a Hub repository must be in the cache
    #[arg(long)]
    pub offline: bool,
}

/// `flux-lora quickstart`
#[derive(Debug, Args)]
pub struct QuickstartArgs {
    /// Finished run of the quickstart
    pub run: PathBuf,
    /// Folder of gallery.png, thumbnails of all drawings, and things.txt
    #[arg(long)]
    pub gallery: PathBuf,
    /// Device, as for train
    #[arg(long)]
    pub device: Option<String>,
}

/// `flux-lora convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// LoRA file, or the folder of an adapter or a run, in any format
    pub input: PathBuf,
    /// File to write (folder for peft); with --to all, the format is added to the name
    pub output: PathBuf,
    /// Format: diffusers, peft, kohya, comfyui or all
    #[arg(long)]
    pub to: String,
    /// Element type of weights: f32, f16 or bf16 (default: as they are)
    #[arg(long)]
    pub dtype: Option<String>,
    /// Leave out what the format cannot hold, and say so, instead of failing
    #[arg(long)]
    pub lossy: bool,
    /// Overwrite an output that exists
    #[arg(long, alias = "force")]
    pub overwrite: bool,
    /// Model the LoRA is for, as for sample (default: sizes are taken from the file)
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Never touch the network: a Hub repository must be in the cache
    #[arg(long)]
    pub offline: bool,
}

/// `flux-lora parity`
#[derive(Debug, Args)]
pub struct ParityArgs {
    /// Case folders
    #[arg(required = true)]
    pub cases: Vec<PathBuf>,
    /// Device, as for train
    #[arg(long)]
    pub device: Option<String>,
    /// Write what was computed to DIR/CASE/actual.safetensors
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Multiply every tolerance, for GPU backends
    #[arg(long, default_value_t = 1.0)]
    pub tolerance_scale: f64,
}

/// `flux-lora bench`
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// One training step of a mid-size random model
    Step(StepBenchArgs),
    /// Each operation of a block with its kernels, beside its composition of Burn's operations
    Ops(OpsBenchArgs),
    /// Inspect and convert a LoRA file of 2 GB, beside a plain copy of it
    Lora(LoraBenchArgs),
    /// A whole training, killed and resumed too, of a model of real dimensions with random weights
    FullSize(FullSizeArgs),
    /// A LoRA through lora-core, beside Burn's own
    LoraCore(LoraCoreBenchArgs),
    /// What base weights in fewer bits do to what a model computes and learns
    Quality(QualityBenchArgs),
    /// What a caption, a denoising step and a decoded image take
    Sample(SampleBenchArgs),
    /// How time and memory of a step grow with blocks, batch and tokens
    Scaling(ScalingBenchArgs),
    /// What a run costs beside forward pass, backward pass and update: data, logs, saves, its start
    Trainer(TrainerBenchArgs),
}

/// `flux-lora bench trainer`
#[derive(Debug, Args)]
pub struct TrainerBenchArgs {
    /// Steps of the run, every second of which is saved
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u64).range(4..))]
    pub steps: u64,
    /// Where to write 0.4 GB; removed at the end
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Leave everything where it is; the next run uses the weights that are there
    #[arg(long)]
    pub keep: bool,
}

/// `flux-lora bench step`
#[derive(Debug, Args)]
pub struct StepBenchArgs {
    /// Device, as for train
    #[arg(long)]
    pub device: Option<String>,
    /// Timed steps of each variant
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Run one variant in this process (plain, recompute, kept: recompute that keeps results, or composed: plain without the
    /// project's own kernels); all, each in a process of its own, if absent
    #[arg(long)]
    pub variant: Option<String>,
    /// Dimensions of a published model, with random weights, instead of the mid-size one; captions have 512 tokens
    #[arg(long, value_enum)]
    pub model: Option<FullSizeModel>,
    /// Pictures in a step of --model
    #[arg(long, default_value_t = 1, requires = "model", value_parser = clap::value_parser!(u32).range(1..))]
    pub batch: u32,
    /// Side of its pictures in pixels
    #[arg(long, default_value_t = 512, requires = "model", value_parser = clap::value_parser!(u32).range(16..))]
    pub resolution: u32,
    /// What blocks compute in, and what the matrices of the model are kept as
    #[arg(long, default_value = "f32", value_parser = compute())]
    pub compute: Compute,
    /// In turns with the same step in torch with PEFT, which this Python has (with diffusers); plain and recompute, each with every number of
    /// --threads
    #[arg(long, value_name = "PYTHON", conflicts_with_all = ["variant", "device", "model", "compute"])]
    pub torch: Option<PathBuf>,
    /// Threads, beside torch
    #[arg(long, value_delimiter = ',', default_values_t = [2, 1], requires = "torch")]
    pub threads: Vec<usize>,
    /// Times that each is run, beside torch
    #[arg(long, default_value_t = 3, requires = "torch")]
    pub rounds: usize,
}

/// `flux-lora bench ops`
#[derive(Debug, Args)]
pub struct OpsBenchArgs {
    /// Times that each operation is run each way
    #[arg(long, default_value_t = 11)]
    pub rounds: usize,
    /// Tokens
    #[arg(long, default_value_t = 384)]
    pub tokens: usize,
    /// Heads of 64 channels
    #[arg(long, default_value_t = 12)]
    pub heads: usize,
}

/// `flux-lora bench full-size`
#[derive(Debug, Args)]
pub struct FullSizeArgs {
    /// The model whose dimensions are taken
    #[arg(long, value_enum, default_value_t = FullSizeModel::Dev)]
    pub model: FullSizeModel,
    /// Where to write it: 35 GB for dev, 16 GB for klein-4b; removed at the end
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Side of the pictures in pixels
    #[arg(long, default_value_t = 256)]
    pub resolution: u32,
    /// Text tokens
    #[arg(long, default_value_t = 512)]
    pub tokens: usize,
    /// Steps of the run, 2 at least: one is saved, one is killed
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(2..))]
    pub steps: u64,
    /// Memory that the run is made to fit into
    #[arg(long, default_value = "4GiB")]
    pub limit: String,
    /// `model.base_dtype` of the run, such as nf4
    #[arg(long, value_name = "TYPE", default_value = "as-stored")]
    pub base_dtype: String,
    /// Device, as for train
    #[arg(long, default_value = crate::device::default_name())]
    pub device: String,
    /// `model.compute` of the run
    #[arg(long, default_value = "f32", value_parser = compute())]
    pub compute: Compute,
    /// Leave everything where it is; the next run uses the weights that are there, as it does after an interruption
    #[arg(long)]
    pub keep: bool,
    /// At most so many blocks of each kind, for trying the benchmark out
    #[arg(long, hide = true)]
    pub layers: Option<usize>,
}

fn compute() -> impl TypedValueParser<Value = Compute> {
    PossibleValuesParser::new(["f32", "bf16"]).map(|name| match name.as_str() {
        "bf16" => Compute::Bf16,
        _ => Compute::F32,
    })
}

/// A published model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FullSizeModel {
    /// FLUX.1-dev.
    Dev,
    /// FLUX.1-schnell.
    Schnell,
    /// FLUX.2 klein base 4B.
    #[value(name = "klein-4b")]
    Klein4b,
}

impl std::fmt::Display for FullSizeModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dev => "dev",
            Self::Schnell => "schnell",
            Self::Klein4b => "klein-4b",
        })
    }
}

/// `flux-lora bench lora-core`
#[derive(Debug, Args)]
pub struct LoraCoreBenchArgs {
    /// Widths of the model
    #[arg(long, value_delimiter = ',', default_values_t = [1536, 2304, 3072])]
    pub widths: Vec<usize>,
    /// Blocks of three layers
    #[arg(long, default_value_t = 4)]
    pub blocks: usize,
    /// Tokens
    #[arg(long, default_value_t = 512)]
    pub tokens: usize,
    /// Timed steps of each process
    #[arg(long, default_value_t = 2)]
    pub steps: usize,
    /// Processes of each way
    #[arg(long, default_value_t = 2)]
    pub rounds: usize,
    /// Only this way, in this process; prints seconds and peak MiB
    #[arg(long, hide = true)]
    pub way: Option<String>,
}

/// `flux-lora bench sample`
#[derive(Debug, Args)]
pub struct SampleBenchArgs {
    /// Pipeline folder
    #[arg(long)]
    pub model: PathBuf,
    /// Device, as for train
    #[arg(long)]
    pub device: Option<String>,
    /// Denoising steps of an image
    #[arg(long, default_value_t = 4)]
    pub steps: usize,
    /// Pixels of a side
    #[arg(long, default_value_t = 256)]
    pub size: usize,
    /// Tokens of a caption
    #[arg(long, default_value_t = 128)]
    pub tokens: usize,
    /// Times that each part is timed
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
}

/// `flux-lora bench quality`
#[derive(Debug, Args)]
pub struct QualityBenchArgs {
    /// Device, as for train
    #[arg(long)]
    pub device: Option<String>,
    /// Steps of each training
    #[arg(long, default_value_t = 200)]
    pub steps: u64,
    /// The storages to measure; f32, which the others are compared with, always is
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Storage::Bf16, Storage::Fp8, Storage::Q8, Storage::Nf4])]
    pub dtypes: Vec<Storage>,
}

/// How `bench quality` stores the weights of linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Storage {
    /// As they are.
    F32,
    /// Rounded.
    Bf16,
    /// E4M3 with one factor for a weight.
    Fp8,
    /// Integers of 8 bits.
    Q8,
    /// bitsandbytes' NF4.
    Nf4,
}

/// `flux-lora bench scaling`
#[derive(Debug, Args)]
pub struct ScalingBenchArgs {
    /// Timed steps of each size
    #[arg(long, default_value_t = 3)]
    pub steps: usize,
    /// Draw what is found into this SVG file
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Only this size, in this process: blocks of each kind, samples, tokens along a side, blocks computed again; prints CPU
    /// seconds of a step and peak MiB
    #[arg(long, value_delimiter = ',', hide = true)]
    pub size: Option<Vec<usize>>,
}

/// `flux-lora bench lora`
#[derive(Debug, Args)]
pub struct LoraBenchArgs {
    /// Rank on every linear layer of FLUX.1 dev; 192 makes 2.1 GB
    #[arg(long, default_value_t = 192)]
    pub rank: usize,
    /// Times that everything is done
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Where to put the file and what is written, 2 times its size in all; removed at the end
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Only this work, in this process, on --file; prints seconds and peak MiB
    #[arg(long, requires = "file", hide = true)]
    pub work: Option<String>,
    /// The file for --work
    #[arg(long, requires = "work", hide = true)]
    pub file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_named_in_the_same_words_for_every_command_that_takes_one() {
        let words = "run.toml --preset style-12gb --device flex --output runs/x --steps 5 --set lora.r=4 --offline";
        for command in ["train", "check", "cache"] {
            let words = ["flux-lora", command].into_iter().chain(words.split(' '));
            let run = match Cli::try_parse_from(words).expect("good words").command {
                Command::Train(args) => args.run,
                Command::Check(run) => run,
                Command::Cache(args) => args.run,
                _ => panic!("{command} is none of these"),
            };
            assert_eq!(run.preset.as_deref(), Some("style-12gb"), "{command}");
            assert_eq!((run.steps, run.offline), (Some(5), true), "{command}");
        }
    }
}
