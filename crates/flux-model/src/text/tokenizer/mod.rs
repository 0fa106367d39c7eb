//! Tokenizers: a prompt to the token ids that CLIP-L, T5-XXL, Qwen3 and Mistral read.
//!
//! Source: huggingface/transformers 4.57.6 `convert_slow_tokenizer.py` (`CLIPConverter`, `T5Converter`) and
//! sentencepiece 0.2 `sentencepiece_model.proto`.
//!
//! - `tokenizer.json` is used when present. Without it the same pipeline is built from `vocab.json` and `merges.txt`
//!   (CLIP, Qwen) or from `spiece.model` (T5); Mistral needs it.
//! - BOS, EOS, truncation and padding are put here; what a file stores about them is dropped. A special token written
//!   in a prompt becomes its id.
//! - CLIP text is not repaired with `ftfy`, as in the fast Python tokenizer: ligatures, curly quotes, HTML entities and
//!   the Greek final sigma can differ from the slow one.
//! - Only the head of a long prompt is read, up to a blank, so its length costs nothing. One endless word is read
//!   whole, in linear time (1 to 4 s per MB).
//! - `tokenizers` trusts its files and panics on broken ones: JSON and charsmap are checked here first.
//!
//! | file | idea |
//! |---|---|
//! | `clip`, `t5`, `qwen`, `mistral` | the tokenizers |
//! | `chat` | a prompt as a message of a chat, for the last two |
//! | `framed` | a text pipeline and the ids put around its tokens |
//! | `files` | the files of a tokenizer folder |
//! | `sentencepiece`, `charsmap` | `spiece.model`, and the part of it that is also in `tokenizer.json` |

mod charsmap;
mod chat;
mod clip;
mod error;
mod files;
mod framed;
mod mistral;
mod qwen;
mod sentencepiece;
mod t5;

pub use chat::{ChatTokenizer, ChatTokens};
pub use clip::ClipTokenizer;
pub use error::TokenizerError;
pub use t5::T5Tokenizer;

#[cfg(test)]
mod tests;
