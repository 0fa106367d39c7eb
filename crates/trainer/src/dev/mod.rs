//! For people who work on this program: reference cases, benchmarks, models with random weights.

pub mod bench;
pub mod parity;
pub mod random_weights;
