//! The tokenizer of Qwen3 and the chat form that FLUX.2 klein puts a prompt in.
//!
//! Source: transformers 4.57.6 `convert_slow_tokenizer.py` (`Qwen2Converter`); diffusers 0.38 `Flux2KleinPipeline`
//! (`_get_qwen3_prompt_embeds`).
//!
//! - `tokenizer.json` is used when present. Without it the same pipeline is built from `vocab.json` and `merges.txt`.
//! - The chat form is that of one user message, thinking off. Padding is behind it.

use std::path::Path;

use lora_core::files::strict_json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

use super::chat::{ChatForm, ChatTokenizer};
use super::error::{Cause, Result, malformed};
use super::files::{Settings, parse_merges, read};

/// Words of Qwen: contractions, letters with one other character before, single digits, other characters with the line
/// ends after them, blanks.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const FORM: ChatForm = ChatForm {
    before: "<|im_start|>user\n",
    // the answer is asked for, and its thinking is over
    after: "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    needed: &["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    removed: None,
};

impl ChatTokenizer {
    /// Reads Qwen's tokenizer folder, or a lone file in the `tokenizer.json` format with its settings files beside it.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, or a vocabulary without the tokens of the chat form.
    pub fn qwen(path: &Path) -> Result<Self> {
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
        let pad = settings.token("pad_token").unwrap_or("<|endoftext|>");
        Self::new(text, &file, &FORM, pad, false)
    }
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
            let tokenizer = ChatTokenizer::qwen(dir.path())?;
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
        let tokenizer = ChatTokenizer::qwen(dir.path())?;
        let error = tokenizer.encode("a cat", 0).err().ok_or("no error")?;
        assert!(error.to_string().contains("max_length is 0"), "{error}");

        let dir = folder(&["vocab.json", "merges.txt"])?; // added tokens stand in tokenizer_config.json
        let error = ChatTokenizer::qwen(dir.path()).err().ok_or("no error")?;
        assert!(
            error.to_string().contains("no chat token `<|im_start|>`"),
            "{error}"
        );
        Ok(())
    }
}
