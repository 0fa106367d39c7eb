use super::*;
use crate::data::image::{ImageLimits, load_image};
use crate::data::testing::{folder, jpeg, line, png, section, webp};
use tempfile::TempDir;

#[track_caller]
fn assert_refused(folder: &TempDir, message: &str) {
    let error = scan(&section(folder)).expect_err("the dataset is bad");
    let line = line(folder.path(), &error);
    assert_eq!(line, message);
    assert!(!line.contains('\n'));
}

fn names(samples: &[Sample]) -> Vec<&str> {
    samples.iter().map(|sample| sample.name.as_str()).collect()
}

// Folders of pairs

#[test]
fn pairs_are_found_sorted_by_bytes_with_trimmed_captions() {
    let folder = folder(&[
        ("b.JPG", &jpeg()),
        ("b.txt", b"  a dog\r\n"),
        ("a.png", &png()),
        ("a.txt", "\u{feff}a cat, naïve\n".as_bytes()),
        ("Z.v2.webp", &webp()),
        ("Z.v2.txt", b""),
        (".hidden.png", b""),
        ("README.md", b"where the photographs are from"),
        ("sub/c.png", b"not looked at"),
    ]);
    let samples = scan(&section(&folder)).expect("a good dataset");
    assert_eq!(names(&samples), ["Z.v2.webp", "a.png", "b.JPG"]);
    let captions: Vec<&str> = samples
        .iter()
        .map(|sample| sample.caption.as_str())
        .collect();
    assert_eq!(captions, ["", "a cat, naïve", "a dog"]);
    assert_eq!(samples[1].image, folder.path().join("a.png"));
    for sample in &samples {
        load_image(&sample.image, &ImageLimits::default()).expect("a good image");
    }
}

#[test]
fn another_caption_extension() {
    let folder = folder(&[
        ("a.png", &png()),
        ("a.caption", b"a cat"),
        ("a.txt", b"notes"),
    ]);
    let section = DatasetSection {
        caption_extension: "caption".into(),
        ..section(&folder)
    };
    assert_eq!(scan(&section).expect("a good dataset")[0].caption, "a cat");
}

#[test]
fn missing_folder() {
    let folder = folder(&[]);
    let mut section = section(&folder);
    section.path.push("nowhere");
    let error = scan(&section).expect_err("no folder");
    assert_eq!(
        line(folder.path(), &error),
        "dataset folder `DIR/nowhere` does not exist"
    );
}

#[test]
fn a_file_instead_of_a_folder() {
    let folder = folder(&[("a.png", &png())]);
    let mut section = section(&folder);
    section.path.push("a.png");
    let error = scan(&section).expect_err("no folder");
    assert_eq!(
        line(folder.path(), &error),
        "dataset path `DIR/a.png` is not a folder"
    );
}

#[test]
fn empty_folder() {
    assert_refused(
        &folder(&[("sub/a.png", &png())]),
        "no images (png, jpg, jpeg or webp) in `DIR`; subfolders are searched only with a metadata.jsonl",
    );
}

#[test]
fn image_without_caption() {
    assert_refused(
        &folder(&[("a.png", &png()), ("b.png", &png()), ("b.txt", b"b")]),
        "image `DIR/a.png` has no caption: expected `a.txt` beside it",
    );
}

#[test]
fn caption_without_image() {
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt", b"a"), ("b.txt", b"b")]),
        "caption `DIR/b.txt` has no image: expected `b.png`, .jpg, .jpeg or .webp beside it",
    );
}

#[test]
fn two_images_for_one_caption() {
    assert_refused(
        &folder(&[("a.png", &png()), ("a.jpg", &jpeg()), ("a.txt", b"a")]),
        "images `DIR/a.jpg` and `a.png` share the caption `a.txt`: rename one",
    );
}

#[test]
fn photographs_in_other_formats_are_not_passed_over() {
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt", b"a"), ("b.HEIC", b"?")]),
        "image `DIR/b.HEIC` is in an unsupported format: convert it to png, jpg or webp",
    );
}

#[test]
fn zero_byte_image() {
    assert_refused(
        &folder(&[("a.png", b""), ("a.txt", b"a")]),
        "image `DIR/a.png` is empty (0 bytes)",
    );
}

