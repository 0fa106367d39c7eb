//! Text to embeddings: tokenizers and encoders.

pub mod clip;
pub mod decoder;
mod embedding;
pub mod t5;
mod t5_config;
pub mod tokenizer;
