//! Fine-tuning of FLUX image models with LoRA: the library behind the program `flux-lora`.
//!
//! Data goes one way: `config` -> `data` -> `backward` -> `train` -> `run`.
//!
//! | file | idea |
//! |---|---|
//! | `cli`, `commands` | the command line; one function a command |
//! | `config`, `nearest` | the run configuration, strictly read |
//! | `data/` | images and captions, their sizes, every sample encoded once, micro-batches as a function of the step |
//! | `loss`, `backward` | noise levels and loss weights; loss and gradients, block by block |
//! | `lr_schedule` | learning rate as a function of the step |
//! | `train`, `step` | the run: prepare, loop, save; one step of it, which reference cases and the benchmark make too |
//! | `run/` | what a checkpoint says; checkpoints that survive anything |
//! | `fingerprint` | what exactness depends on |
//! | `adapters` | LoRA files of any format onto the networks |
//! | `merge`, `convert` | LoRAs into a pipeline on disk; a LoRA in another format |
//! | `generate`, `previews` | text to image, and previews during training |
//! | `condition`, `given` | pictures beside the prompt as the network reads them; those that `sample` is given |
//! | `image_file` | the place of an image, tried before the work |
//! | `inspect` | what a file or folder is |
//! | `dev/` | reference cases, benchmarks, random weights |
//! | `device` | the only file that names a backend |
//! | `progress` | bars and lines |
//! | `canary` | known faults for the fault suite; not in what ships |

pub mod adapters;
pub mod backward;
#[cfg(feature = "canary")]
mod canary;
pub mod cli;
pub mod commands;
pub mod condition;
pub mod config;
mod convert;
pub mod data;
pub mod dev;
pub mod device;
pub mod fingerprint;
pub mod generate;
mod given;
mod image_file;
pub mod inspect;
pub mod loss;
pub mod lr_schedule;
pub mod merge;
pub mod nearest;
pub mod previews;
pub mod progress;
pub mod run;
mod step;
pub mod train;
