use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use super::error::{Cause, Result};
use super::framed::first_tokens;
use super::{ClipTokenizer, T5Tokenizer};

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