#[test]
fn a_folder_named_like_an_image() {
    assert_refused(
        &folder(&[("a.png/x", b""), ("a.txt", b"a")]),
        "image `DIR/a.png` is not a file",
    );
}

#[test]
fn a_folder_named_like_a_caption() {
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt/x", b"")]),
        "cannot read `DIR/a.txt`: it is not a file",
    );
}

#[test]
fn caption_not_utf8() {
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt", b"caf\xe9")]),
        "caption `DIR/a.txt` is not UTF-8",
    );
}

#[test]
fn caption_too_large() {
    let fits = [b'x'; 64 << 10];
    let samples = scan(&section(&folder(&[("a.png", &png()), ("a.txt", &fits)])));
    assert_eq!(
        samples.expect("64 KiB are allowed")[0].caption.len(),
        64 << 10
    );
    let too_large = vec![b'x'; 10 << 20];
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt", &too_large)]),
        "caption `DIR/a.txt` is larger than 64 KiB",
    );
}

#[cfg(unix)]
#[test]
fn unreadable_image() {
    let folder = folder(&[("a.txt", b"a")]);
    std::os::unix::fs::symlink("nowhere", folder.path().join("a.png")).expect("make a link");
    assert_refused(
        &folder,
        "cannot read `DIR/a.png`: No such file or directory (os error 2)",
    );
}

#[cfg(unix)]
#[test]
fn links_are_followed_among_pairs() {
    let store = folder(&[("1", &png())]);
    let folder = folder(&[("a.txt", b"a")]);
    std::os::unix::fs::symlink(store.path().join("1"), folder.path().join("a.png"))
        .expect("make a link");
    assert_eq!(
        names(&scan(&section(&folder)).expect("a good dataset")),
        ["a.png"]
    );
}

#[cfg(target_os = "linux")]
#[test]
fn file_name_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folder(&[]);
    let name = std::ffi::OsStr::from_bytes(b"a\xff.png");
    fs::write(folder.path().join(name), png()).expect("write file");
    assert_refused(&folder, "the name of `DIR/a\u{fffd}.png` is not UTF-8");
}

#[cfg(unix)]
#[test]
fn a_line_break_in_a_name_stays_in_the_line() {
    assert_refused(
        &folder(&[("a\nb.png", &png())]),
        "image `DIR/a\\nb.png` has no caption: expected `a\\nb.txt` beside it",
    );
}

// metadata.jsonl

#[track_caller]
fn assert_list_refused(list: &[u8], message: &str) {
    assert_refused(
        &folder(&[("a.png", &png()), ("metadata.jsonl", list)]),
        message,
    );
}

const ROW: &str = r#"{"file_name": "a.png", "text": "a"}"#;

#[test]
fn listed_images_are_found_in_subfolders_too() {
    let list = concat!(
        r#"{"file_name": "./sub//b.png", "text": " b\u00e9 \n", "width": 40, "more": [{}]}"#,
        "\r\n\n",
        r#"{"text": "a", "file_name": "a.png"}"#
    );
    let folder = folder(&[
        ("a.png", &png()),
        ("sub/b.png", &png()),
        ("notes.txt", b"passed over"),
        ("metadata.jsonl", list.as_bytes()),
    ]);
    let samples = scan(&section(&folder)).expect("a good dataset");
    assert_eq!(names(&samples), ["a.png", "sub/b.png"]);
    assert_eq!(samples[1].caption, "bé");
    assert_eq!(samples[1].image, folder.path().join("sub/b.png"));
}

#[test]
fn an_empty_list() {
    assert_refused(
        &folder(&[("metadata.jsonl", b"\n")]),
        "no images (png, jpg, jpeg or webp) in `DIR`; subfolders are searched only with a metadata.jsonl",
    );
}

#[test]
fn listed_bad_json() {
    assert_list_refused(
        format!("{ROW}\n\n{{\"file_name\": }}").as_bytes(),
        "`DIR/metadata.jsonl` line 3: \"file_name\": expected value at column 15",
    );
    assert_list_refused(
        br#"["a.png", "a"]"#,
        "`DIR/metadata.jsonl` line 1: is not a JSON object",
    );
    assert_list_refused(
        br#"{"file_name": "a.png", "text": null}"#,
        "`DIR/metadata.jsonl` line 1: invalid type: null, expected a string at column 35",
    );
    assert_list_refused(
        br#"{"file_name": "a.png", "text": "a", "text": "b"}"#,
        "`DIR/metadata.jsonl` line 1: duplicate key \"text\" at column 42",
    );
}

