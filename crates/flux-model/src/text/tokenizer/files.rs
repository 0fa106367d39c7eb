//! The files of a tokenizer folder: its settings, its merges, its `tokenizer.json` made harmless.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_core::files::strict_json;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::charsmap::check_normalizer;
use super::error::{Cause, Result, TokenizerError, malformed};
use super::sentencepiece::MAX_PIECE_BYTES;

/// Largest file read, in bytes; T5's `tokenizer.json` takes 2.5 MB.
const MAX_FILE: u64 = 64 << 20;

/// `tokenizer_config.json` and, for what it leaves out, `special_tokens_map.json`; an absent file sets nothing.
pub(super) struct Settings {
    json: Option<PathBuf>,
    path: PathBuf,
    pub(super) config: Value,
    map: Value,
    added: BTreeMap<u32, AddedToken>,
}

impl Settings {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = path.join("tokenizer.json");
        let (folder, json) = match path.parent() {
            Some(folder) if !path.is_dir() => (folder, Some(path.to_path_buf())),
            _ => (path, Some(file).filter(|file| file.is_file())),
        };
        let value = |path: &Path| match path.is_file() {
            true => strict_json::parse_json(&read(path)?).map_err(malformed(path)),
            false => Ok(Value::Null),
        };
        let path = folder.join("tokenizer_config.json");
        let config = value(&path)?;
        let map = value(&folder.join("special_tokens_map.json"))?;
        let added = Option::deserialize(&config["added_tokens_decoder"]);
        let added = added.map_err(malformed(&path))?.unwrap_or_default();
        Ok(Self {
            json,
            path,
            config,
            map,
            added,
        })
    }

    /// The text pipeline of the `tokenizer.json`, if there is one, and its path.
    pub(super) fn read_json(&self) -> Result<Option<(Tokenizer, PathBuf)>> {
        let Some(path) = &self.json else {
            return Ok(None);
        };
        let text = parse_json(&read(path)?).map_err(malformed(path))?;
        Ok(Some((text, path.clone())))
    }

    /// A special token by role, written as a string or as an object with its `content`.
    pub(super) fn token(&self, role: &str) -> Option<&str> {
        let mut tokens = [&self.config[role], &self.map[role]].into_iter();
        tokens.find_map(|token| token.get("content").unwrap_or(token).as_str())
    }

    pub(super) fn model_max_length(&self, default: usize) -> usize {
        let length = self.config["model_max_length"].as_u64(); // "no limit" is written as 1e30
        length.map_or(default, |length| length as usize)
    }

    /// T5's sentinels `<extra_id_99>` to `<extra_id_0>`, which stand after the pieces in this order.
    pub(super) fn extra_tokens(&self) -> impl Iterator<Item = AddedToken> {
        let count = self.config["extra_ids"].as_u64().unwrap_or(100).min(10_000);
        let names = (0..count).rev().map(|index| format!("<extra_id_{index}>"));
        names.map(|name| AddedToken::from(name, true))
    }

    /// Registers the tokens found before text is split: those of `special` that exist, and all that the settings list.
    pub(super) fn add_tokens(
        &self,
        text: &mut Tokenizer,
        mut special: Vec<AddedToken>,
    ) -> Result<()> {
        let listed: BTreeSet<_> = self.added.values().map(|token| &token.content).collect();
        special.retain(|token| !listed.contains(&token.content));
        special.retain(|token| text.token_to_id(&token.content).is_some());
        special.extend(self.added.values().cloned());
        text.add_tokens(&special);
        for (id, AddedToken { content, .. }) in &self.added {
            if text.token_to_id(content) != Some(*id) {
                let error = format!("added token `{content}` cannot have the id {id}");
                return Err(malformed(&self.path)(error));
            }
        }
        Ok(())
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let error = |source| TokenizerError::Read {
        path: path.into(),
        source,
    };
    strict_json::read_file(path, MAX_FILE).map_err(error)
}

/// Builds the text pipeline of a `tokenizer.json`, deterministic and without anything around the tokens.
fn parse_json(bytes: &[u8]) -> Result<Tokenizer, Cause> {
    let mut json: Value = strict_json::parse_json(bytes)?;
    for part in ["truncation", "padding", "post_processor", "decoder"] {
        json.get_mut(part).map(Value::take);
    }
    json.pointer_mut("/model/dropout").map(Value::take);
    check_normalizer(&json["normalizer"])?;
    let pieces = json["model"]["vocab"].as_array().into_iter().flatten();
    for piece in pieces.filter_map(|piece| piece[0].as_str()) {
        if piece.len() > MAX_PIECE_BYTES {
            return Err(format!("a piece is longer than {MAX_PIECE_BYTES} bytes").into());
        }
    }
    Ok(serde_json::from_value(json)?)
}

/// The first `count` merges of a `merges.txt`.
pub(super) fn parse_merges(bytes: &[u8], count: usize) -> Result<Vec<(String, String)>, Cause> {
    let lines = std::str::from_utf8(bytes)?.trim().lines().enumerate();
    let merge = |(index, line): (usize, &str)| {
        let (left, right) = line
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty())
            .ok_or_else(|| format!("line {} is not a pair of tokens", index + 1))?;
        Ok((left.to_owned(), right.to_owned()))
    };
    lines.skip(1).take(count).map(merge).collect() // the first line is a version
}
