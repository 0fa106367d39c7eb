//! Fine-tuning of FLUX image models with LoRA: the library behind the program `flux-lora`.
//!
//! Data goes one way: `config` -> `dataset` -> `cache` -> `batch` -> `backward` -> `train` -> `checkpoint`.
//!
//! | file | idea |
//! |---|---|
//! | `cli`, `commands` | the command line; one function a command |
//! | `config`, `nearest` | the run configuration, strictly read |
//! | `dataset`, `bucket` | images and captions; sizes they are trained at |
//! | `cache` | every sample encoded once, keyed by content |
//! | `batch`, `loss` | a micro-batch as a function of the micro step; noise levels and loss weights |
//! | `backward` | loss and gradients, block by block |
//! | `lr_schedule` | learning rate as a function of the step |
//! | `train` | the run: prepare, loop, save |
//! | `checkpoint`, `fingerprint` | what a checkpoint says, and what exactness depends on |
//! | `run_dir`, `transaction`, `vfs` | checkpoints that survive anything |
//! | `adapters` | LoRA files of any format onto the networks |
//! | `merge` | LoRAs into a pipeline on disk |
//! | `generate`, `preview` | text to image, and previews during training |
//! | `inspect`, `parity`, `bench`, `random_weights` | the other commands |
//! | `device` | the only file that names a backend |
//! | `progress` | bars and lines |
//! | `canary` | known faults for the fault suite; not in what ships |

pub mod adapters;
pub mod backward;
pub mod batch;
pub mod bench;
pub mod bucket;
pub mod cache;
#[cfg(feature = "canary")]
mod canary;
pub mod checkpoint;
pub mod cli;
pub mod commands;
pub mod config;
pub mod dataset;
pub mod device;
pub mod fingerprint;
pub mod generate;
pub mod inspect;
pub mod loss;
pub mod lr_schedule;
pub mod merge;
pub mod nearest;
pub mod parity;
pub mod preview;
pub mod progress;
pub mod random_weights;
pub mod run_dir;
pub mod train;
pub mod transaction;
pub mod vfs;
