use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::Path;

use proptest::prelude::*;
use safetensors::SafeTensors;
use tempfile::TempDir;

use crate::files::host::{Dtype, HostTensor};

use super::header::*;
use super::shards::MAX_INDEX;
use super::*;

const F32: &str = r#""dtype":"F32","shape":[1]"#;

/// A file of this header and data, with the length that belongs to the header.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [
        &(header.len() as u64).to_le_bytes(),
        header.as_bytes(),
        data,
    ]
    .concat()
}

fn open(bytes: &[u8]) -> Result<TensorFile, FileError> {
    TensorFile::from_bytes(Path::new("x.safetensors"), bytes.into())
}

fn open_on_disk(bytes: &[u8]) -> Result<TensorFile, FileError> {
    let folder = folder([("x.safetensors", bytes)]);
    TensorFile::open(&folder.path().join("x.safetensors"))
}

fn folder<'a>(files: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).expect("a writable folder");
    }
    folder
}

/// The whole chain of messages, without the folder.
fn message(error: FileError) -> String {
    let mut message = error.to_string();
    let mut error: &dyn std::error::Error = &error;
    while let Some(source) = error.source() {
        message = format!("{message}: {source}");
        error = source;
    }
    let start = message.find('`').expect("a path") + 1;
    let end = start + message[start..].find('`').expect("a path");
    let name = Path::new(&message[start..end]).file_name();
    let name = name.and_then(|name| name.to_str()).expect("a name");
    format!("{}{name}{}", &message[..start], &message[end..])
}

#[track_caller]
fn refused(bytes: &[u8], expected: &str) {
    for outcome in [open(bytes), open_on_disk(bytes)] {
        assert_eq!(message(outcome.expect_err("a bad file")), expected);
    }
}

#[track_caller]
fn refused_header(header: &str, data_len: usize, expected: &str) {
    let expected = format!("`x.safetensors`{expected}");
    refused(&file(header, &vec![0; data_len]), &expected);
}

/// The position of the problem is in the message, once.
#[track_caller]
fn assert_malformed(outcome: Result<impl std::fmt::Debug, FileError>, expected: &str) {
    let error = message(outcome.expect_err("bad JSON"));
    let position = error.strip_prefix(&format!("{expected} at line 1 column "));
    let is_number = |text: &str| text.parse::<usize>().is_ok();
    assert!(position.is_some_and(is_number), "{error}\n{expected}");
}

#[track_caller]
fn malformed(header: &str, problem: &str) {
    let expected = "`x.safetensors`: the header is malformed: write it again";
    assert_malformed(
        open(&file(header, &[0; 4])),
        &format!("{expected}: {problem}"),
    );
}

fn strings<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs.map(|(key, value)| (key.into(), value.into())).into()
}

fn tensors<const N: usize>(pairs: [(&str, HostTensor); N]) -> BTreeMap<String, HostTensor> {
    pairs.map(|(name, tensor)| (name.into(), tensor)).into()
}

#[test]
fn a_file_reads_back() {
    let scalar = HostTensor::from_f32([], &[2.5]);
    let empty = HostTensor::from_i64([0, 3], &[]);
    let matrix = HostTensor::from_f32([3, 2], &[0., 1., 2., 3., 4., 5.]);
    let written = tensors([("s", scalar), ("e", empty), ("m.weight", matrix)]);
    let metadata = strings([("b", "\n\"\u{e9}\""), ("a", "")]);
    let bytes = serialize(&written, &metadata);
    for file in [open(&bytes), open_on_disk(&bytes)] {
        let file = file.expect("a sound file");
        assert_eq!(file.metadata(), &metadata);
        assert_eq!(Vec::from_iter(file.names()), ["e", "m.weight", "s"]);
        assert_eq!((file.len(), file.is_empty()), (3, false));
        for (name, tensor) in &written {
            let info = file.info(name).expect("a tensor");
            assert_eq!((info.dtype, &info.shape), (tensor.dtype, &tensor.shape));
            assert_eq!(&file.read(name).expect("its data"), tensor);
        }
    }
}

#[test]
fn a_file_without_tensors_is_empty() {
    let file = open(&serialize(&tensors([]), &strings([]))).expect("a sound file");
    assert!(file.is_empty() && file.metadata().is_empty());
}

