//! The precompiled character map of a SentencePiece normalizer, checked: `tokenizers` walks it without looking.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tokenizers::normalizers::Precompiled;

use super::error::Cause;

/// Checks the charsmaps of a `tokenizer.json`, written in base64.
pub(super) fn check_normalizer(normalizer: &Value) -> Result<(), Cause> {
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
pub(super) fn check_charsmap(blob: &[u8]) -> Result<(), Cause> {
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
