//! Text to embeddings: tokenizers and encoders.

pub mod clip;
pub mod qwen3;
pub mod t5;
pub mod tokenizer;