#[test]
fn rows_are_read_alone() {
    let matrix = HostTensor::from_f32([3, 2], &[0., 1., 2., 3., 4., 5.]);
    let scalar = HostTensor::from_f32([], &[2.5]);
    let empty = HostTensor::from_f32([0, 2], &[]);
    let written = tensors([("m", matrix.clone()), ("s", scalar), ("e", empty.clone())]);
    let file = open_on_disk(&serialize(&written, &strings([]))).expect("a sound file");
    for rows in [0..3, 1..2, 2..2, 0..0, 3..3] {
        let read = file.read_rows("m", rows.clone()).expect("rows");
        assert_eq!(read, matrix.rows(rows));
    }
    assert_eq!(file.read_rows("e", 0..0).expect("no rows"), empty);
    for (name, rows, expected) in [
        ("m", 2..4, "of shape [3, 2] has no rows 2..4"),
        (
            "m",
            Range { start: 2, end: 1 },
            "of shape [3, 2] has no rows 2..1",
        ),
        ("s", 0..1, "of shape [] has no rows 0..1"),
        ("e", 0..1, "of shape [0, 2] has no rows 0..1"),
        ("n", 0..1, "does not exist: is it the right checkpoint?"),
    ] {
        let error = message(file.read_rows(name, rows).expect_err("no such rows"));
        assert_eq!(
            error,
            format!("`x.safetensors`: tensor `{name}` {expected}")
        );
    }
}

#[test]
fn data_longer_than_a_piece_is_read_whole() {
    let values = Vec::from_iter((0..1 << 19).map(|i| i as f32));
    let long = HostTensor::from_f32([1 << 17, 4], &values);
    let written = tensors([("a", HostTensor::from_i64([1], &[0])), ("l", long.clone())]);
    let file = open_on_disk(&serialize(&written, &strings([]))).expect("a sound file");
    assert_eq!(file.read("l").expect("its data"), long);
    let rows = 3..(1 << 17) - 1;
    assert_eq!(
        file.read_rows("l", rows.clone()).expect("rows"),
        long.rows(rows)
    );
}

#[test]
fn a_map_has_the_bytes_of_the_file_where_their_type_may_begin() {
    let values = Vec::from_iter((0..1 << 15).map(|i| i as f32));
    let long = HostTensor::from_f32([1 << 13, 4], &values);
    let bytes = serialize(&tensors([("l", long.clone())]), &strings([]));
    let on_disk = open_on_disk(&bytes).expect("a sound file");
    for rows in [0..1 << 13, 1025..6000, 7..7] {
        let mapped = on_disk.map("l", Some(rows.clone())).expect("rows");
        assert_eq!(mapped.expect("a map"), long.rows(rows).bytes);
    }
    let in_memory = open(&bytes).expect("a sound file");
    assert!(in_memory.map("l", None).expect("data").is_none());
    let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#;
    let header = format!("{header:len$}", len = header.len().next_multiple_of(8));
    let odd = open_on_disk(&file(&header, &[0; 5])).expect("a sound file");
    let is_mapped = ["a", "b"].map(|name| odd.map(name, None).expect("data").is_some());
    assert_eq!(is_mapped, [true, false]);
}

#[test]
fn a_file_cut_short_after_opening_is_an_error() {
    let written = tensors([("m", HostTensor::from_f32([2], &[0., 1.]))]);
    let folder = folder([("x.safetensors", &serialize(&written, &strings([]))[..])]);
    let path = folder.path().join("x.safetensors");
    let file = TensorFile::open(&path).expect("a sound file");
    let len = fs::metadata(&path).expect("a file").len();
    let handle = File::options().write(true).open(&path).expect("a file");
    handle.set_len(len - 1).expect("a writable file");
    for error in [file.read("m").map(drop), file.map("m", None).map(drop)] {
        let error = message(error.expect_err("too short"));
        assert!(
            error.starts_with("cannot read `x.safetensors`: "),
            "{error}"
        );
    }
}

