//! T5's tokenizer.

use std::path::Path;

use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{Precompiled, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, NormalizerWrapper, Tokenizer};

use super::charsmap::check_charsmap;
use super::error::{Cause, Result, malformed};
use super::files::{Settings, read};
use super::framed::Framed;
use super::sentencepiece::SentencePiece;

/// SentencePiece unigram model: tokens, `</s>`, padding.
#[derive(Debug, Clone)]
pub struct T5Tokenizer(pub(super) Framed);

impl T5Tokenizer {
    /// Reads a tokenizer folder, or a lone file in the `tokenizer.json` format with its settings files beside it.
    ///
    /// # Errors
    /// A file that cannot be read or parsed, a model that is not unigram, or a vocabulary without the special tokens.
    pub fn load(path: &Path) -> Result<Self> {
        let settings = Settings::read(path)?;
        let eos = settings.token("eos_token").unwrap_or("</s>");
        let pad = settings.token("pad_token").unwrap_or("<pad>");
        let unk = settings.token("unk_token").unwrap_or("<unk>");
        let (text, file) = match settings.read_json()? {
            Some(found) => found,
            None => {
                let file = path.join("spiece.model");
                let model = SentencePiece::parse(&read(&file)?).map_err(malformed(&file))?;
                let special = |token: &str| AddedToken::from(token, true);
                let mut special = [eos, pad, unk].map(special).to_vec();
                special.extend(model.added.iter().cloned());
                special.extend(settings.extra_tokens());
                let mut text = t5_pipeline(model, &settings).map_err(malformed(&file))?;
                settings.add_tokens(&mut text, special)?;
                (text, file)
            }
        };
        let max_length = settings.model_max_length(512);
        Framed::new(text, &file, None, eos, pad, max_length).map(Self)
    }

    /// Ids of one prompt, exactly `max_length` of them; a longer prompt loses its end but not EOS.
    ///
    /// # Errors
    /// `max_length` of 0, or a vocabulary that cannot spell the prompt.
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

    /// Id after the last token.
    pub fn eos_id(&self) -> i64 {
        self.0.eos_id
    }

    /// Length T5 was trained with: 512 unless `tokenizer_config.json` says otherwise.
    pub fn model_max_length(&self) -> usize {
        self.0.model_max_length
    }
}

fn t5_pipeline(mut model: SentencePiece, settings: &Settings) -> Result<Tokenizer, Cause> {
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if !model.charsmap.is_empty() {
        check_charsmap(&model.charsmap)?;
        normalizers.push(Precompiled::from(&model.charsmap)?.into());
    }
    normalizers.push(Strip::new(false, true).into());
    normalizers.push(Replace::new(ReplacePattern::Regex(" {2,}".to_owned()), "▁")?.into());
    let on = |name: &str| settings.config[name].as_bool() != Some(false);
    let scheme = match (on("add_prefix_space"), on("legacy")) {
        (false, _) => PrependScheme::Never,
        (true, false) => PrependScheme::First,
        (true, true) => PrependScheme::Always, // a word starts after each special token too
    };
    let extra = settings.extra_tokens().map(|token| (token.content, 0.0));
    model.pieces.extend(extra);
    let unigram = Unigram::from(model.pieces, Some(model.unk_id), model.byte_fallback)?;
    let mut text = Tokenizer::new(unigram);
    text.with_normalizer(Some(Sequence::new(normalizers)))
        .with_pre_tokenizer(Some(Metaspace::new('▁', scheme, true)));
    Ok(text)
}
