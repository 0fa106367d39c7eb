use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageEncoder, Rgba, RgbaImage};

use super::*;
use crate::data::testing::{encoded, folder, gradient, jpeg, line, png, webp};

fn bmp() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::Bmp)
}

fn tiff() -> Vec<u8> {
    encoded(&gradient().into(), ImageFormat::Tiff)
}

#[track_caller]
fn assert_not_decoded(bytes: &[u8], message: &str) {
    let error = decode_image(Path::new("DIR/x"), bytes, &ImageLimits::default())
        .expect_err("the image is bad");
    assert_eq!(line(Path::new("DIR"), &error), message);
}

#[test]
fn lossless_formats_give_the_pixels_back() {
    for bytes in [png(), webp(), bmp(), tiff()] {
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        assert_eq!(image.expect("a good image"), gradient());
        let header = inspect(Path::new("x"), &bytes, &ImageLimits::default());
        let header = header.expect("a good image");
        assert_eq!((header.width_px, header.height_px), (40, 24));
        assert!(!header.more_pictures && !header.unusable_profile);
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
    let message = "image `DIR/x` is not a PNG, JPEG or WebP file, nor BMP or TIFF";
    assert_not_decoded(b"", message);
    assert_not_decoded(&[0; 4096], message);
    for (bytes, end) in [
        (
            &b"GIF89a\x01\x00\x01\x00\x00\x00\x00"[..],
            "it is GIF; convert it to png or jpg",
        ),
        (
            b"\0\0\0\x1cftypavif\0\0",
            "it is AVIF; convert it to png or jpg",
        ),
        (
            b"\0\0\0\x18ftypheic\0\0",
            "it is HEIC; convert it to png or jpg",
        ),
        (b"\xff\x0a\x00", "it is JPEG XL; convert it to png or jpg"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "it is a pointer of Git LFS; fetch it with `git lfs pull`",
        ),
        (
            b"\n<!DOCTYPE html><html>",
            "it is a web page; download the picture again",
        ),
    ] {
        assert_not_decoded(bytes, &format!("{message}: {end}"));
    }
}

#[test]
fn every_truncation_is_an_error() {
    for bytes in [png(), jpeg(), webp(), bmp(), tiff()] {
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
    for bytes in [png(), jpeg(), webp(), bmp(), tiff()] {
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

// Colours

fn display_p3() -> Vec<u8> {
    let profile = moxcms::ColorProfile::new_display_p3();
    profile.encode().expect("a profile of its own making")
}

/// A PNG with an ICC profile.
fn with_icc(image: &DynamicImage, profile: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    encoder
        .set_icc_profile(profile.to_vec())
        .expect("PNG has profiles");
    image.write_with_encoder(encoder).expect("encode in memory");
    bytes
}

/// A PNG with more chunks before its pixels.
fn with_chunks(image: &DynamicImage, chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let mut bytes = encoded(image, ImageFormat::Png);
    let mut added = Vec::new();
    for (kind, data) in chunks {
        let checked = [&kind[..], data].concat();
        added.extend((data.len() as u32).to_be_bytes());
        added.extend(&checked);
        added.extend(crc32(&checked).to_be_bytes());
    }
    bytes.splice(33..33, added); // after signature and header
    bytes
}

fn first_pixel(bytes: &[u8]) -> [u8; 3] {
    let image = decode_image(Path::new("x"), bytes, &ImageLimits::default());
    image.expect("a good image").get_pixel(0, 0).0
}

fn has_unusable_profile(bytes: &[u8]) -> bool {
    let header = inspect(Path::new("x"), bytes, &ImageLimits::default());
    header.expect("a good image").unusable_profile
}

/// Display P3 has sRGB's curve and wider primaries; the numbers are of the matrices in CSS Color 4.
#[test]
fn a_wide_gamut_becomes_srgb() {
    let colours = [
        ([255, 0, 0], [255, 0, 0]), // beyond sRGB
        ([128, 128, 128], [128, 128, 128]),
        ([200, 100, 50], [215, 93, 31]),
        ([60, 120, 60], [30, 122, 52]),
    ];
    for (given, expected) in colours {
        let near = |found: [u8; 3]| {
            let off = found.iter().zip(expected).map(|(a, b)| a.abs_diff(b)).max();
            assert!(
                off <= Some(2),
                "{given:?}: {found:?}, expected {expected:?}"
            );
        };
        let rgb = RgbImage::from_pixel(2, 1, Rgb(given));
        let [r, g, b] = given;
        let rgba = RgbaImage::from_pixel(2, 1, Rgba([r, g, b, 255]));
        let deep = DynamicImage::from(rgb.clone()).into_rgb16();
        let profile = display_p3();
        for image in [rgb.clone().into(), rgba.into(), deep.into()] {
            near(first_pixel(&with_icc(&image, &profile)));
        }
        near(first_pixel(&with_chunks(
            &rgb.into(),
            &[(b"cICP", &[12, 13, 0, 1])],
        )));
    }
}

#[test]
fn every_format_tells_its_profile() {
    let image = RgbImage::from_pixel(16, 16, Rgb([200, 100, 50]));
    let write = |encoder: &mut dyn FnMut(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        encoder(&mut bytes);
        first_pixel(&bytes)
    };
    let jpeg = write(&mut |bytes| {
        let mut encoder = JpegEncoder::new_with_quality(bytes, 100);
        encoder
            .set_icc_profile(display_p3())
            .expect("JPEG has profiles");
        image.write_with_encoder(encoder).expect("encode in memory");
    });
    let webp = write(&mut |bytes| {
        let mut encoder = image::codecs::webp::WebPEncoder::new_lossless(bytes);
        encoder
            .set_icc_profile(display_p3())
            .expect("WebP has profiles");
        image.write_with_encoder(encoder).expect("encode in memory");
    });
    for found in [jpeg, webp] {
        let off = found
            .iter()
            .zip([215, 93, 31])
            .map(|(a, b)| a.abs_diff(b))
            .max();
        assert!(off <= Some(4), "{found:?}");
    }
}

#[test]
fn srgb_stays_as_it_is() {
    let profile = moxcms::ColorProfile::new_srgb()
        .encode()
        .expect("a profile");
    let image = DynamicImage::from(gradient());
    let gamma = 45455_u32.to_be_bytes();
    for bytes in [
        with_icc(&image, &profile),
        with_chunks(&image, &[(b"cICP", &[1, 13, 0, 1])]),
        with_chunks(
            &image,
            &[(b"sRGB", &[0]), (b"gAMA", &100_000_u32.to_be_bytes())],
        ),
        with_chunks(&image, &[(b"sRGB", &[0]), (b"gAMA", &gamma)]),
    ] {
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        assert_eq!(image.expect("a good image"), gradient());
    }
}

#[test]
fn a_curve_of_its_own_is_undone() {
    let grey = DynamicImage::from(image::GrayImage::from_pixel(2, 1, image::Luma([128])));
    // half the light, which sRGB writes as 188
    let linear = with_chunks(&grey, &[(b"gAMA", &100_000_u32.to_be_bytes())]);
    assert!(
        first_pixel(&linear)
            .iter()
            .all(|&value| value.abs_diff(188) <= 1)
    );
    let profile = moxcms::ColorProfile::new_gray_with_gamma(1.0);
    let linear = with_icc(&grey, &profile.encode().expect("a profile"));
    assert!(
        first_pixel(&linear)
            .iter()
            .all(|&value| value.abs_diff(188) <= 1)
    );
}

#[test]
fn a_broken_profile_is_told_and_ignored() {
    let image = DynamicImage::from(gradient());
    let cmyk = {
        let mut profile = display_p3();
        profile[16..20].copy_from_slice(b"CMYK");
        profile
    };
    for bytes in [
        with_icc(&image, b"no profile"),
        with_icc(&image, &display_p3()[..200]),
        with_icc(&image, &cmyk),
        with_chunks(&image, &[(b"iCCP", b"x\0\0not zlib")]),
        with_chunks(&image, &[(b"cICP", &[200, 13, 0, 1])]),
        with_chunks(&image, &[(b"gAMA", &[0; 4])]),
    ] {
        assert!(has_unusable_profile(&bytes));
        let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        assert_eq!(image.expect("a good image"), gradient());
    }
}

#[test]
fn any_changed_byte_of_a_profile_is_survived() {
    let pixel = RgbImage::from_pixel(1, 1, Rgb([10, 128, 200])).into();
    let profile = display_p3();
    for at in 0..profile.len() {
        for flip in [0x80, 0xff] {
            let mut profile = profile.clone();
            profile[at] ^= flip;
            let bytes = with_icc(&pixel, &profile);
            let _ = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
        }
    }
}

#[test]
fn print_and_hdr_are_refused_by_name() {
    let mut cmyk = jpeg();
    let frame = cmyk.windows(2).position(|pair| pair == [0xff, 0xc0]);
    cmyk[frame.expect("a frame header") + 9] = 4;
    assert_not_decoded(
        &cmyk,
        "image `DIR/x` is in CMYK, the colours of print: convert it to RGB and save it again",
    );
    let pq = with_chunks(&gradient().into(), &[(b"cICP", &[9, 16, 0, 1])]);
    let hdr = "image `DIR/x` is an HDR picture, whose brightness has no meaning here: save it with 8 or 16 bits in sRGB";
    assert_not_decoded(&pq, hdr);
    let float = DynamicImage::from(gradient()).into_rgb32f();
    assert_not_decoded(&encoded(&float.into(), ImageFormat::Tiff), hdr);
}

#[test]
fn the_first_of_several_pictures_is_taken_and_told() {
    let frames = [0, 0, 0, 2, 0, 0, 0, 0];
    let animated = with_chunks(&gradient().into(), &[(b"acTL", &frames)]);
    let header = inspect(Path::new("x"), &animated, &ImageLimits::default());
    assert!(header.expect("a good image").more_pictures);
    assert_eq!(tiff_has_pages(&tiff()), Some(false));
    let mut pages = tiff();
    let directory = u32::from_le_bytes(*pages[4..].first_chunk().expect("a header")) as usize;
    let entries = usize::from(u16::from_le_bytes([pages[directory], pages[directory + 1]]));
    pages[directory + 2 + 12 * entries] = 8;
    assert_eq!(tiff_has_pages(&pages), Some(true));
}

#[test]
fn orientation_is_found_wherever_a_png_keeps_it() {
    let mut exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01".to_vec();
    exif.extend(b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"); // orientation = 6
    let mut bytes = with_chunks(&gradient().into(), &[(b"eXIf", &exif)]);
    let chunk: Vec<u8> = bytes.drain(33..33 + 12 + exif.len()).collect();
    let end = bytes.len() - 12;
    bytes.splice(end..end, chunk); // after the pixels
    let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
    assert_eq!(image.expect("a good image").dimensions(), (24, 40));
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
    let header = inspect(Path::new("x"), &bytes, &ImageLimits::default());
    let header = header.expect("a good image");
    assert_eq!((header.width_px, header.height_px), (16, 32));
    let image = decode_image(Path::new("x"), &bytes, &ImageLimits::default());
    let image = image.expect("a good image");
    assert_eq!(image.dimensions(), (16, 32));
    assert!(image.get_pixel(2, 16).0[0] > 200 && image.get_pixel(13, 16).0[0] < 50);
}
