//! A text pipeline and the ids put around its tokens.

use std::path::Path;

use tokenizers::{AddedToken, NormalizedString, Normalizer as _, Tokenizer};

use super::error::{Result, TokenizerError, malformed};

/// A text pipeline and the ids put around its tokens.
#[derive(Debug, Clone)]
pub(super) struct Framed {
    pub(super) text: Tokenizer,
    bos_id: Option<i64>,
    pub(super) eos_id: i64,
    pad_id: i64,
    pub(super) model_max_length: usize,
}

impl Framed {
    pub(super) fn new(
        text: Tokenizer,
        path: &Path,
        bos: Option<&str>,
        eos: &str,
        pad: &str,
        model_max_length: usize,
    ) -> Result<Self> {
        let id = |role, token: &str| token_id(&text, path, role, token);
        check_added_tokens(&text, path)?;
        let bos_id = bos.map(|bos| id("bos", bos)).transpose()?;
        let (eos_id, pad_id) = (id("eos", eos)?, id("pad", pad)?);
        Ok(Self {
            text,
            bos_id,
            eos_id,
            pad_id,
            model_max_length,
        })
    }

    pub(super) fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<i64>> {
        let needed = 1 + usize::from(self.bos_id.is_some());
        let room = max_length
            .checked_sub(needed)
            .ok_or(TokenizerError::TooShort { max_length, needed })?;
        let mut ids = Vec::from_iter(self.bos_id);
        ids.extend(first_tokens(&self.text, prompt, room)?);
        ids.push(self.eos_id);
        ids.resize(max_length, self.pad_id);
        Ok(ids)
    }

    pub(super) fn count(&self, prompt: &str) -> Result<usize> {
        Ok(count_tokens(&self.text, prompt)? + 1 + usize::from(self.bos_id.is_some()))
    }
}

/// How many tokens all of a prompt has.
pub(super) fn count_tokens(text: &Tokenizer, prompt: &str) -> Result<usize> {
    let tokens = text.encode_fast(prompt, false);
    let tokens = tokens.map_err(|source| TokenizerError::Encode { source })?;
    Ok(tokens.len())
}

/// The first `count` tokens of a prompt.
///
/// Tokenizes a head of it, longer and longer until that gives twice `count`: the head ends between words, and
/// whatever its end changes lies past `count`.
pub(super) fn first_tokens(text: &Tokenizer, prompt: &str, count: usize) -> Result<Vec<i64>> {
    let mut length = count.saturating_mul(64);
    loop {
        let mut rest = prompt.bytes().skip(length);
        let blank = rest.position(|byte| byte.is_ascii_whitespace());
        let head = blank.map_or(prompt, |blank| &prompt[..length + blank]);
        let tokens = text.encode_fast(head, false);
        let tokens = tokens.map_err(|source| TokenizerError::Encode { source })?;
        let ids = tokens.get_ids();
        if head.len() == prompt.len() || ids.len() >= count.saturating_mul(2) {
            return Ok(ids.iter().take(count).map(|&id| id.into()).collect());
        }
        length = head.len().saturating_mul(2);
    }
}

/// Id of a token that must be there.
pub(super) fn token_id(
    text: &Tokenizer,
    path: &Path,
    role: &'static str,
    token: &str,
) -> Result<i64> {
    match text.token_to_id(token) {
        Some(id) => Ok(i64::from(id)),
        None => Err(TokenizerError::MissingToken {
            path: path.into(),
            role,
            token: token.into(),
        }),
    }
}

/// Refuses an added token that normalizes to nothing: it would match everywhere, even inside a character.
pub(super) fn check_added_tokens(text: &Tokenizer, path: &Path) -> Result<()> {
    let added = text.get_added_tokens_decoder();
    for AddedToken { content, .. } in added.values().filter(|token| token.normalized) {
        let mut normalized = NormalizedString::from(content.as_str());
        let normalizer = text.get_normalizer();
        let done = normalizer.map_or(Ok(()), |it| it.normalize(&mut normalized));
        done.map_err(malformed(path))?;
        if normalized.is_empty() {
            return Err(malformed(path)(format!("added token {content:?} is blank")));
        }
    }
    Ok(())
}
