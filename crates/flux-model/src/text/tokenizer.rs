//! The two tokenizers of FLUX.1: a prompt to the token ids that CLIP-L and T5-XXL read.
//!
//! Source: huggingface/transformers 4.57.6 `convert_slow_tokenizer.py` (`CLIPConverter`, `T5Converter`) and
//! sentencepiece 0.2 `sentencepiece_model.proto`.
//!
//! - `tokenizer.json` is used when present. Without it the same pipeline is built from `vocab.json` and `merges.txt`
//!   (CLIP) or from `spiece.model` (T5).
//! - BOS, EOS, truncation and padding are put here; what a file stores about them is dropped. A special token written
//!   in a prompt becomes its id.
//! - CLIP text is not repaired with `ftfy`, as in the fast Python tokenizer: ligatures, curly quotes, HTML entities and
//!   the Greek final sigma can differ from the slow one.
//! - Only the head of a long prompt is read, up to a blank, so its length costs nothing. One endless word is read
//!   whole, in linear time (1 to 4 s per MB).
//! - `tokenizers` trusts its files and panics on broken ones: JSON and charsmap are checked here first.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lora_core::files::strict_json;
use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{Lowercase, NFC, Precompiled, Sequence, Strip};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as Steps;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizedString, Normalizer as _, NormalizerWrapper, SplitDelimiterBehavior,
    Tokenizer,
};

/// Words of CLIP: contractions, runs of letters, single digits, runs of anything else but blanks.
const CLIP_WORDS: &str = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
/// Merges of CLIP's 49152 tokens besides bytes and special tokens; the Python tokenizer reads no more.
const CLIP_MERGES: usize = 49152 - 256 - 2;
/// Largest file read, in bytes; T5's `tokenizer.json` takes 2.5 MB.
const MAX_FILE: u64 = 64 << 20;
/// Longest unigram piece accepted: the model keeps a tree as deep as its longest piece and frees it recursively.
const MAX_PIECE_BYTES: usize = 512;

pub(super) type Cause = Box<dyn std::error::Error + Send + Sync>;
pub(super) type Result<T, E = TokenizerError> = std::result::Result<T, E>;

/// Why a tokenizer cannot be loaded or a prompt cannot be encoded.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum TokenizerError {
    #[error("cannot read `{}`", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("`{}` is not a usable tokenizer file", path.display())]
    Malformed { path: PathBuf, source: Cause },
    #[error("`{}` has no {role} token `{token}`", path.display())]
    MissingToken {
        path: PathBuf,
        role: &'static str,
        token: String,
    },
    #[error("max_length is {max_length}, the special tokens alone need {needed}")]
    TooShort { max_length: usize, needed: usize },
    #[error("cannot tokenize the prompt")]
    Encode { source: Cause },
}

/// Lower-casing byte-level BPE: `<|startoftext|>`, tokens, `<|endoftext|>`, padding.
#[derive(Debug, Clone)]
pub struct ClipTokenizer(Framed);

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

/// SentencePiece unigram model: tokens, `</s>`, padding.
#[derive(Debug, Clone)]
pub struct T5Tokenizer(Framed);

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

/// A text pipeline and the ids put around its tokens.
#[derive(Debug, Clone)]
struct Framed {
    text: Tokenizer,
    bos_id: Option<i64>,
    eos_id: i64,
    pad_id: i64,
    model_max_length: usize,
}

