use std::error::Error;

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgba, RgbaImage};
use tempfile::TempDir;

use super::*;

fn gradient() -> RgbImage {
    RgbImage::from_fn(40, 24, |x, y| {
        Rgb([6 * x as u8, 10 * y as u8, (x * y) as u8])
    })
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, format)
        .expect("encode in memory");
    bytes.into_inner()
}

fn png() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::Png)
}

fn jpeg() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::Jpeg)
}

fn webp() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::WebP)
}

/// A dataset folder with these files.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    for (name, bytes) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a file has a folder")).expect("make folder");
        fs::write(path, bytes).expect("write file");
    }
    folder
}

fn section(folder: &TempDir) -> DatasetSection {
    DatasetSection {
        path: folder.path().into(),
        ..DatasetSection::default()
    }
}

/// The error as the program prints it, with the folder written as DIR.
fn line(folder: &Path, error: &DatasetError) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line = format!("{line}: {error}");
        source = error.source();
    }
    line.replace(&folder.display().to_string(), "DIR")
}

#[track_caller]
fn assert_refused(folder: &TempDir, message: &str) {
    let error = scan(&section(folder)).expect_err("the dataset is bad");
    let line = line(folder.path(), &error);
    assert_eq!(line, message);
    assert!(!line.contains('\n'));
}

#[track_caller]
fn assert_not_decoded(bytes: &[u8], message: &str) {
    let error = decode_image(Path::new("DIR/x"), bytes, &ImageLimits::default())
        .expect_err("the image is bad");
    assert_eq!(line(Path::new("DIR"), &error), message);
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

// Images

#[test]
fn lossless_formats_give_the_pixels_back() {
    for bytes in [png(), webp()] {
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        assert_eq!(image.expect("a good image"), gradient());
    }
}

#[test]
fn the_content_decides_the_format() {
    let folder = folder(&[("a.png", &jpeg())]);
    let image = load_image(&folder.path().join("a.png"), &ImageLimits::default());
    assert_eq!(image.expect("a JPEG after all").dimensions(), (40, 24));
}

#[test]
fn not_an_image() {
    let message = "image `DIR/x` is not a PNG, JPEG or WebP file";
    assert_not_decoded(b"", message);
    assert_not_decoded(b"GIF89a\x01\x00\x01\x00\x00\x00\x00", message);
    assert_not_decoded(&[0; 4096], message);
}

#[test]
fn every_truncation_is_an_error() {
    for bytes in [png(), jpeg(), webp()] {
        for length in 0..bytes.len() {
            decode_image(Path::new("x"), &bytes[..length], &ImageLimits::default())
                .expect_err("a truncated image");
        }
    }
    assert_not_decoded(&png()[..200], "image `DIR/x` is cut short");
    assert_not_decoded(&jpeg()[..600], "image `DIR/x` is cut short");
    assert_not_decoded(&webp()[..200], "image `DIR/x` is cut short");
}

#[test]
fn any_changed_byte_is_survived() {
    for bytes in [png(), jpeg(), webp()] {
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= flip;
                let _ = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
            }
        }
    }
}

#[test]
fn bytes_after_the_end_do_not_matter() {
    for mut bytes in [png(), jpeg(), webp()] {
        bytes.extend([0; 100]);
        decode_image(Path::new("x"), &bytes, &ImageLimits::default()).expect("a whole image");
    }
}

#[test]
fn corrupt_pixels() {
    let mut bytes = png();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    let error = decode_image(Path::new("x.png"), &bytes, &ImageLimits::default())
        .expect_err("the checksum is wrong");
    let line = line(Path::new("DIR"), &error);
    assert!(line.starts_with("cannot decode image `x.png`: "), "{line}");
}

/// A PNG whose header claims this size over a few bytes of data.
fn png_bomb(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = png();
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let checksum = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    })
}

#[test]
fn bombs_are_refused_by_their_header() {
    let start = std::time::Instant::now();
    assert_not_decoded(
        &png_bomb(60000, 60000),
        "image `DIR/x` is 60000x60000 pixels; at most 16384 a side and 100000000 in all are allowed",
    );
    assert_not_decoded(
        &png_bomb(16384, 16384),
        "image `DIR/x` is 16384x16384 pixels; at most 16384 a side and 100000000 in all are allowed",
    );
    let mut bomb = jpeg();
    let header = bomb
        .windows(2)
        .position(|pair| pair == [0xff, 0xc0])
        .expect("a frame header");
    bomb[header + 5..header + 9].fill(0xff);
    assert_not_decoded(
        &bomb,
        "image `DIR/x` is 65535x65535 pixels; at most 16384 a side and 100000000 in all are allowed",
    );
    let mut bomb = webp();
    // lossless header: 14 bits of width - 1, then 14 of height - 1
    bomb[21..25].copy_from_slice(&(0x3ffe_u32 | 0x3ffe << 14).to_le_bytes());
    assert_not_decoded(
        &bomb,
        "image `DIR/x` is 16383x16383 pixels; at most 16384 a side and 100000000 in all are allowed",
    );
    assert!(start.elapsed().as_secs() < 5);
}

