//! CLIP's tokenizer.

use std::path::Path;

use lora_core::files::strict_json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{Lowercase, NFC, Sequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as Steps;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::error::{Cause, Result, malformed};
use super::files::{Settings, parse_merges, read};
use super::framed::Framed;

/// Words of CLIP: contractions, runs of letters, single digits, runs of anything else but blanks.
const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Merges of CLIP's 49152 tokens besides bytes and special tokens; the Python tokenizer reads no more.
const CLIP_MERGES: usize = 49152 - 256 - 2;

/// Lower-casing byte-level BPE: `<|startoftext|>`, tokens, `<|endoftext|>`, padding.
#[derive(Debug, Clone)]
pub struct ClipTokenizer(pub(super) Framed);

impl ClipTokenizer {
    /// Reads a tokenizer folder, or a lone file in the `tokenizer.json` format with its settings files beside it.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, or a vocabulary without the special tokens.
    pub fn load(path: &Path) -> Result<Self> {
        let settings = Settings::read(path)?;
        let bos = settings.token("bos_token").unwrap_or("<|startoftext|>");
        let eos = settings.token("eos_token").unwrap_or("<|endoftext|>");
        let pad = settings.token("pad_token").unwrap_or(eos);
        let unk = settings.token("unk_token").unwrap_or(eos);
        let (text, file) = match settings.read_json()? {
            Some(found) => found,
            None => {
                let (file, merges_file) = (path.join("vocab.json"), path.join("merges.txt"));
                let vocab = strict_json::parse_json(&read(&file)?).map_err(malformed(&file))?;
                let merges = parse_merges(&read(&merges_file)?, CLIP_MERGES);
                let merges = merges.map_err(malformed(&merges_file))?;
                let text = clip_pipeline(vocab, merges, unk);
                let mut text = text.map_err(malformed(&merges_file))?;
                let special = |token: &str| AddedToken::from(token, true).normalized(true);
                settings.add_tokens(&mut text, [bos, eos, pad, unk].map(special).to_vec())?;
                (text, file)
            }
        };
        let max_length = settings.model_max_length(77);
        Framed::new(text, &file, Some(bos), eos, pad, max_length).map(Self)
    }

    /// Ids of one prompt, exactly `max_length` of them; a longer prompt loses its end but not EOS.
    ///
    /// # Errors
    /// `max_length` below 2, or a vocabulary that cannot spell the prompt.
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<i64>> {
        self.0.encode(prompt, max_length)
    }

    /// How many tokens a prompt has when none is cut, those put around it included.
    ///
    /// # Errors
    /// A vocabulary that cannot spell the prompt.
    pub fn count(&self, prompt: &str) -> Result<usize> {
        self.0.count(prompt)
    }

    /// Id after the last token; the text encoder pools where it stands first.
    pub fn eos_id(&self) -> i64 {
        self.0.eos_id
    }

    /// Length of CLIP's position table: 77 unless `tokenizer_config.json` says otherwise.
    pub fn model_max_length(&self) -> usize {
        self.0.model_max_length
    }
}

fn clip_pipeline(
    vocab: Vocab,
    merges: Vec<(String, String)>,
    unk: &str,
) -> Result<Tokenizer, Cause> {
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .end_of_word_suffix("</w>".to_owned())
        .unk_token(unk.to_owned())
        .build()?;
    let blanks = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")?;
    let words = SplitPattern::Regex(CLIP_WORDS.to_owned());
    let words = Split::new(words, SplitDelimiterBehavior::Removed, true)?;
    let bytes = ByteLevel::new(false, true, true);
    let normalizers = vec![NFC.into(), blanks.into(), Lowercase.into()];
    let mut text = Tokenizer::new(model);
    text.with_normalizer(Some(Sequence::new(normalizers)))
        .with_pre_tokenizer(Some(Steps::new(vec![words.into(), bytes.into()])));
    Ok(text)
}
