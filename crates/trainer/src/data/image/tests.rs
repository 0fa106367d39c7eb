use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgba, RgbaImage};

use super::*;
use crate::data::testing::{encoded, folder, gradient, jpeg, line, png, webp};

#[track_caller]
fn assert_not_decoded(bytes: &[u8], message: &str) {
    let error = decode_image(Path::new("DIR/x"), bytes, &ImageLimits::default())
        .expect_err("the image is bad");
    assert_eq!(line(Path::new("DIR"), &error), message);
}

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