#[test]
fn memory_is_bounded() {
    let limits = ImageLimits {
        max_decoded_bytes: 1000,
        ..ImageLimits::default()
    };
    let error = decode_image(Path::new("x"), &webp(), &limits).expect_err("over the limit");
    let line = line(Path::new("DIR"), &error);
    assert_eq!(line, "image `x` takes more than 0 MiB to decode");
}

#[test]
fn large_files_are_not_read() {
    let limits = ImageLimits {
        max_file_bytes: 1 << 20,
        ..ImageLimits::default()
    };
    let folder = folder(&[("a.png", &vec![0; (1 << 20) + 1])]);
    let error = read_image(&folder.path().join("a.png"), &limits).expect_err("too large");
    assert_eq!(
        line(folder.path(), &error),
        "image `DIR/a.png` is larger than 1 MiB"
    );
}

#[test]
fn transparency_shows_white() {
    let pixels = [
        Rgba([10, 20, 30, 255]),
        Rgba([10, 20, 30, 0]),
        Rgba([0, 100, 255, 128]),
    ];
    let image = RgbaImage::from_fn(3, 1, |x, _| pixels[x as usize]);
    for format in [ImageFormat::Png, ImageFormat::WebP] {
        let bytes = encoded(&image.clone().into(), format);
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        let image = image.expect("a good image");
        assert_eq!(image.get_pixel(0, 0), &Rgb([10, 20, 30]));
        assert_eq!(image.get_pixel(1, 0), &Rgb([255, 255, 255]));
        assert_eq!(image.get_pixel(2, 0), &Rgb([127, 177, 255]));
    }
}

#[test]
fn grey_and_16_bit_images_become_rgb() {
    let grey = image::GrayImage::from_pixel(2, 2, image::Luma([77]));
    let deep = image::ImageBuffer::from_pixel(2, 2, Rgba([0xffff_u16, 0, 0x8080, 0xffff]));
    for (image, expected) in [
        (DynamicImage::from(grey), Rgb([77, 77, 77])),
        (DynamicImage::from(deep), Rgb([255, 0, 128])),
    ] {
        let bytes = encoded(&image, ImageFormat::Png);
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        assert_eq!(image.expect("a good image").get_pixel(1, 1), &expected);
    }
}

#[test]
fn exif_orientation_is_applied() {
    // top half black, bottom half white, to be turned clockwise: the bottom goes to the left
    let image = RgbImage::from_fn(32, 16, |_, y| Rgb([if y < 8 { 0 } else { 255 }; 3]));
    let mut exif = b"MM\0\x2a\0\0\0\x08\0\x01".to_vec(); // TIFF header, one entry
    exif.extend(b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"); // orientation = 6
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 100);
    encoder.set_exif_metadata(exif).expect("EXIF is supported");
    encoder
        .write_image(image.as_raw(), 32, 16, ExtendedColorType::Rgb8)
        .expect("encode in memory");
    let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
    let image = image.expect("a good image");
    assert_eq!(image.dimensions(), (16, 32));
    assert!(image.get_pixel(2, 16).0[0] > 200 && image.get_pixel(13, 16).0[0] < 50);
}

// Digests

#[test]
fn content_digest_is_sha256() {
    assert_eq!(
        content_digest(b"abc"),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn changes_name_every_sample_that_differs() {
    let folder = folder(&[
        ("cat.png", &png()),
        ("cat.txt", b"a cat"),
        ("dog.png", &png()),
        ("dog.txt", b"a dog"),
        ("old.png", &png()),
        ("old.txt", b"old"),
    ]);
    let digests = || {
        let samples = scan(&section(&folder)).expect("a good dataset");
        sample_digests(&samples, &ImageLimits::default()).expect("readable images")
    };
    let write = |name: &str, bytes: &[u8]| {
        fs::write(folder.path().join(name), bytes).expect("write file");
    };
    let before = digests();
    assert_eq!(changes(&before, &digests()), [""; 0]);
    assert_eq!(dataset_digest(&before), dataset_digest(&digests()));
    write("dog.txt", b" a dog\n");
    assert_eq!(changes(&before, &digests()), [""; 0]);

    write("cat.png", &jpeg());
    write("dog.txt", b"two dogs");
    write("new.webp", &webp());
    write("new.txt", b"new");
    fs::remove_file(folder.path().join("old.png")).expect("remove file");
    fs::remove_file(folder.path().join("old.txt")).expect("remove file");
    let after = digests();
    assert_eq!(
        changes(&before, &after),
        [
            "changed image cat.png",
            "changed caption of dog.png",
            "added new.webp",
            "removed old.png"
        ]
    );
    assert_ne!(dataset_digest(&before), dataset_digest(&after));

    let json = serde_json::to_string(&after).expect("plain strings");
    let read: Vec<SampleDigest> = serde_json::from_str(&json).expect("what was written");
    assert_eq!(read, after);
}

#[test]
fn dataset_digest_keeps_fields_apart() {
    let digest = |name: &str, image: &str| {
        dataset_digest(&[SampleDigest {
            name: name.into(),
            image_sha256: image.into(),
            caption_sha256: String::new(),
        }])
    };
    assert_ne!(digest("ab", "c"), digest("a", "bc"));
}