#[test]
fn files_of_other_formats_are_named() {
    for (start, found) in [
        ("", "empty: download it again"),
        (
            "{}",
            "shorter than the 8 bytes a safetensors file starts with: download it again",
        ),
        (
            "PK\u{3}\u{4}\u{14}\0\0\0\u{8}\u{8}",
            "a zip/PyTorch archive: convert it to safetensors",
        ),
        (
            "GGUF\u{3}\0\0\0",
            "a GGUF file: use the safetensors checkpoint it was made from",
        ),
        (
            "<!DOCTYPE html><html>",
            "a web page, not a checkpoint: download the file itself",
        ),
        (
            "\n<html lang=en>",
            "a web page, not a checkpoint: download the file itself",
        ),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a Git LFS pointer: run git lfs pull",
        ),
        (
            "\u{2}\0\0\0\0\0\0\0[]",
            "not a safetensors file: its header does not start with `{`",
        ),
        (
            "\u{3}\0\0\0\0\0\0\0 {}",
            "not a safetensors file: its header does not start with `{`",
        ),
    ] {
        refused(start.as_bytes(), &format!("`x.safetensors` is {found}"));
    }
    for protocol in 2..=5 {
        refused(
            &[0x80, protocol, 0x8A, 0x0A, 0x6C, 0xFC, 0x9C, 0x46, 0xF9],
            "`x.safetensors` is a Python pickle, which can run code when loaded: convert it to safetensors",
        );
    }
}

#[test]
fn a_header_length_that_looks_like_a_pickle_is_no_pickle() {
    let bytes = file(&format!("{:640}", "{}"), &[]);
    assert_eq!(bytes[..2], [0x80, 2]);
    assert!(open(&bytes).expect("a sound file").is_empty());
}

#[test]
fn a_folder_or_a_missing_file_is_refused() {
    let folder = folder([]);
    let error = TensorFile::open(folder.path()).expect_err("a folder");
    assert!(message(error).ends_with("` is a directory: name the file inside it"));
    let error = TensorFile::open(&folder.path().join("x")).expect_err("no file");
    assert!(message(error).starts_with("cannot read `x`: "));
}