impl Framed {
    fn new(
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

    fn encode(&self, prompt: &str, max_length: usize) -> Result<Vec<i64>> {
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

    fn count(&self, prompt: &str) -> Result<usize> {
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

/// `tokenizer_config.json` and, for what it leaves out, `special_tokens_map.json`; an absent file sets nothing.
pub(super) struct Settings {
    json: Option<PathBuf>,
    path: PathBuf,
    config: Value,
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

    fn model_max_length(&self, default: usize) -> usize {
        let length = self.config["model_max_length"].as_u64(); // "no limit" is written as 1e30
        length.map_or(default, |length| length as usize)
    }

    /// T5's sentinels `<extra_id_99>` to `<extra_id_0>`, which stand after the pieces in this order.
    fn extra_tokens(&self) -> impl Iterator<Item = AddedToken> {
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

pub(super) fn malformed<E: Into<Cause>>(path: &Path) -> impl Fn(E) -> TokenizerError {
    move |source| TokenizerError::Malformed {
        path: path.into(),
        source: source.into(),
    }
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

/// Checks the charsmaps of a `tokenizer.json`, written in base64.
fn check_normalizer(normalizer: &Value) -> Result<(), Cause> {
    for step in normalizer["normalizers"].as_array().into_iter().flatten() {
        check_normalizer(step)?;
    }
    if normalizer["type"] == "Precompiled" {
        let charsmap = &normalizer["precompiled_charsmap"];
        let blob = STANDARD.decode(charsmap.as_str().unwrap_or_default())?;
        check_charsmap(&blob)?;
        serde_json::from_str::<Precompiled>(&normalizer.to_string())?;
    }
    Ok(())
}

/// Checks a charsmap, whose double array is walked without looking: its size in bytes, its units, replacement texts.
fn check_charsmap(blob: &[u8]) -> Result<(), Cause> {
    let outside = "the precompiled charsmap points outside itself";
    let (size, rest) = blob.split_first_chunk().ok_or(outside)?;
    let size = u32::from_le_bytes(*size) as usize;
    let (units, texts) = rest.split_at_checked(size).ok_or(outside)?;
    let texts = std::str::from_utf8(texts)?;
    let (units, []) = units.as_chunks() else {
        return Err(outside.into());
    };
    let unit = |index: usize| u32::from_le_bytes(units[index]) as usize;
    let fits = |index: usize| {
        let unit_here = unit(index);
        let child = index ^ ((unit_here >> 10) << ((unit_here & (1 << 9)) >> 6));
        let (is_value, has_value) = (unit_here >> 31 == 1, unit_here >> 8 & 1 == 1);
        let value_fits = || !has_value || texts.is_char_boundary(unit(child) & 0x7fff_ffff);
        is_value || (child | 0xff) < units.len() && value_fits()
    };
    let sound = !units.is_empty() && (0..units.len()).all(fits);
    sound.then_some(()).ok_or(outside.into())
}

/// What a `spiece.model` says, a protobuf `ModelProto`.
#[derive(Default)]
struct SentencePiece {
    pieces: Vec<(String, f64)>,
    added: Vec<AddedToken>,
    unk_id: usize,
    byte_fallback: bool,
    charsmap: Vec<u8>,
}

impl SentencePiece {
    fn parse(bytes: &[u8]) -> Result<Self, Cause> {
        let mut model = Self::default();
        let (mut trainer, mut normalizer) = (None, None);
        for field in fields(bytes)? {
            match field {
                (1, Field::Bytes(piece)) => {
                    let index = model.pieces.len();
                    let read = model.read_piece(piece);
                    read.map_err(|error| format!("piece {index}: {error}"))?;
                }
                (2, Field::Bytes(spec)) => trainer = Some(spec),
                (3, Field::Bytes(spec)) => normalizer = Some(spec),
                _ => {}
            }
        }
        // Both stand after the pieces, so a file cut between two pieces lacks them.
        let (Some(trainer), Some(normalizer)) = (trainer, normalizer) else {
            return Err("it has no trainer_spec or no normalizer_spec; is it cut short?".into());
        };
        for field in fields(trainer)? {
            match field {
                (3, Field::Number(1)) => {}
                (3, Field::Number(2)) => return Err("its model_type is bpe, not unigram".into()),
                (3, Field::Number(3)) => return Err("its model_type is word, not unigram".into()),
                (3, Field::Number(4)) => return Err("its model_type is char, not unigram".into()),
                (3, Field::Number(_)) => return Err("its model_type is unknown".into()),
                (35, Field::Number(on)) => model.byte_fallback = on != 0,
                (40, Field::Number(id)) => model.unk_id = usize::try_from(id)?,
                _ => {}
            }
        }
        for field in fields(normalizer)? {
            let name = match field {
                (2, Field::Bytes(charsmap)) => {
                    model.charsmap = charsmap.to_vec();
                    continue;
                }
                (3, Field::Number(0)) => "add_dummy_prefix",
                (4, Field::Number(0)) => "remove_extra_whitespaces",
                (5, Field::Number(0)) => "escape_whitespaces",
                _ => continue,
            };
            return Err(format!("its {name} is off, which T5 does not know").into());
        }
        Ok(model)
    }

    fn read_piece(&mut self, bytes: &[u8]) -> Result<(), Cause> {
        let (mut piece, mut score, mut kind) = ("", 0.0, 1);
        for field in fields(bytes)? {
            match field {
                (1, Field::Bytes(text)) => piece = std::str::from_utf8(text)?,
                (2, Field::Bytes(value)) => score = f32::from_le_bytes(value.try_into()?),
                (3, Field::Number(value)) => kind = value,
                _ => {}
            }
        }
        if piece.len() > MAX_PIECE_BYTES {
            return Err(format!("longer than {MAX_PIECE_BYTES} bytes").into());
        }
        if !score.is_finite() {
            return Err("its score is not finite".into());
        }
        let (is_control, is_user_defined) = (kind == 3, kind == 4);
        if is_control || is_user_defined {
            let token = AddedToken::from(piece, is_control).normalized(false);
            self.added.push(token);
        }
        self.pieces.push((piece.to_owned(), score.into()));
        Ok(())
    }
}

/// One protobuf value: a varint, or bytes of a fixed or stated length.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The numbered fields of a protobuf message, in file order.
fn fields(mut rest: &[u8]) -> Result<Vec<(u64, Field<'_>)>, Cause> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        let field = match tag & 7 {
            0 => Field::Number(varint(&mut rest)?),
            1 => Field::Bytes(take(&mut rest, 8)?),
            2 => {
                let length = varint(&mut rest)?;
                Field::Bytes(take(&mut rest, length)?)
            }
            5 => Field::Bytes(take(&mut rest, 4)?),
            other => return Err(format!("protobuf wire type {other} is not supported").into()),
        };
        found.push((tag >> 3, field));
    }
    Ok(found)
}

fn take<'a>(rest: &mut &'a [u8], length: u64) -> Result<&'a [u8], Cause> {
    let left = rest.len();
    let length_here = usize::try_from(length).unwrap_or(usize::MAX);
    let field = rest.split_off(..length_here);
    field.ok_or_else(|| format!("a protobuf field of {length} bytes has {left} left").into())
}

fn varint(rest: &mut &[u8]) -> Result<u64, Cause> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = rest
            .split_off_first()
            .ok_or("a protobuf number is cut short")?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a protobuf number is longer than ten bytes".into())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::SafeTensors;
    use tempfile::TempDir;

    use super::*;

    type TestResult<T = ()> = Result<T, Cause>;

    const CASE: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/fixtures/parity/tokenizers"
    );

    fn case(name: &str) -> PathBuf {
        Path::new(CASE).join(name)
    }

    fn clip() -> Result<ClipTokenizer> {
        ClipTokenizer::load(&case("tokenizer"))
    }

    fn t5() -> Result<T5Tokenizer> {
        T5Tokenizer::load(&case("tokenizer_2"))
    }

    fn t5_from_spiece(config: &str) -> TestResult<T5Tokenizer> {
        let copies = ["tokenizer_2/spiece.model"];
        let folder = folder(&copies, "tokenizer_config.json", config.as_bytes())?;
        Ok(T5Tokenizer::load(folder.path())?)
    }

    /// The prompts, and the rows of one tensor of the reference.
    fn reference(name: &str) -> TestResult<(Vec<String>, Vec<Vec<i64>>)> {
        let case_json: Value = serde_json::from_slice(&fs::read(case("case.json"))?)?;
        let bytes = fs::read(case("expected.safetensors"))?;
        let tensor = SafeTensors::deserialize(&bytes)?.tensor(name)?;
        let ids = tensor.data().as_chunks().0.iter();
        let ids: Vec<i64> = ids.map(|id| i64::from_le_bytes(*id)).collect();
        let rows = ids.chunks(tensor.shape()[1]).map(<[i64]>::to_vec).collect();
        Ok((Vec::deserialize(&case_json["prompts"])?, rows))
    }

    /// A folder with copies of some files of the case and with one other file.
    fn folder(copies: &[&str], name: &str, bytes: &[u8]) -> TestResult<TempDir> {
        let folder = tempfile::tempdir()?;
        for copy in copies {
            let name = Path::new(copy).file_name().ok_or("a file")?;
            fs::write(folder.path().join(name), fs::read(case(copy))?)?;
        }
        fs::write(folder.path().join(name), bytes)?;
        Ok(folder)
    }

    /// An error with its causes on one line, after checking that it names the file.
    fn error_line<T>(result: Result<T>, file: &str) -> String {
        let error = result.err().expect("a broken file");
        let mut line = error.to_string();
        assert!(line.contains(&format!("{file}`")), "{line}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            line += &format!(": {cause}");
            source = cause.source();
        }
        assert!(!line.contains('\n'), "{line}");
        line
    }

    #[test]
    fn clip_ids_equal_the_reference() -> TestResult {
        let ((prompts, slow), (_, fast)) = (reference("clip_ids")?, reference("clip_ids_fast")?);
        for tokenizer in [clip()?, ClipTokenizer::load(&case("clip_tokenizer.json"))?] {
            assert_eq!(tokenizer.eos_id(), 773);
            assert_eq!(tokenizer.model_max_length(), 77);
            for (index, prompt) in prompts.iter().enumerate() {
                let ids = tokenizer.encode(prompt, 77)?;
                assert_eq!(ids, fast[index], "{prompt:?}");
                // Only the slow tokenizer repairs text first, which changes two prompts.
                assert!(ids == slow[index] || [8, 10].contains(&index), "{prompt:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn t5_ids_equal_the_reference() -> TestResult {
        for tokenizer in [t5()?, t5_from_spiece("{}")?] {
            assert_eq!(tokenizer.eos_id(), 1);
            assert_eq!(tokenizer.model_max_length(), 512);
            for max_length in [64, 256] {
                let (prompts, expected) = reference(&format!("t5_ids_{max_length}"))?;
                for (prompt, expected) in prompts.iter().zip(expected) {
                    let ids = tokenizer.encode(prompt, max_length)?;
                    assert_eq!(ids, expected, "{prompt:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn special_tokens_and_blanks_read_alike_from_both_kinds_of_files() -> TestResult {
        for tokenizer in [t5()?, t5_from_spiece("{}")?] {
            assert_eq!(tokenizer.encode("", 2)?, [1, 0]);
            assert_eq!(tokenizer.encode(" \t\n", 2)?, [1, 0]);
            let ids = tokenizer.encode("<extra_id_0> <extra_id_99></s><pad><unk>", 8)?;
            assert_eq!(ids, [297, 198, 1, 0, 2, 1, 0, 0]);
        }
        for tokenizer in [clip()?, ClipTokenizer::load(&case("clip_tokenizer.json"))?] {
            assert_eq!(tokenizer.encode("", 3)?, [772, 773, 773]);
            assert_eq!(tokenizer.encode("\u{a0}\n", 3)?, [772, 773, 773]);
            let ids = tokenizer.encode("<|endoftext|> <|STARTOFTEXT|>", 5)?;
            assert_eq!(ids, [772, 773, 772, 773, 773]);
        }
        Ok(())
    }

    #[test]
    fn legacy_t5_starts_a_word_after_a_special_token() -> TestResult {
        for (config, scheme) in [
            ("{}", ["▁a", "▁a"]),
            (r#"{"legacy": false}"#, ["▁a", "a"]),
            (r#"{"add_prefix_space": false}"#, ["a", "a"]),
        ] {
            let tokenizer = t5_from_spiece(config)?;
            let pieces = scheme.map(|piece| tokenizer.0.text.token_to_id(piece).map(i64::from));
            let ids = tokenizer.encode("a<extra_id_0>a", 4)?;
            assert_eq!([Some(ids[0]), Some(ids[2])], pieces, "{config}");
        }
        Ok(())
    }

    #[test]
    fn what_a_file_stores_about_truncation_padding_and_dropout_is_dropped() -> TestResult {
        let mut json: Value = serde_json::from_slice(&fs::read(case("clip_tokenizer.json"))?)?;
        json["truncation"] = serde_json::from_str(
            r#"{"direction": "Left", "max_length": 1, "strategy": "LongestFirst", "stride": 0}"#,
        )?;
        json["padding"] = serde_json::from_str(
            r#"{"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}"#,
        )?;
        json["model"]["dropout"] = 0.9.into();
        let folder = folder(&[], "tokenizer.json", json.to_string().as_bytes())?;
        let tokenizer = ClipTokenizer::load(folder.path())?;
        let (prompts, expected) = reference("clip_ids_fast")?;
        assert_eq!(tokenizer.encode(&prompts[0], 77)?, expected[0]);
        Ok(())
    }

    #[test]
    fn the_head_of_a_long_prompt_gives_its_tokens() -> TestResult {
        let text = reference("clip_ids")?.0.concat();
        for prompt in [
            text.repeat(4000),
            [&text, " ".repeat(30_000).as_str(), &text].concat(),
            text.replace(' ', "").repeat(10),
        ] {
            for (tokenizer, count) in [(&clip()?.0, 75), (&t5()?.0, 511)] {
                let start = &prompt[..prompt.floor_char_boundary(40_000)];
                let whole = tokenizer.text.encode_fast(start, false)?;
                let head = first_tokens(&tokenizer.text, &prompt, count)?;
                let head: Vec<u32> = head.into_iter().map(|id| id as u32).collect();
                assert_eq!(head, whole.get_ids()[..count]);
            }
        }
        Ok(())
    }

    #[test]
    fn a_broken_tokenizer_json_is_an_error() -> TestResult {
        let text = fs::read_to_string(case("tokenizer_2/tokenizer.json"))?;
        let key = "\"precompiled_charsmap\": \"";
        let charsmap = text.find(key).ok_or("a charsmap")? + key.len();
        let patched = |at, with: &str| [&text[..at], with, &text[at + with.len()..]].concat();
        for (json, message) in [
            ("not JSON", "expected ident"),
            ("[1]", "is not a usable tokenizer file"),
            (&text[..charsmap], "EOF while parsing"),
            (&patched(charsmap, "////"), "charsmap points outside itself"),
            (&patched(charsmap + 1000, "?"), "Invalid symbol 63"),
            (&text.replace("\"</s>\"", "\"s\""), "no eos token `</s>`"),
        ] {
            let folder = folder(&[], "tokenizer.json", json.as_bytes())?;
            let line = error_line(T5Tokenizer::load(folder.path()), "tokenizer.json");
            assert!(line.contains(message), "{line}");
        }
        Ok(())
    }

    #[test]
    fn a_broken_spiece_model_is_an_error() -> TestResult {
        let error = |bytes: &[u8]| -> TestResult<String> {
            let folder = folder(&[], "spiece.model", bytes)?;
            Ok(error_line(T5Tokenizer::load(folder.path()), "spiece.model"))
        };
        let model = fs::read(case("tokenizer_2/spiece.model"))?;
        for length in (0..model.len()).step_by(997) {
            error(&model[..length])?;
        }
        for (bytes, message) in [
            (&b"\x0a\xff\xff\xff\xff\x0f"[..], "4294967295 bytes has 0"),
            (&[0xff; 10], "longer than ten bytes"),
            (b"\x0b", "wire type 3 is not supported"),
            (b"\x0a\x03\x0a\x01\xff", "piece 0: invalid utf-8"),
            (b"\x0a\x05\x15\x00\x00\xc0\x7f", "score is not finite"),
            (b"\x0a\x03\x0a\x01a", "is it cut short?"),
            (b"\x12\x02\x18\x02\x1a\x00", "is bpe, not unigram"),
            (b"\x12\x00\x1a\x02\x18\x00", "add_dummy_prefix is off"),
            (b"\x12\x00\x1a\x03\x12\x01\xff", "outside itself"),
            (b"\x0a\x03\x0a\x01a\x12\x00\x1a\x00", "no eos token"),
        ] {
            let line = error(bytes)?;
            assert!(line.contains(message), "{line}");
        }
        Ok(())
    }

    #[test]
    fn a_broken_clip_or_settings_file_is_an_error() -> TestResult {
        let added = r#"{"added_tokens_decoder": {"7": {"content": "new", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}}}"#;
        let copies = ["tokenizer/vocab.json", "tokenizer/merges.txt"];
        for (file, text, message) in [
            ("vocab.json", r#"{"a": -1}"#, "invalid value"),
            ("merges.txt", "#version\ni n\nword", "line 3 is not a pair"),
            ("merges.txt", "#version\ni nope", "`nope` out of"),
            ("special_tokens_map.json", "{", "EOF"),
            ("tokenizer_config.json", added, "`new` cannot have the id 7"),
        ] {
            let folder = folder(&copies, file, text.as_bytes())?;
            let line = error_line(ClipTokenizer::load(folder.path()), file);
            assert!(line.contains(message), "{line}");
        }
        let blank = added.replace("new", " ").replace("7", "298");
        let blank = blank.replace(r#""normalized": false"#, r#""normalized": true"#);
        let error = t5_from_spiece(&blank).err().ok_or("a blank token")?;
        assert!(format!("{error:?}").contains("is blank"), "{error:?}");
        let renamed = folder(&copies, "tokenizer_config.json", br#"{"eos_token": "end"}"#)?;
        let line = error_line(ClipTokenizer::load(renamed.path()), "vocab.json");
        assert!(line.ends_with("no eos token `end`"), "{line}");
        error_line(ClipTokenizer::load(&case("nowhere")), "nowhere");
        error_line(T5Tokenizer::load(&case("tokenizer")), "spiece.model");
        Ok(())
    }

    #[test]
    fn counted_tokens_are_what_a_long_encoding_holds_before_its_padding() -> TestResult {
        let (prompts, _) = reference("clip_ids")?;
        for prompt in &prompts {
            let (clip, t5) = (clip()?, t5()?);
            let count = clip.count(prompt)?;
            let ids = clip.encode(prompt, count + 1)?;
            assert_eq!(ids[count - 1..], [773, 773], "{prompt:?}");
            assert_eq!(clip.encode(prompt, count)?[..], ids[..count], "{prompt:?}");
            let count = t5.count(prompt)?;
            assert_eq!(
                t5.encode(prompt, count + 1)?[count - 1..],
                [1, 0],
                "{prompt:?}"
            );
        }
        Ok(())
    }

    #[test]
    fn max_length_needs_room_for_the_special_tokens() -> TestResult {
        assert_eq!(clip()?.encode("a cat", 2)?, [772, 773]);
        assert_eq!(t5()?.encode("a cat", 1)?, [1]);
        let error = clip()?.encode("", 1).expect_err("no room");
        assert!(error.to_string().ends_with("tokens alone need 2"));
        assert!(t5()?.encode("", 0).is_err());
        Ok(())
    }
}
