use std::path::Path;

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

/// The one warning, with nothing refused.
#[track_caller]
fn assert_warned(folder: &TempDir, message: &str) {
    let scan = scan(&section(folder)).expect("a dataset");
    assert_eq!(scan.warnings, [message]);
}

#[track_caller]
fn samples(folder: &TempDir) -> Vec<Sample> {
    scan(&section(folder)).expect("a good dataset").samples
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
        (".thumbnails/d.png", b""),
        ("sub/deep/c.png", &png()),
        ("sub/deep/c.txt", b"a bird"),
    ]);
    let scan = scan(&section(&folder)).expect("a good dataset");
    assert_eq!(scan.warnings, [""; 0]);
    let samples = scan.samples;
    assert_eq!(
        names(&samples),
        ["Z.v2.webp", "a.png", "b.JPG", "sub/deep/c.png"]
    );
    let captions: Vec<&str> = samples
        .iter()
        .map(|sample| sample.caption.as_str())
        .collect();
    assert_eq!(captions, ["", "a cat, naïve", "a dog", "a bird"]);
    assert_eq!(samples[1].image, folder.path().join("a.png"));
    assert_eq!(
        samples[1].image_sha256,
        lora_core::files::digest::sha256_hex(&png())
    );
    assert_eq!((samples[1].width_px, samples[1].height_px), (40, 24));
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
    let scan = scan(&section).expect("a good dataset");
    assert_eq!(scan.samples[0].caption, "a cat");
    assert_eq!(
        scan.warnings,
        ["not used, being neither image nor caption: 1 file (`a.txt`)"]
    );
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
        &folder(&[(".hidden/a.png", &png())]),
        "no images (png, jpg, webp, bmp or tiff) in `DIR` and its subfolders",
    );
    assert_refused(
        &folder(&[
            ("data/train-00000-of-00001.parquet", b"PAR1"),
            ("notes.txt", b"n"),
        ]),
        "no images (png, jpg, webp, bmp or tiff) in `DIR` and its subfolders; there are 1 other file: `data/train-00000-of-00001.parquet`",
    );
}

#[test]
fn image_without_caption() {
    assert_refused(
        &folder(&[("a.png", &png()), ("b.png", &png()), ("b.txt", b"b")]),
        "image `DIR/a.png` has no caption: expected `a.txt` beside it",
    );
    assert_refused(
        &folder(&[
            ("a.png", &png()),
            ("b/1.png", &png()),
            ("b/2.png", &png()),
            ("a.png.txt", b"a"),
        ]),
        "image `DIR/a.png` has no caption: expected `a.txt` beside it; is it `a.png.txt`? (and 2 more images)",
    );
}

#[test]
fn notes_are_named_and_lost_images_refused() {
    assert_warned(
        &folder(&[("a.png", &png()), ("a.txt", b"a"), ("readme.txt", b"b")]),
        "not used, since no image has the name: 1 text file (`readme.txt`)",
    );
    let lost = ["b.txt", "c.txt", "d.txt", "e.txt"];
    let mut files: Vec<(&str, &[u8])> = lost.map(|name| (name, &b"x"[..])).to_vec();
    let png = png();
    files.extend([("a.png", &png[..]), ("a.txt", b"a")]);
    assert_refused(
        &folder(&files),
        "caption `DIR/b.txt` has no image: expected `b.png`, .jpg, .webp, .bmp or .tiff beside it (and 3 more captions)",
    );
}

#[test]
fn captions_with_another_extension_are_found() {
    assert_refused(
        &folder(&[
            ("a.png", &png()),
            ("a.caption", b"a"),
            ("b.png", &png()),
            ("b.CAPTION", b"b"),
        ]),
        "image `DIR/a.png` has no caption with the extension `txt`, but 2 with `caption`: set `dataset.caption_extension` to \"caption\"",
    );
}

#[test]
fn case_and_form_of_unicode_do_not_part_a_pair() {
    let folder = folder(&[
        ("IMG_1.JPG", &jpeg()),
        ("IMG_1.TXT", b"one"),
        ("IMG_2.jpg", &jpeg()),
        ("img_2.txt", b"two"),
        ("caf\u{e9}.png", &png()),
        ("cafe\u{301}.txt", b"three"),
    ]);
    let samples = samples(&folder);
    let captions: Vec<&str> = samples.iter().map(|it| it.caption.as_str()).collect();
    assert_eq!(captions, ["one", "two", "three"]);
}