#[test]
fn a_header_length_must_fit_the_file_and_the_format() {
    refused(
        &[&100_000_001u64.to_le_bytes()[..], b"{}"].concat(),
        "`x.safetensors`: a header of 100000001 bytes, over the limit of 100000000: is it the right file?",
    );
    refused(
        &[&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        "`x.safetensors`: a header of 18446744073709551615 bytes, over the limit of 100000000: is it the right file?",
    );
    refused(
        &[&3u64.to_le_bytes()[..], b"{}"].concat(),
        "`x.safetensors` is cut short: its header takes 3 bytes, 2 are there: download it again",
    );
    assert_malformed(
        open(&[&0u64.to_le_bytes()[..], b"{}"].concat()),
        "`x.safetensors`: the header is malformed: write it again: EOF while parsing a value",
    );
}

#[test]
fn a_header_must_be_utf8() {
    refused(
        &[&5u64.to_le_bytes()[..], b"{\"\xFF\"}"].concat(),
        "`x.safetensors`: the header is not UTF-8: write it again: invalid utf-8 sequence of 1 bytes from index 2",
    );
}

#[test]
fn a_header_must_be_one_json_object() {
    malformed("{", "EOF while parsing an object");
    malformed("{}{}", "trailing characters");
    malformed("{}\0", "trailing characters");
    open(&file("{} \n\t ", &[])).expect("padding is allowed");
}

#[test]
fn duplicate_keys_are_refused_at_every_level() {
    let tensor = format!(r#""a":{{{F32},"data_offsets":[0,4]}}"#);
    malformed(&format!("{{{tensor},{tensor}}}"), r#"duplicate key "a""#);
    malformed(
        &format!(r#"{{"a":{{{F32},"dtype":"F32","data_offsets":[0,4]}}}}"#),
        r#""a": duplicate key "dtype""#,
    );
    malformed(
        r#"{"__metadata__":{"k":"1","k":"2"}}"#,
        r#""__metadata__": duplicate key "k""#,
    );
    malformed(
        r#"{"__metadata__":{},"__metadata__":{}}"#,
        r#"duplicate key "__metadata__""#,
    );
    // Escapes do not hide a duplicate.
    malformed(
        r#"{"__metadata__":{"k":"1","\u006b":"2"}}"#,
        r#""__metadata__": duplicate key "k""#,
    );
}

#[test]
fn metadata_must_be_strings() {
    malformed(
        r#"{"__metadata__":{"step":1}}"#,
        r#""__metadata__": "step": invalid type: integer `1`, expected a string"#,
    );
    malformed(
        r#"{"__metadata__":null}"#,
        r#""__metadata__": invalid type: null, expected an object"#,
    );
    malformed(
        r#"{"__metadata__":{"a":[[[[]]]]}}"#,
        r#""__metadata__": "a": invalid type: sequence, expected a string"#,
    );
}

#[test]
fn an_entry_has_exactly_the_fields_of_the_format() {
    malformed(
        &format!(r#"{{"a":{{{F32},"data_offsets":[0,4],"strides":[1]}}}}"#),
        r#""a": "strides": no tensor has this field"#,
    );
    malformed(
        &format!(r#"{{"a":{{{F32}}}}}"#),
        r#""a": missing field `data_offsets`"#,
    );
    malformed(
        r#"{"a":["F32",[1],[0,4]]}"#,
        r#""a": invalid type: sequence, expected an object"#,
    );
    malformed(
        r#"{"a":{"dtype":7}}"#,
        r#""a": "dtype": invalid type: integer `7`, expected a string"#,
    );
    malformed(
        r#"{"a":{"shape":[-1]}}"#,
        r#""a": "shape": invalid value: integer `-1`, expected usize"#,
    );
    malformed(
        r#"{"a":{"shape":[1.0]}}"#,
        r#""a": "shape": invalid type: floating point `1.0`, expected usize"#,
    );
    malformed(
        r#"{"a":{"data_offsets":[0]}}"#,
        r#""a": "data_offsets": invalid length 1, expected an array of length 2"#,
    );
    malformed(
        r#"{"a":{"data_offsets":[0,4,4]}}"#,
        r#""a": "data_offsets": trailing characters"#,
    );
    malformed(
        r#"{"a":{"data_offsets":[0,1e1]}}"#,
        r#""a": "data_offsets": invalid type: floating point `10.0`, expected u64"#,
    );
}

#[test]
fn names_that_could_be_paths_are_refused() {
    for name in [
        "",
        "..",
        "a/../b",
        r"..\\b",
        r"a\u001bb",
        r"\u0000",
        r"\u0085",
    ] {
        let shown: String = serde_json::from_str(&format!("\"{name}\"")).expect("a string");
        refused_header(
            &format!(r#"{{"{name}":{{{F32},"data_offsets":[0,4]}}}}"#),
            4,
            &format!(
                ": tensor `{}` has an empty or reserved name, or one with control characters or a `..` segment: rename it",
                shown.escape_debug()
            ),
        );
    }
    let fine = format!(r#"{{"a..b/c...d":{{{F32},"data_offsets":[0,4]}}}}"#);
    open(&file(&fine, &[0; 4])).expect("dots within a segment are allowed");
}

#[test]
fn unknown_dtypes_are_named() {
    for dtype in ["F4", "F8_E8M0", "C64", "f32", ""] {
        refused_header(
            &format!(r#"{{"a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,1]}}}}"#),
            1,
            &format!(": tensor `a` has the unknown dtype `{dtype}`: convert it to BF16 or F32"),
        );
    }
}

#[test]
fn shapes_that_overflow_are_refused() {
    for shape in [
        "[4294967296, 4294967296]",
        "[4611686018427387904]",
        "[0, 4294967296, 4294967296]",
    ] {
        refused_header(
            &format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#),
            0,
            &format!(": tensor `a` has a shape that overflows, {shape}: write the file again"),
        );
    }
}

#[test]
fn offsets_must_fit_dtype_and_shape() {
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[4,0]}}}}"#),
        4,
        ": tensor `a` has data_offsets that run backwards, [4, 0]: write the file again",
    );
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[0,8]}}}}"#),
        8,
        ": tensor `a` takes 4 bytes as F32 [1], but data_offsets span 8: write the file again",
    );
    refused_header(
        r#"{"a":{"dtype":"F32","shape":[],"data_offsets":[0,0]}}"#,
        0,
        ": tensor `a` takes 4 bytes as F32 [], but data_offsets span 0: write the file again",
    );
}

