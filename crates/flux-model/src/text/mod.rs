//! Text to embeddings: tokenizers and encoders.

pub mod clip;
mod embedding;
pub mod qwen3;
pub mod t5;
mod t5_config;
pub mod tokenizer;