#[cfg(target_os = "linux")]
#[test]
fn where_the_case_tells_files_apart_the_exact_name_counts() {
    let both = folder(&[
        ("A.png", &png()),
        ("A.txt", b"large"),
        ("a.png", &png()),
        ("a.txt", b"small"),
    ]);
    let captions: Vec<String> = samples(&both).into_iter().map(|it| it.caption).collect();
    assert_eq!(captions, ["large", "small"]);
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt", b"a"), ("a.TXT", b"b")]),
        "image `DIR/a.png` has two captions, `a.TXT` and `a.txt`: remove one",
    );
}

#[test]
fn what_systems_leave_in_folders_is_passed_over() {
    let folder = folder(&[
        ("a.png", &png()),
        ("a.txt", b"a"),
        (".DS_Store", b"x"),
        ("._a.png", b"x"),
        ("Thumbs.db", b"x"),
        ("desktop.ini", b"x"),
        ("__MACOSX/._a.png", b"x"),
        ("__MACOSX/a.png", b"x"),
        ("@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", b"x"),
    ]);
    let scan = scan(&section(&folder)).expect("a good dataset");
    assert_eq!(names(&scan.samples), ["a.png"]);
    assert_eq!(scan.warnings, [""; 0]);
}

#[test]
fn what_is_not_used_is_counted_and_named() {
    assert_warned(
        &folder(&[
            ("a.png", &png()),
            ("a.txt", b"a"),
            ("a.json", b"{}"),
            ("b.zip", b"PK"),
            ("film.mp4", b""),
            ("x/1.npz", b""),
            ("x/2.npz", b""),
        ]),
        "not used, being neither image nor caption: 5 files (`a.json`, `b.zip`, `film.mp4`, `x/1.npz` and 1 more)",
    );
    assert_warned(
        &folder(&[("10_cat/a.png", &png()), ("10_cat/a.txt", b"a")]),
        "the number in front of `10_cat` is not read as repeats: every image is seen once an epoch; `dataset.folders` gives each folder its `repeats`",
    );
}

#[test]
fn what_says_where_pictures_come_from_is_passed_over() {
    let png = png();
    let about = ["README.md", "SOURCES.md", "LICENSE", "deep/Notice.md"];
    let mut files: Vec<(&str, &[u8])> = about.map(|name| (name, &b"x"[..])).to_vec();
    files.extend([("a.png", &png[..]), ("a.txt", b"a")]);
    let scan = scan(&section(&folder(&files))).expect("a dataset");
    assert_eq!(scan.warnings, [""; 0]);
    assert_eq!(names(&scan.samples), ["a.png"]);
}

/// A run with a preview, as it lies in a folder.
fn run_in(folder: &Path, marks: &[(&str, &[u8])]) {
    let png = png();
    let preview: (&str, &[u8]) = ("samples/step-0000002-0.png", &png);
    for (name, bytes) in marks.iter().chain([&preview]) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("make folder");
        fs::write(path, bytes).expect("write file");
    }
}

