//! Text files of a dataset: bounded in size, UTF-8, and refused by the name of their encoding if they are something else.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::data::error::{DatasetError, read_error};

/// The encoders read 512 tokens at most; this is some thirty times as much text.
pub(super) const MAX_CAPTION_BYTES: u64 = 64 << 10;

/// The caption in a file, without a byte-order mark and surrounding white space.
pub(super) fn read_caption(path: &Path) -> Result<String, DatasetError> {
    let wrong = |problem: String| DatasetError::Caption {
        path: path.into(),
        problem,
    };
    let bytes = read_up_to(path, MAX_CAPTION_BYTES)?;
    let bytes = bytes.ok_or_else(|| wrong("is larger than 64 KiB".into()))?;
    Ok(decode(&bytes).map_err(wrong)?.trim().to_owned())
}

/// The text in these bytes, without a byte-order mark; or the end of a sentence that says what they are instead.
pub(super) fn decode(bytes: &[u8]) -> Result<&str, String> {
    const MEND: &str = "save it as UTF-8";
    for (mark, encoding) in [
        (&b"\xff\xfe\0\0"[..], "UTF-32"),
        (b"\0\0\xfe\xff", "UTF-32"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ] {
        if bytes.starts_with(mark) {
            return Err(format!("is {encoding}, not UTF-8: {MEND}"));
        }
    }
    let looks_like = if is_wide(bytes) {
        "; it looks like UTF-16 without a mark"
    } else if is_single_byte(bytes) {
        "; it looks like Windows-1252 or Latin-1"
    } else {
        ""
    };
    let Ok(text) = str::from_utf8(bytes) else {
        return Err(format!("is not UTF-8{looks_like}: {MEND}"));
    };
    if is_wide(bytes) {
        return Err(format!("is not UTF-8 text{looks_like}: {MEND}"));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text); // Windows editors put it there
    check_characters(text)?;
    Ok(text)
}

/// Refuses characters that no caption has: they come from a binary file or a wrong encoding, and tokenizers drop them or
/// make something else of them.
pub(super) fn check_characters(text: &str) -> Result<(), String> {
    let is_wrong = |c: &char| (c.is_control() && !"\t\n\r".contains(*c)) || *c == '\u{fffd}';
    match text.chars().find(is_wrong) {
        None => Ok(()),
        Some('\u{fffd}') => Err(
            "holds U+FFFD, which stands where a character was lost: write it anew, as UTF-8".into(),
        ),
        Some(c) => Err(format!(
            "holds the control character U+{:04X}: is it UTF-8 text? Remove it",
            u32::from(c)
        )),
    }
}

/// Whether most bytes at the even or at the odd places are below 32, as one half of UTF-16 is in most scripts but Chinese,
/// Japanese and Korean.
fn is_wide(bytes: &[u8]) -> bool {
    let (pairs, _) = bytes.as_chunks::<2>();
    [0, 1].into_iter().any(|half| {
        let low = pairs
            .iter()
            .filter(|pair| pair[half] < 32 && !b"\t\n\r".contains(&pair[half]));
        2 * low.count() > pairs.len()
    })
}

/// Whether there are few bytes beyond ASCII, and none that Windows-1252 has no character for.
fn is_single_byte(bytes: &[u8]) -> bool {
    let high = bytes.iter().filter(|byte| !byte.is_ascii()).count();
    let unused = |byte: &u8| matches!(byte, 0x81 | 0x8d | 0x8f | 0x90 | 0x9d);
    high > 0 && 3 * high <= bytes.len() && !bytes.iter().any(unused)
}

/// Opens a regular file; a pipe in a dataset would block for ever.
pub(super) fn open(path: &Path) -> Result<File, DatasetError> {
    let cannot_read = |error| read_error(path, error);
    if !fs::metadata(path).map_err(cannot_read)?.is_file() {
        return Err(cannot_read(io::Error::other("it is not a file")));
    }
    File::open(path).map_err(cannot_read)
}

/// The bytes of a file, or `None` if there are more than `max`.
pub(super) fn read_up_to(path: &Path, max: u64) -> Result<Option<Vec<u8>>, DatasetError> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(max + 1).read_to_end(&mut bytes);
    read.map_err(|error| read_error(path, error))?;
    Ok((bytes.len() as u64 <= max).then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_and_windows_line_ends_are_no_matter() {
        assert_eq!(
            decode("\u{feff}a\tcafé\r\n日本".as_bytes()),
            Ok("a\tcafé\r\n日本")
        );
        assert_eq!(decode(b""), Ok(""));
    }

    #[test]
    fn other_encodings_are_named() {
        let utf16 = |text: &str, to: fn(u16) -> [u8; 2]| -> Vec<u8> {
            text.encode_utf16().flat_map(to).collect()
        };
        for text in [
            "a cat",
            "naïve café",
            "кот на столе",
            "γάτα στο τραπέζι",
            "חתול",
        ] {
            for to in [u16::to_le_bytes, u16::to_be_bytes] {
                let error = decode(&utf16(text, to)).expect_err(text);
                assert!(
                    error.contains("looks like UTF-16 without a mark"),
                    "{text}: {error}"
                );
                let marked = utf16(&format!("\u{feff}{text}"), to);
                assert_eq!(
                    decode(&marked).expect_err(text),
                    "is UTF-16, not UTF-8: save it as UTF-8"
                );
            }
        }
        for bytes in [
            &b"caf\xe9"[..],
            b"na\xefve \x93quoted\x94 caf\xe9",
            b"5 \x80",
        ] {
            let error = decode(bytes).expect_err("not UTF-8");
            assert_eq!(
                error,
                "is not UTF-8; it looks like Windows-1252 or Latin-1: save it as UTF-8"
            );
        }
        // Shift-JIS, GBK, KOI8-R
        for bytes in [
            &b"\x94\x4c\x82\xaa\x82\xa2\x82\xe9"[..],
            b"\xc3\xa8\xd4\xda",
            b"\xcb\xcf\xd4",
        ] {
            let error = decode(bytes).expect_err("not UTF-8");
            assert_eq!(error, "is not UTF-8: save it as UTF-8");
        }
        assert!(
            decode(b"\xff\xfe\0\0a\0\0\0")
                .expect_err("marked")
                .contains("UTF-32")
        );
    }

    #[test]
    fn control_characters_and_lost_characters_are_refused() {
        for (text, says) in [
            ("a\0cat", "U+0000"),
            ("\u{1b}[31mred", "U+001B"),
            ("a\u{7f}", "U+007F"),
            ("itâ\u{80}\u{99}s", "U+0080"),
            ("caf\u{fffd}", "U+FFFD"),
        ] {
            let error = decode(text.as_bytes()).expect_err(text);
            assert!(error.contains(says), "{error}");
        }
    }
}