#[test]
fn listed_deep_json() {
    let deep = format!(r#"{{"x": {}1"#, "[".repeat(100_000));
    let folder = folder(&[("a.png", &png()), ("metadata.jsonl", deep.as_bytes())]);
    let error = scan(&section(&folder)).expect_err("too deep");
    assert!(line(folder.path(), &error).starts_with("`DIR/metadata.jsonl` line 1: "));
}

#[test]
fn listed_missing_key() {
    assert_list_refused(
        br#"{"file_name": "a.png", "caption": "a"}"#,
        "`DIR/metadata.jsonl` line 1: missing key `text` at column 38",
    );
}

#[test]
fn listed_not_utf8() {
    assert_list_refused(
        b"{\"file_name\": \"a.png\", \"text\": \"\xff\"}",
        "`DIR/metadata.jsonl` line 1: is not UTF-8",
    );
}

#[test]
fn listed_too_large() {
    let row = |length| {
        format!(
            r#"{{"file_name": "a.png", "text": "{}"}}"#,
            "x".repeat(length)
        )
    };
    assert_list_refused(
        row((64 << 10) + 1).as_bytes(),
        "`DIR/metadata.jsonl` line 1: text is larger than 64 KiB",
    );
    assert_list_refused(
        row(1 << 20).as_bytes(),
        "`DIR/metadata.jsonl` line 1: is larger than 1 MiB",
    );
}

#[test]
fn listed_twice() {
    assert_list_refused(
        format!("{ROW}\n{}", ROW.replace("a.png", "./a.png")).as_bytes(),
        "`DIR/metadata.jsonl` line 2: file_name `./a.png` was already listed on line 1",
    );
}

#[test]
fn listed_outside_the_folder() {
    for name in ["../a.png", "/etc/a.png", "sub/../../a.png"] {
        assert_list_refused(
            ROW.replace("a.png", name).as_bytes(),
            &format!(
                "`DIR/metadata.jsonl` line 1: file_name `{name}` leads out of the dataset folder"
            ),
        );
    }
}

#[cfg(unix)]
#[test]
fn listed_link_out_of_the_folder() {
    let store = folder(&[("1.png", &png())]);
    let folder = folder(&[("metadata.jsonl", ROW.as_bytes())]);
    std::os::unix::fs::symlink(store.path().join("1.png"), folder.path().join("a.png"))
        .expect("make a link");
    assert_refused(
        &folder,
        "`DIR/metadata.jsonl` line 1: file_name `a.png` leads out of the dataset folder",
    );
}

#[test]
fn listed_but_not_there() {
    assert_list_refused(
        ROW.replace("a.png", "b.png").as_bytes(),
        "`DIR/metadata.jsonl` line 1: image `b.png` does not exist",
    );
}

#[test]
fn listed_but_not_an_image() {
    assert_list_refused(
        ROW.replace("a.png", "metadata.jsonl").as_bytes(),
        "`DIR/metadata.jsonl` line 1: file_name `metadata.jsonl` does not end in png, jpg, jpeg or webp",
    );
}

#[test]
fn not_listed() {
    assert_refused(
        &folder(&[
            ("a.png", &png()),
            ("sub/b.jpg", &jpeg()),
            ("metadata.jsonl", ROW.as_bytes()),
        ]),
        "image `DIR/sub/b.jpg` is not listed in metadata.jsonl",
    );
}

#[test]
fn captioned_twice() {
    assert_refused(
        &folder(&[
            ("a.png", &png()),
            ("a.txt", b"a"),
            ("metadata.jsonl", ROW.as_bytes()),
        ]),
        "image `DIR/a.png` has a caption in metadata.jsonl and in `a.txt`: remove one",
    );
}

#[test]
fn listed_zero_byte_image() {
    assert_refused(
        &folder(&[("a.png", b""), ("metadata.jsonl", ROW.as_bytes())]),
        "image `DIR/a.png` is empty (0 bytes)",
    );
}
