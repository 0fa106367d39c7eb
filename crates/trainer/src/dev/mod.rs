//! For people who work on this program: reference cases, benchmarks, models with random weights; and what the quickstart shows.

pub mod bench;
pub mod parity;
pub mod quickstart;
pub mod random_weights;