#[test]
fn offsets_beyond_64_bits_are_refused() {
    let header = format!(r#"{{"a":{{{F32},"data_offsets":[0,18446744073709551616]}}}}"#);
    let error = message(open(&file(&header, &[0; 4])).expect_err("a bad header"));
    let expected = r#"write it again: "a": "data_offsets": invalid type: floating point"#;
    assert!(error.contains(expected), "{error}");
}

#[test]
fn tensors_may_not_overlap() {
    refused_header(
        &format!(r#"{{"b":{{{F32},"data_offsets":[2,6]}},"a":{{{F32},"data_offsets":[0,4]}}}}"#),
        6,
        ": tensor `b` starts at byte 2, but the tensor before it ends at 4: write the file again",
    );
    // Not even by sharing all bytes, or by being empty inside another.
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[0,4]}},"b":{{{F32},"data_offsets":[0,4]}}}}"#),
        4,
        ": tensor `b` starts at byte 0, but the tensor before it ends at 4: write the file again",
    );
    refused_header(
        &format!(
            r#"{{"a":{{{F32},"data_offsets":[0,4]}},"e":{{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}}}"#
        ),
        4,
        ": tensor `e` starts at byte 2, but the tensor before it ends at 4: write the file again",
    );
}

#[test]
fn every_byte_belongs_to_a_tensor() {
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[4,8]}}}}"#),
        8,
        ": tensor `a` starts at byte 4, but the tensor before it ends at 0, leaving a hole: write the file again",
    );
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[18446744073709551611,18446744073709551615]}}}}"#),
        8,
        ": tensor `a` starts at byte 18446744073709551611, but the tensor before it ends at 0, leaving a hole: write the file again",
    );
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[0,4]}}}}"#),
        6,
        ": 2 bytes follow the last tensor: remove them",
    );
    refused_header("{}", 1, ": 1 bytes follow the last tensor: remove them");
}

#[test]
fn data_may_not_be_missing() {
    refused_header(
        &format!(r#"{{"a":{{{F32},"data_offsets":[0,4]}},"b":{{{F32},"data_offsets":[4,8]}}}}"#),
        3,
        " is cut short: its data takes 8 bytes, 3 are there: download it again",
    );
    // A length whose sum with the header's would overflow.
    let huge = (1u64 << 63) - 1;
    refused_header(
        &format!(
            r#"{{"a":{{"dtype":"U8","shape":[{huge}],"data_offsets":[0,{huge}]}},"b":{{"dtype":"U8","shape":[{huge}],"data_offsets":[{huge},{}]}}}}"#,
            2 * huge
        ),
        3,
        &format!(
            " is cut short: its data takes {} bytes, 3 are there: download it again",
            2 * huge
        ),
    );
}

#[test]
fn equal_tensors_give_equal_bytes() {
    let written = tensors([
        ("b", HostTensor::from_f32([1], &[1.0])),
        ("a", HostTensor::from_f32([1], &[2.0])),
        ("half", HostTensor::from_f32([1], &[2.0]).cast(Dtype::Bf16)),
        ("z", HostTensor::from_i64([1], &[3])),
    ]);
    let metadata = strings([("format", "pt"), ("b", "2"), ("a", "1")]);
    let header = concat!(
        r#"{"__metadata__":{"a":"1","b":"2","format":"pt"},"#,
        r#""z":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"#,
        r#""a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},"#,
        r#""b":{"dtype":"F32","shape":[1],"data_offsets":[12,16]},"#,
        r#""half":{"dtype":"BF16","shape":[1],"data_offsets":[16,18]}}"#,
    );
    let header = format!("{header:<0$}", header.len().next_multiple_of(8));
    let data = [
        3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0x80, 0x3F, 0, 0x40,
    ];
    assert_eq!(serialize(&written, &metadata), file(&header, &data));
}

#[test]
fn streaming_writes_the_rows_of_the_layout_in_turn() {
    let layout =
        [("b", vec![2]), ("a", vec![1])].map(|(name, shape)| (name.to_owned(), Dtype::F32, shape));
    let mut asked = Vec::new();
    let mut out = Vec::new();
    write_streaming(&mut out, &layout, &strings([("k", "v")]), |name| {
        asked.push(name.to_owned());
        Ok::<_, io::Error>(match name {
            "a" => HostTensor::from_f32([1], &[1.0]),
            _ => HostTensor::from_f32([2], &[2.0, 3.0]),
        })
    })
    .expect("a vector takes anything");
    assert_eq!(asked, ["b", "a"]);
    let file = open(&out).expect("a sound file");
    assert_eq!(file.read("a").expect("its data").to_f32(), [1.0]);
    assert_eq!(file.read("b").expect("its data").to_f32(), [2.0, 3.0]);
}

#[test]
fn streaming_refuses_what_cannot_be_read_back() {
    let row = |name: &str, shape: &[usize]| (name.to_owned(), Dtype::F32, shape.to_vec());
    for (layout, expected) in [
        (
            vec![row("a/..", &[1])],
            r#"tensor name "a/.." is not allowed"#,
        ),
        (
            vec![row(METADATA, &[1])],
            r#"tensor name "__metadata__" is not allowed"#,
        ),
        (
            vec![row("a", &[1]), row("a", &[1])],
            "tensor `a` occurs twice",
        ),
        (
            vec![row("a", &[usize::MAX])],
            "tensor `a`: shape [18446744073709551615] overflows",
        ),
        (
            vec![row("a", &[2])],
            "tensor `a`: the layout says F32 [2], but it is F32 [1] of 4 bytes",
        ),
    ] {
        let mut out = Vec::new();
        let outcome = write_streaming(&mut out, &layout, &strings([]), |_| {
            Ok::<_, io::Error>(HostTensor::from_f32([1], &[1.0]))
        });
        assert_eq!(outcome.expect_err("a bad layout").to_string(), expected);
    }
}

#[test]
#[should_panic(expected = "the layout says F32 [2], but it is F32 [2] of 0 bytes")]
fn serializing_a_tensor_without_its_bytes_panics() {
    let mut tensor = HostTensor::from_f32([2], &[0.0; 2]);
    tensor.bytes.clear();
    serialize(&tensors([("a", tensor)]), &strings([]));
}

/// A folder of two shards, `1.safetensors` with `a` and `2.safetensors` with `b`, and this index.
fn sharded(index: &str) -> TempDir {
    let shard = |name| {
        let tensor = HostTensor::from_f32([2], &[0.0, 1.0]);
        serialize(&tensors([(name, tensor)]), &strings([("shard", name)]))
    };
    folder([
        ("1.safetensors", &shard("a")[..]),
        ("2.safetensors", &shard("b")[..]),
        ("x.safetensors.index.json", index.as_bytes()),
    ])
}

fn open_index(folder: &TempDir) -> Result<TensorSet, FileError> {
    TensorSet::open(&folder.path().join("x.safetensors.index.json"))
}

#[track_caller]
fn refused_index(index: &str, expected: &str) {
    let error = open_index(&sharded(index)).expect_err("a bad index");
    let expected = format!("`x.safetensors.index.json`{expected}");
    assert_eq!(message(error), expected);
}

#[track_caller]
fn malformed_index(index: &str, problem: &str) {
    let expected = "`x.safetensors.index.json`: the shard index is malformed: write it again";
    assert_malformed(
        open_index(&sharded(index)),
        &format!("{expected}: {problem}"),
    );
}

const SOUND: &str = r#"{"metadata": {"total_size": 16, "more": [null, true, -1, 0.5, "s", {}]},
        "weight_map": {"b": "2.safetensors", "a": "1.safetensors"}}"#;

