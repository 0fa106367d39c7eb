//! The tokenizer of Qwen3 and the chat form that FLUX.2 klein puts a prompt in.
//!
//! Source: transformers 4.57.6 `convert_slow_tokenizer.py` (`Qwen2Converter`); diffusers 0.38 `Flux2KleinPipeline`
//! (`_get_qwen3_prompt_embeds`).
//!
//! - `tokenizer.json` is used when present. Without it the same pipeline is built from `vocab.json` and `merges.txt`.
//! - The chat template of the folder is not run: for one user message, thinking off, it gives the text below.
//! - Added tokens written in a prompt, such as `<|im_end|>`, become their ids.

use std::path::Path;

use lora_core::files::strict_json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::error::{Cause, Result, TokenizerError, malformed};
use super::files::{Settings, parse_merges, read};
use super::framed::{check_added_tokens, count_tokens, first_tokens, token_id};

/// Words of Qwen: contractions, letters with one other character before, single digits, other characters with the line
/// ends after them, blanks.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// What stands before the prompt.
const BEFORE: &str = "<|im_start|>user\n";
/// What stands after it: the answer is asked for, and its thinking is over.
const AFTER: &str = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/// Byte-level BPE over the chat form of a prompt, padding on the right.
#[derive(Debug, Clone)]
pub struct QwenTokenizer {
    text: Tokenizer,
    pad_id: i64,
}

/// A prompt as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QwenTokens {
    /// The ids, padded.
    pub ids: Vec<i64>,
    /// 1 for a token of the text, 0 for padding.
    pub mask: Vec<i64>,
}

impl QwenTokenizer {
    /// Reads a tokenizer folder, or a lone file in the `tokenizer.json` format with its settings files beside it.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, or a vocabulary without the tokens of the chat form.
    pub fn load(path: &Path) -> Result<Self> {
        let settings = Settings::read(path)?;
        let (text, file) = match settings.read_json()? {
            Some(found) => found,
            None => {
                let (file, merges_file) = (path.join("vocab.json"), path.join("merges.txt"));
                let vocab: Vocab =
                    strict_json::parse_json(&read(&file)?).map_err(malformed(&file))?;
                let merges = parse_merges(&read(&merges_file)?, usize::MAX);
                let model = BPE::builder()
                    .vocab_and_merges(vocab, merges.map_err(malformed(&merges_file))?)
                    .build();
                let text = pipeline(model.map_err(malformed(&merges_file))?);
                let mut text = text.map_err(malformed(&file))?;
                settings.add_tokens(&mut text, Vec::new())?;
                (text, file)
            }
        };
        check_added_tokens(&text, &file)?;
        for token in ["<|im_start|>", "<|im_end|>", "<think>", "</think>"] {
            token_id(&text, &file, "chat", token)?;
        }
        let pad = settings.token("pad_token").unwrap_or("<|endoftext|>");
        Ok(Self {
            pad_id: token_id(&text, &file, "pad", pad)?,
            text,
        })
    }

    /// Tokens of one prompt in its chat form, exactly `max_length` of them; a longer one loses its end, the closing tokens
    /// first.
    ///
    /// # Errors
    /// `max_length` of 0, or a vocabulary that cannot spell the prompt.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<QwenTokens> {
        if max_length == 0 {
            let needed = 1;
            return Err(TokenizerError::TooShort { max_length, needed });
        }
        let mut ids = first_tokens(&self.text, &chat(prompt), max_length)?;
        let mut mask = vec![1; ids.len()];
        ids.resize(max_length, self.pad_id);
        mask.resize(max_length, 0);
        Ok(QwenTokens { ids, mask })
    }

    /// How many tokens a prompt has in its chat form when none is cut.
    ///
    /// # Errors
    /// A vocabulary that cannot spell the prompt.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        count_tokens(&self.text, &chat(prompt))
    }
}

fn chat(prompt: &str) -> String {
    format!("{BEFORE}{prompt}{AFTER}")
}

fn pipeline(model: BPE) -> Result<Tokenizer, Cause> {
    let words = SplitPattern::Regex(WORDS.to_owned());
    let words = Split::new(words, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, true, false);
    let mut text = Tokenizer::new(model);
    text.with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::SafeTensors;
    use serde_json::Value;

    use super::*;

    type TestResult = Result<(), Cause>;

    const CASE: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/parity/flux2_tokenizer"
    );

    /// A folder with some of the reference's files.
    fn folder(files: &[&str]) -> Result<tempfile::TempDir, Cause> {
        let dir = tempfile::tempdir()?;
        for file in files {
            let from = Path::new(CASE).join("tokenizer").join(file);
            fs::copy(from, dir.path().join(file))?;
        }
        Ok(dir)
    }

    #[test]
    fn both_kinds_of_files_give_the_ids_of_the_reference() -> TestResult {
        let case: Value = serde_json::from_slice(&fs::read(Path::new(CASE).join("case.json"))?)?;
        let expected = fs::read(Path::new(CASE).join("expected.safetensors"))?;
        let expected = SafeTensors::deserialize(&expected)?;
        let prompts = case["prompts"].as_array().ok_or("prompts")?;
        for files in [
            ["tokenizer.json"].as_slice(),
            &["vocab.json", "merges.txt", "tokenizer_config.json"],
        ] {
            let dir = folder(files)?;
            let tokenizer = QwenTokenizer::load(dir.path())?;
            for length in [64, 512] {
                for what in ["ids", "mask"] {
                    let tensor = expected.tensor(&format!("qwen_{what}_{length}"))?;
                    let rows = tensor.data().chunks_exact(8 * length);
                    for (prompt, row) in prompts.iter().zip(rows) {
                        let prompt = prompt.as_str().ok_or("prompt")?;
                        let tokens = tokenizer.encode(prompt, length)?;
                        let found = if what == "ids" {
                            tokens.ids
                        } else {
                            tokens.mask
                        };
                        let found: Vec<u8> = found.iter().flat_map(|id| id.to_le_bytes()).collect();
                        assert!(found == row, "{files:?} {what} of {prompt:?}");
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn no_room_and_a_vocabulary_without_the_chat_tokens_are_errors() -> TestResult {
        let dir = folder(&["tokenizer.json"])?;
        let tokenizer = QwenTokenizer::load(dir.path())?;
        let error = tokenizer.encode("a cat", 0).err().ok_or("no error")?;
        assert!(error.to_string().contains("max_length is 0"), "{error}");

        let dir = folder(&["vocab.json", "merges.txt"])?; // added tokens stand in tokenizer_config.json
        let error = QwenTokenizer::load(dir.path()).err().ok_or("no error")?;
        assert!(
            error.to_string().contains("no chat token `<|im_start|>`"),
            "{error}"
        );
        Ok(())
    }
}