#[test]
fn a_run_inside_is_passed_over_whatever_its_name() {
    let marks: [&[(&str, &[u8])]; 4] = [
        &[("run.lock", b"1\n")],
        &[("LATEST", b"ckpt-0000000002\n0\n")],
        &[("config.toml", b""), ("metrics.jsonl", b"")],
        &[("ckpt-0000000002/MANIFEST.json", b"{}")],
    ];
    let row = br#"{"file_name": "a.png", "text": "a"}"#;
    let forms: [(&str, &[u8]); 3] = [
        ("a.txt", b"a"),
        ("metadata.jsonl", row),
        ("metadata.csv", b"file_name,text\na.png,a\n"),
    ];
    for marks in marks {
        for form in forms {
            for place in ["out", "sub/photos", ""] {
                let folder = folder(&[("a.png", &png()), form]);
                run_in(&folder.path().join(place), marks);
                let scan = scan(&section(&folder)).expect("a good dataset");
                assert_eq!(
                    names(&scan.samples),
                    ["a.png"],
                    "{marks:?} {form:?} {place}"
                );
            }
        }
    }
    // a folder of samples that belongs to no run is the user's own
    let own = folder(&[("samples/a.png", &png()), ("samples/a.txt", b"a")]);
    assert_eq!(names(&samples(&own)), ["samples/a.png"]);
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
        "image `DIR/b.HEIC` is in an unsupported format: convert to png, jpg or webp, or move away what is not to be trained on",
    );
    assert_refused(
        &folder(&[
            ("a.png", &png()),
            ("a.txt", b"a"),
            ("b/b.gif", b"?"),
            ("c.avif", b"?"),
        ]),
        "image `DIR/c.avif` is in an unsupported format (and 1 more image): convert to png, jpg or webp, or move away what is not to be trained on",
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
fn folders_may_be_named_like_files() {
    let folder = folder(&[("a.png/b.png", &png()), ("a.png/b.txt", b"b")]);
    assert_eq!(names(&samples(&folder)), ["a.png/b.png"]);
}

#[test]
fn a_folder_named_like_a_caption() {
    assert_refused(
        &folder(&[("a.png", &png()), ("a.txt/x", b"")]),
        "image `DIR/a.png` has no caption: expected `a.txt` beside it",
    );
}

#[test]
fn captions_that_are_no_utf8_text_are_refused_by_name() {
    for (caption, problem) in [
        (
            &b"caf\xe9"[..],
            "is not UTF-8; it looks like Windows-1252 or Latin-1: save it as UTF-8",
        ),
        (b"\xff\xfea\0", "is UTF-16, not UTF-8: save it as UTF-8"),
        (
            b"a\0 \0c\0",
            "is not UTF-8 text; it looks like UTF-16 without a mark: save it as UTF-8",
        ),
        (
            b"a \x07",
            "holds the control character U+0007: is it UTF-8 text? Remove it",
        ),
    ] {
        assert_refused(
            &folder(&[("a.png", &png()), ("a.txt", caption)]),
            &format!("caption `DIR/a.txt` {problem}"),
        );
        let table = [b"file_name,text\na.png,", caption].concat();
        let table = folder(&[("a.png", &png()), ("metadata.csv", &table)]);
        let error = scan(&section(&table)).expect_err("the table is bad");
        let start = "`DIR/metadata.csv` line 2: ";
        assert!(line(table.path(), &error).starts_with(start), "{error}");
    }
    assert_list_refused(
        r#"{"file_name": "a.png", "text": "a\u0000b"}"#.as_bytes(),
        "`DIR/metadata.jsonl` line 1: text holds the control character U+0000: is it UTF-8 text? Remove it",
    );
}

#[test]
fn caption_too_large() {
    let fits = [b'x'; 64 << 10];
    let samples = samples(&folder(&[("a.png", &png()), ("a.txt", &fits)]));
    assert_eq!(samples[0].caption.len(), 64 << 10);
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
fn links_are_followed_in_every_form() {
    use std::os::unix::fs::symlink;
    let store = folder(&[
        ("1", &png()),
        ("2", b"{\"file_name\": \"sub/a.png\", \"text\": \"a\"}"),
        ("3", b"a"),
        ("photos/b.png", &png()),
        ("photos/b.txt", b"b"),
    ]);
    let stored = |name: &str| store.path().join(name);
    let pairs = folder(&[]);
    symlink(stored("1"), pairs.path().join("a.png")).expect("make a link");
    symlink(stored("3"), pairs.path().join("a.txt")).expect("make a link");
    symlink(stored("photos"), pairs.path().join("linked")).expect("make a link");
    assert_eq!(names(&samples(&pairs)), ["a.png", "linked/b.png"]);

    let listed = folder(&[("sub/x.md", b"")]);
    symlink(stored("1"), listed.path().join("sub/a.png")).expect("make a link");
    symlink(stored("2"), listed.path().join("metadata.jsonl")).expect("make a link");
    assert_eq!(names(&samples(&listed)), ["sub/a.png"]);

    let through_a_link = pairs.path().join("itself");
    symlink(pairs.path(), &through_a_link).expect("make a link");
    assert_warned(
        &pairs,
        "not read twice, being linked to folders that were already read: `itself/`",
    );
    let section = DatasetSection {
        path: through_a_link,
        ..DatasetSection::default()
    };
    assert_eq!(scan(&section).expect("a good dataset").samples.len(), 2);
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
    let scan = scan(&section(&folder)).expect("a good dataset");
    assert_eq!(
        scan.warnings,
        ["not used, since no image has the name: 1 text file (`notes.txt`)"]
    );
    let samples = scan.samples;
    assert_eq!(names(&samples), ["a.png", "sub/b.png"]);
    assert_eq!(samples[1].caption, "bé");
    assert_eq!(samples[1].image, folder.path().join("sub/b.png"));
}

#[test]
fn an_empty_list() {
    assert_refused(
        &folder(&[("a.png", &png()), ("metadata.jsonl", b"\n")]),
        "image `DIR/a.png` is not listed in metadata.jsonl",
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
        "`DIR/metadata.jsonl` line 1: is not UTF-8; it looks like Windows-1252 or Latin-1: save it as UTF-8",
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
    for name in [
        "../a.png",
        "/etc/a.png",
        "sub/../../a.png",
        "..\\\\a.png",
        "C:\\\\a.png",
        ".",
    ] {
        assert_list_refused(
            ROW.replace("a.png", name).as_bytes(),
            &format!(
                "`DIR/metadata.jsonl` line 1: file_name `{}` leads out of the dataset folder",
                name.replace("\\\\", "\\")
            ),
        );
    }
}

#[test]
fn listed_names_may_be_spelled_as_another_system_does() {
    let folder = folder(&[
        ("sub/caf\u{e9}.png", &png()),
        ("B.PNG", &png()),
        (
            "metadata.jsonl",
            b"{\"file_name\": \"sub\\\\cafe\\u0301.png\", \"text\": \"a\"}\n{\"file_name\": \"b.png\", \"text\": \"b\"}",
        ),
    ]);
    assert_eq!(names(&samples(&folder)), ["B.PNG", "sub/caf\u{e9}.png"]);
}

#[test]
fn a_list_may_lie_in_a_subfolder() {
    let folder = folder(&[
        ("train/a.png", &png()),
        ("train/metadata.jsonl", ROW.as_bytes()),
        ("more/b.png", &png()),
        ("more/b.txt", b"b"),
    ]);
    assert_eq!(names(&samples(&folder)), ["more/b.png", "train/a.png"]);
    fs::remove_dir_all(folder.path().join("more")).expect("remove folder");
    let row = ROW.replace("a.png", "train/a.png");
    fs::write(folder.path().join("metadata.jsonl"), row).expect("write file");
    assert_refused(
        &folder,
        "image `DIR/train/a.png` is in two lists: remove it from one",
    );
}

// metadata.csv

#[test]
fn a_table_is_read_as_spreadsheets_write_it() {
    for table in [
        "file_name,text\na.png,\"a cat, asleep\"\n",
        "\u{feff}file_name;text;width\r\na.png;a cat, asleep;40\r\n",
        "id\ttext\tfile_name\n7\ta cat, asleep\ta.png\n",
        "\"file_name\",\"text\"\n\"a.png\",\"a cat, asleep\"",
    ] {
        let folder = folder(&[("a.png", &png()), ("metadata.csv", table.as_bytes())]);
        assert_eq!(samples(&folder)[0].caption, "a cat, asleep", "{table}");
    }
}

#[test]
fn a_bad_table_is_refused_by_line() {
    for (table, problem) in [
        (
            "file_name,caption\na.png,a\n",
            "1: has no column `text`, only: file_name, caption",
        ),
        (
            "image,text\na.png,a\n",
            "1: has no column `file_name`, only: image, text",
        ),
        (
            "file_name,text,text\na.png,a,b\n",
            "1: has two columns `text`",
        ),
        (
            "file_name,text\n\na.png,a cat, asleep\n",
            "3: has 3 columns, not 2: put a text with commas in quotes",
        ),
        (
            "file_name,text\nb.png,a\n",
            "2: image `b.png` does not exist",
        ),
        (
            "file_name,text\na.png,a\na.png,b\n",
            "3: file_name `a.png` was already listed on line 2",
        ),
        (
            "file_name,text\n../a.png,a\n",
            "2: file_name `../a.png` leads out of the dataset folder",
        ),
    ] {
        assert_refused(
            &folder(&[("a.png", &png()), ("metadata.csv", table.as_bytes())]),
            &format!("`DIR/metadata.csv` line {problem}"),
        );
    }
    assert_refused(
        &folder(&[
            ("a.png", &png()),
            ("metadata.csv", b"file_name,text\na.png,a\n"),
            ("metadata.jsonl", ROW.as_bytes()),
        ]),
        "`DIR` has both a metadata.jsonl and a metadata.csv: remove one",
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
        "`DIR/metadata.jsonl` line 1: file_name `metadata.jsonl` does not end in png, jpg, jpeg or webp, nor bmp or tiff",
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

// Images

#[test]
fn every_image_is_looked_at_before_anything_is_encoded() {
    for (bytes, problem) in [
        (
            &b"not a picture"[..],
            "is not a PNG, JPEG or WebP file, nor BMP or TIFF",
        ),
        (&png()[..200], "is cut short"),
    ] {
        assert_refused(
            &folder(&[("a.png", bytes), ("a.txt", b"a")]),
            &format!("image `DIR/a.png` {problem}"),
        );
    }
}
