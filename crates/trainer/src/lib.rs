//! Fine-tuning of FLUX image models with LoRA: the library behind the program `flux-lora`.
//!
//! Data goes one way: `config` -> `data` -> `backward` -> `train` -> `run`.
//!
//! | file | idea |
//! |---|---|
//! | `cli`, `commands` | the command line; one function a command |
//! | `command_to_resume` | what a stopped run says: the command that goes on with it |
//! | `check`, `estimate` | what can be known of a run before it starts; how long a step will take |
//! | `config/`, `nearest` | the run configuration, a file for each section, strictly read |
//! | `data/` | images and captions, their sizes, every sample encoded once, micro-batches as a function of the step |
//! | `loss`, `backward` | noise levels and loss weights; loss and gradients, block by block |
//! | `lr_schedule` | learning rate as a function of the step |
//! | `train`, `step`, `rule` | the run: prepare, loop, save; one step of it and its rule, which reference cases and the benchmark make too |
//! | `workers` | the micro-batches of a step on several devices, or threads, to the same bits |
//! | `run/` | what a checkpoint says; checkpoints that survive anything |
//! | `fingerprint` | what exactness depends on |
//! | `adapters` | LoRA files of any format onto the networks |
//! | `merge`, `convert` | LoRAs into a pipeline on disk; a LoRA in another format |
//! | `validation` | the loss on pictures that are not trained on |
//! | `generate`, `sample`, `previews` | text to image, on the command line and during training |
//! | `condition`, `given` | pictures beside the prompt as the network reads them; those that `sample` is given |
//! | `grid` | pictures in rows and columns, with texts |
//! | `image_file` | the place of an image, tried before the work |
//! | `models`, `hub/` | models by name; repositories of the Hugging Face Hub, downloaded once |
//! | `inspect` | what a file or folder is |
//! | `compare`, `export` | two runs side by side; a finished LoRA as a folder to upload |
//! | `report/` | a run as one page, written or served |
//! | `dev/` | reference cases, benchmarks, random weights |
//! | `device` | the only file that names a backend |
//! | `kept_base` | base weights that are brought into few bits, once |
//! | `memory`, `taken` | how much a run will take, and how it is made to fit; how much it took |
//! | `heap` | how the C library keeps memory that is freed |
//! | `progress`, `output` | bars, lines and events; what is said to whom |
//! | `canary` | known faults for the fault suite; not in what ships |

pub mod adapters;
pub mod backward;
#[cfg(feature = "canary")]
mod canary;
mod check;
pub mod cli;
mod command_to_resume;
pub mod commands;
mod compare;
pub mod condition;
pub mod config;
mod convert;
pub mod data;
pub mod dev;
pub mod device;
mod estimate;
mod export;
pub mod fingerprint;
pub mod generate;
mod given;
pub mod grid;
pub mod heap;
pub mod hub;
mod image_file;
pub mod inspect;
mod kept_base;
pub mod loss;
pub mod lr_schedule;
pub mod memory;
pub mod merge;
pub mod models;
pub mod nearest;
pub mod output;
pub mod previews;
pub mod progress;
mod report;
mod rule;
pub mod run;
mod sample;
mod step;
mod taken;
pub mod train;
pub mod validation;
mod workers;
