//! A `spiece.model`, read strictly.

use tokenizers::AddedToken;

use super::error::{Cause, Result};

/// Longest unigram piece accepted: the model keeps a tree as deep as its longest piece and frees it recursively.
pub(super) const MAX_PIECE_BYTES: usize = 512;

/// What a `spiece.model` says, a protobuf `ModelProto`.
#[derive(Default)]
pub(super) struct SentencePiece {
    pub(super) pieces: Vec<(String, f64)>,
    pub(super) added: Vec<AddedToken>,
    pub(super) unk_id: usize,
    pub(super) byte_fallback: bool,
    pub(super) charsmap: Vec<u8>,
}

impl SentencePiece {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Cause> {
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
