//! Whole-program tests: the program as a user runs it.

#![allow(clippy::unwrap_used)]

mod adapters;
mod bad_input;
mod data_options;
mod datasets;
mod flux2;
mod formats;
mod golden;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod heap;
mod hostile;
mod logs;
mod nano;
mod parity;
mod pictures;
#[cfg(target_os = "linux")]
mod real_size;
mod replay;
mod resume;
mod runs;
mod start;
#[cfg(target_os = "linux")]
mod terminal;
mod text_encoders;
mod tiny_vae;
mod train_options;
mod validation;
