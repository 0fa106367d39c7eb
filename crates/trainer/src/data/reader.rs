//! Captions and prompts as a run reads them: what the encoders made of them once, and their tokens where an encoder is trained,
//! for then it makes something else of them in every step.

use anyhow::Context;
use flux_model::family::{Family, Tokenizer};
use flux_model::prompted::{Prompts, TokensOf};

use crate::config::RunConfig;
use crate::data::cache::Cache;

/// What turns a text into what a network with its text encoders reads.
pub struct Reader<F: Family> {
    tokenizer: Option<Tokenizer<TokensOf<F>>>,
    max_sequence_length: usize,
}

impl<F: Family> Reader<F> {
    /// Of a run with `config`.
    ///
    /// # Errors
    /// A tokenizer that cannot be read.
    pub fn new(config: &RunConfig, family: &F) -> anyhow::Result<Self> {
        let tokenizer = match config.lora.text_encoders().is_empty() {
            true => None,
            false => Some(family.tokenizer().context("load the tokenizers")?),
        };
        Ok(Self {
            tokenizer,
            max_sequence_length: config.dataset.max_sequence_length,
        })
    }

    /// A text of an entry, or the empty one for `None`.
    ///
    /// # Errors
    /// As [`Cache::text`], a text that a tokenizer refuses.
    pub fn text(
        &self,
        cache: &Cache,
        entry: usize,
        variant: Option<usize>,
    ) -> anyhow::Result<Prompts<TokensOf<F>>> {
        let encoded = cache.text(entry, variant)?;
        Ok(Prompts {
            encoded,
            tokens: self.tokens(cache.caption(entry, variant))?,
        })
    }

    /// A prompt that was named when the cache was built.
    ///
    /// # Errors
    /// As [`Cache::prompt`], a prompt that a tokenizer refuses.
    pub fn prompt(&self, cache: &Cache, prompt: &str) -> anyhow::Result<Prompts<TokensOf<F>>> {
        Ok(Prompts {
            encoded: cache.prompt(prompt)?,
            tokens: self.tokens(prompt)?,
        })
    }

    fn tokens(&self, text: &str) -> anyhow::Result<Vec<TokensOf<F>>> {
        let tokenizer = self.tokenizer.iter();
        let tokens = tokenizer.map(|tokenizer| tokenizer(text, self.max_sequence_length));
        Ok(tokens.collect::<Result<_, _>>()?)
    }
}