#[test]
fn shards_read_as_one() {
    let set = open_index(&sharded(SOUND)).expect("a sound index");
    assert_eq!(Vec::from_iter(set.names()), ["a", "b"]);
    assert_eq!(set.info("b").map(|info| info.shape.clone()), Some(vec![2]));
    assert_eq!(set.read("a").expect("its data").to_f32(), [0.0, 1.0]);
    assert_eq!(set.read_rows("b", 1..2).expect("rows").to_f32(), [1.0]);
    assert_eq!(set.metadata(), &strings([("shard", "a")]));
    assert_eq!(set.files().len(), 2);
    assert_eq!(set.info("c"), None);
    assert_eq!(
        message(set.read("c").expect_err("no tensor")),
        "`x.safetensors.index.json`: tensor `c` does not exist: is it the right checkpoint?"
    );
}

#[test]
fn one_file_is_a_set() {
    let folder = sharded(SOUND);
    let set = TensorSet::open(&folder.path().join("2.safetensors")).expect("a sound file");
    assert_eq!(Vec::from_iter(set.names()), ["b"]);
    assert_eq!(set.read("b").expect("its data").to_f32(), [0.0, 1.0]);
    assert_eq!(set.metadata(), &strings([("shard", "b")]));
}

#[test]
fn index_and_shards_must_agree() {
    refused_index(
        r#"{"weight_map": {"a": "1.safetensors", "c": "1.safetensors"}}"#,
        ": tensor `c` is not in shard `1.safetensors`, where the index places it: download both again",
    );
    refused_index(
        r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#,
        ": tensor `a` is not in shard `2.safetensors`, where the index places it: download both again",
    );
    refused_index(
        r#"{"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}"#,
        ": tensor `b` of shard `2.safetensors` is not in the index: download both again",
    );
    refused_index(
        r#"{"weight_map": {"a": "1.safetensors", "b": "3.safetensors"}}"#,
        ": shard `3.safetensors` does not exist: download it next to the index",
    );
    refused_index(
        r#"{"weight_map": {}}"#,
        ": `weight_map` is empty: name the shard of each tensor",
    );
    let folder = sharded(r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#);
    let copy = fs::copy(
        folder.path().join("1.safetensors"),
        folder.path().join("2.safetensors"),
    );
    copy.expect("a writable folder");
    assert_eq!(
        message(open_index(&folder).expect_err("two copies")),
        "`x.safetensors.index.json`: tensor `a` is in shard `1.safetensors` and in shard `2.safetensors`: remove one of them"
    );
}

#[test]
fn an_index_must_be_strict_json() {
    malformed_index(
        r#"{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}"#,
        r#""weight_map": duplicate key "a""#,
    );
    malformed_index(
        r#"{"weight_map": {}, "weight_map": {}}"#,
        r#"duplicate key "weight_map""#,
    );
    malformed_index(
        r#"{"metadata": [{"a": {"b": 1, "b": 2}}], "weight_map": {}}"#,
        r#""metadata": "a": duplicate key "b""#,
    );
    malformed_index(
        r#"{"weight_map": {"a": 1}}"#,
        r#""weight_map": "a": invalid type: integer `1`, expected a string"#,
    );
    malformed_index(r#"{"model_type": "flux"}"#, "missing field `weight_map`");
    malformed_index("[]", "invalid type: sequence, expected an object");
    malformed_index(
        &format!(r#"{{"metadata": {}"#, "[".repeat(100_000)),
        r#""metadata": recursion limit exceeded"#,
    );
    malformed_index(
        &r#"{"a":"#.repeat(100_000),
        &format!("{}recursion limit exceeded", r#""a": "#.repeat(127)),
    );
    refused_index(
        "<!doctype html>",
        " is a web page, not a checkpoint: download the file itself",
    );
    refused_index(
        "version https://git-lfs.github.com/spec/v1",
        " is a Git LFS pointer: run git lfs pull",
    );
    refused_index("", " is empty: download it again");
    let folder = folder([("x.safetensors.index.json", &b"{\"\xFF\"}"[..])]);
    assert_eq!(
        message(open_index(&folder).expect_err("not text")),
        "`x.safetensors.index.json`: the shard index is not UTF-8: write it again: invalid utf-8 sequence of 1 bytes from index 2"
    );
}

#[test]
fn an_index_of_absurd_size_is_refused() {
    let folder = sharded("{}");
    let path = folder.path().join("x.safetensors.index.json");
    let file = File::options().write(true).open(path).expect("a file");
    file.set_len(MAX_INDEX + 1).expect("a writable file");
    assert_eq!(
        message(open_index(&folder).expect_err("too large")),
        "`x.safetensors.index.json`: a shard index of 67108865 bytes, over the limit of 67108864: is it the right file?"
    );
}

#[test]
fn shards_stay_in_the_folder_of_the_index() {
    for shard in [
        "../1.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        r"..\1",
        "a/../b",
        "a\nb",
    ] {
        let json = serde_json::to_string(shard).expect("a string");
        let shard = shard.escape_debug();
        refused_index(
            &format!(r#"{{"weight_map": {{"a": {json}}}}}"#),
            &format!(": shard `{shard}` is outside the folder of the index: move it there"),
        );
    }
}

#[cfg(unix)]
#[test]
fn a_link_may_not_lead_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let blobs = sharded(SOUND);
    let snapshot = folder([("x.safetensors.index.json", SOUND.as_bytes())]);
    for name in ["1.safetensors", "2.safetensors"] {
        symlink(blobs.path().join(name), snapshot.path().join(name)).expect("a link");
    }
    assert_eq!(
        message(open_index(&snapshot).expect_err("a link out")),
        "`x.safetensors.index.json`: shard `1.safetensors` is outside the folder of the index: move it there"
    );
    // The Hugging Face cache links the index too, to the folder of the real shards.
    let index = "x.safetensors.index.json";
    fs::remove_file(snapshot.path().join(index)).expect("a file");
    symlink(blobs.path().join(index), snapshot.path().join(index)).expect("a link");
    let set = open_index(&snapshot).expect("the layout of the cache");
    assert_eq!(set.files()[0].path(), snapshot.path().join("1.safetensors"));
}

#[cfg(unix)]
#[test]
fn a_device_is_not_a_checkpoint() {
    let error = TensorFile::open(Path::new("/dev/null")).expect_err("a device");
    let expected = "`null` is not a regular file: copy it to disk first";
    assert_eq!(message(error), expected);
}

fn any_tensor() -> impl Strategy<Value = HostTensor> {
    let dtype = proptest::sample::select(&Dtype::ALL[..]);
    let shape = proptest::collection::vec(0usize..4, 0..4);
    (dtype, shape).prop_flat_map(|(dtype, shape)| {
        let len = shape.iter().product::<usize>() * dtype.size();
        proptest::collection::vec(any::<u8>(), len).prop_map(move |bytes| HostTensor {
            dtype,
            shape: shape.clone(),
            bytes,
        })
    })
}

fn any_file() -> impl Strategy<Value = (BTreeMap<String, HostTensor>, BTreeMap<String, String>)> {
    let tensors =
        proptest::collection::btree_map("[a-z]{1,3}(\\.[a-z0-9]{1,3}){0,2}", any_tensor(), 0..6);
    let metadata = proptest::collection::btree_map(any::<String>(), any::<String>(), 0..4);
    (tensors, metadata)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_safetensors_crate_reads_what_is_written((tensors, metadata) in any_file()) {
        let bytes = serialize(&tensors, &metadata);
        let (header_len, header) = SafeTensors::read_metadata(&bytes).expect("a sound header");
        prop_assert_eq!(header_len % 8, 0);
        let theirs = header.metadata().clone().unwrap_or_default();
        prop_assert_eq!(BTreeMap::from_iter(theirs), metadata);
        let file = SafeTensors::deserialize(&bytes).expect("a sound file");
        prop_assert_eq!(file.len(), tensors.len());
        for (name, tensor) in &tensors {
            let view = file.tensor(name).expect("a tensor");
            prop_assert_eq!(view.dtype().to_string(), tensor.dtype.name());
            prop_assert_eq!(view.shape(), &tensor.shape);
            prop_assert_eq!(view.data(), &tensor.bytes);
        }
    }

    #[test]
    fn what_the_safetensors_crate_writes_is_read((tensors, metadata) in any_file()) {
        let views = tensors.iter().map(|(name, tensor)| {
            let dtype = serde_json::from_value(tensor.dtype.name().into()).expect("a dtype");
            let view = safetensors::tensor::TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes);
            (name, view.expect("a sound tensor"))
        });
        // An empty map and no tensors would make that crate write two objects, `{}{..}`.
        let metadata_map =
            (!metadata.is_empty()).then(|| metadata.clone().into_iter().collect());
        let file = open(&safetensors::serialize(views, metadata_map).expect("a sound file"))
            .expect("a sound file");
        prop_assert_eq!(file.metadata(), &metadata);
        prop_assert_eq!(file.len(), tensors.len());
        for (name, tensor) in &tensors {
            prop_assert_eq!(&file.read(name).expect("its data"), tensor);
        }
    }

    /// Whatever is done to the bytes: no panic, and nothing accepted that the safetensors crate would refuse.
    #[test]
    fn mutated_files_never_panic(
        (tensors, metadata) in any_file(),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), 0..4), 1..4),
    ) {
        const LIKELY: &[u8] = b"{}[]\",:0149-.eE\\/ ..\0\xFF";
        let mut bytes = serialize(&tensors, &metadata);
        for (index, byte, kind) in edits {
            let i = index.index(bytes.len());
            match kind {
                0 => bytes[i] = byte,
                1 => bytes[i] = LIKELY[usize::from(byte) % LIKELY.len()],
                2 => bytes.insert(i, LIKELY[usize::from(byte) % LIKELY.len()]),
                _ => drop(bytes.drain(i..(i + usize::from(byte % 9)).min(bytes.len() - 1).max(i))),
            }
        }
        if let Ok(file) = open(&bytes) {
            for name in file.names() {
                let tensor = file.read(name).expect("data that was checked");
                prop_assert_eq!(tensor.to_f64().len(), tensor.numel());
            }
            prop_assert!(SafeTensors::deserialize(&bytes).is_ok());
        }
    }
}
