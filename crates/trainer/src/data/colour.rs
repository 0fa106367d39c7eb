//! Colours as they were meant: whatever a file says its numbers stand for, the encoder gets sRGB.
//!
//! A file says so by an ICC profile, or a PNG by its own chunks, of which the first of cICP, iCCP, sRGB, gAMA counts (PNG, third
//! edition, 4.3). Without any of them, and where what it says is next to sRGB, the numbers stay as they are.

use image::{DynamicImage, ImageBuffer, Pixel};
use moxcms::{
    Chromaticity, CicpColorPrimaries, CicpProfile, ColorPrimaries, ColorProfile, DataColorSpace,
    Layout, MatrixCoefficients, ToneReprCurve, TransferCharacteristics, TransformExecutor,
    TransformOptions, curve_from_gamma,
};

/// A colour space other than the file's numbers would be read in by default.
pub(super) struct Colour {
    profile: ColorProfile,
}

/// What the chunks of a PNG say about its colours, besides an ICC profile.
#[derive(Debug, Default)]
pub(super) struct PngColour {
    /// Primaries, transfer, matrix, full range.
    cicp: Option<[u8; 4]>,
    has_profile: bool,
    is_srgb: bool,
    /// Exponent from light to number, times 100000.
    gamma: Option<u32>,
    /// White, red, green and blue, x and y of each, times 100000.
    chromaticities: Option<[u32; 8]>,
}

/// There is something about colours in the file that cannot be used.
#[derive(Debug)]
pub(super) struct Unusable;

/// Two colour spaces that differ by no more than this many of 255 levels, at any of the probes, are one.
const SAME_LEVELS: u8 = 2;

impl PngColour {
    /// Takes note of a chunk; one of another kind or length is passed over.
    pub(super) fn read(&mut self, kind: &[u8], data: &[u8]) {
        let numbers = |data: &[u8]| -> Vec<u32> {
            let (numbers, _) = data.as_chunks::<4>();
            numbers.iter().map(|&it| u32::from_be_bytes(it)).collect()
        };
        match kind {
            b"cICP" => self.cicp = data.try_into().ok(),
            b"iCCP" => self.has_profile = true,
            b"sRGB" => self.is_srgb = true,
            b"gAMA" => self.gamma = numbers(data).first().copied(),
            b"cHRM" => self.chromaticities = numbers(data).try_into().ok(),
            _ => {}
        }
    }
}

impl Colour {
    /// The colour space that an ICC profile or a PNG's chunks stand for; `None` for sRGB, which it is if there are none.
    pub(super) fn of(profile: Option<&[u8]>, png: &PngColour) -> Result<Option<Self>, Unusable> {
        let profile = if let Some([primaries, transfer, matrix, full_range]) = png.cicp {
            if (matrix, full_range) != (0, 1) {
                return Err(Unusable); // YCbCr, or levels that leave room at both ends: not for a PNG
            }
            from_cicp(primaries, transfer)?
        } else if let Some(profile) = profile {
            from_icc(profile)?
        } else if png.has_profile {
            return Err(Unusable); // its decoder has dropped it as broken
        } else if let Some(gamma) = png.gamma.filter(|_| !png.is_srgb) {
            from_gamma(gamma, png.chromaticities)?
        } else {
            return Ok(None);
        };
        let colour = Self { profile };
        let is_srgb = colour.is_srgb()?;
        Ok((!is_srgb).then_some(colour))
    }

    /// Whether the numbers mean absolute brightness.
    pub(super) fn is_hdr(&self) -> bool {
        self.profile.cicp.is_some_and(|cicp| {
            use TransferCharacteristics::{Hlg, Smpte2084};
            matches!(cicp.transfer_characteristics, Smpte2084 | Hlg)
        })
    }

    /// Whether converting would change next to nothing.
    fn is_srgb(&self) -> Result<bool, Unusable> {
        let greys = (0..=255).step_by(5).map(|level| [level; 3]);
        let levels = [0, 85, 170, 255];
        let cube = levels.iter().flat_map(|&r| {
            let rest = move |&g| levels.map(|b| [r, g, b]);
            levels.iter().flat_map(rest).collect::<Vec<_>>()
        });
        let probes: Vec<u8> = greys.chain(cube).flatten().collect();
        let mut converted = probes.clone();
        let transform = self.transform::<u8>(Layout::Rgb)?;
        let done = transform.transform(&probes, &mut converted);
        done.map_err(|_| Unusable)?;
        let near = |(&a, &b): (&u8, &u8)| a.abs_diff(b) <= SAME_LEVELS;
        Ok(probes.iter().zip(&converted).all(near))
    }

    /// The same picture in sRGB, with as many bits as before; transparency stays.
    pub(super) fn to_srgb(&self, image: DynamicImage) -> DynamicImage {
        let has_alpha = image.color().has_alpha();
        let is_deep = image.color().bytes_per_pixel() / image.color().channel_count() > 1;
        match (has_alpha, is_deep) {
            (false, false) => self.convert(image.into_rgb8(), Layout::Rgb).into(),
            (true, false) => self.convert(image.into_rgba8(), Layout::Rgba).into(),
            (false, true) => self.convert(image.into_rgb16(), Layout::Rgb).into(),
            (true, true) => self.convert(image.into_rgba16(), Layout::Rgba).into(),
        }
    }

    fn convert<P>(
        &self,
        mut image: ImageBuffer<P, Vec<P::Subpixel>>,
        layout: Layout,
    ) -> ImageBuffer<P, Vec<P::Subpixel>>
    where
        P: Pixel,
        P::Subpixel: Sample,
    {
        let row = image.width() as usize * usize::from(P::CHANNEL_COUNT);
        if let Ok(transform) = self.transform::<P::Subpixel>(layout) {
            for row in image.chunks_exact_mut(row) {
                let before = row.to_vec();
                if transform.transform(&before, row).is_err() {
                    row.copy_from_slice(&before);
                }
            }
        }
        image
    }

    fn transform<T: Sample>(&self, layout: Layout) -> Result<Transform<T>, Unusable> {
        T::transform(&self.profile, layout)
    }
}

type Transform<T> = std::sync::Arc<dyn TransformExecutor<T> + Send + Sync>;

/// A channel of 8 or 16 bits.
trait Sample: Copy + Default {
    fn transform(from: &ColorProfile, layout: Layout) -> Result<Transform<Self>, Unusable>;
}

impl Sample for u8 {
    fn transform(from: &ColorProfile, layout: Layout) -> Result<Transform<Self>, Unusable> {
        from.create_transform_8bit(layout, &ColorProfile::new_srgb(), layout, options())
            .map_err(|_| Unusable)
    }
}

impl Sample for u16 {
    fn transform(from: &ColorProfile, layout: Layout) -> Result<Transform<Self>, Unusable> {
        from.create_transform_16bit(layout, &ColorProfile::new_srgb(), layout, options())
            .map_err(|_| Unusable)
    }
}

fn options() -> TransformOptions {
    TransformOptions {
        prefer_fixed_point: false,
        ..TransformOptions::default()
    }
}

/// An ICC profile for RGB, or for grey, which becomes one for RGB of the same curve.
fn from_icc(bytes: &[u8]) -> Result<ColorProfile, Unusable> {
    let profile = ColorProfile::new_from_slice(bytes).map_err(|_| Unusable)?;
    match (profile.color_space, &profile.gray_trc) {
        (DataColorSpace::Rgb, _) => Ok(profile),
        (DataColorSpace::Gray, Some(curve)) => {
            Ok(with_curve(ColorProfile::new_srgb(), curve.clone()))
        }
        _ => Err(Unusable),
    }
}

fn from_cicp(primaries: u8, transfer: u8) -> Result<ColorProfile, Unusable> {
    let cicp = CicpProfile {
        color_primaries: CicpColorPrimaries::try_from(primaries).map_err(|_| Unusable)?,
        transfer_characteristics: TransferCharacteristics::try_from(transfer)
            .map_err(|_| Unusable)?,
        matrix_coefficients: MatrixCoefficients::Identity,
        full_range: true,
    };
    let profile = ColorProfile::new_from_cicp(cicp);
    // without curves where the codes are known but stand for nothing, such as "unspecified"
    profile
        .is_matrix_shaper()
        .then_some(profile)
        .ok_or(Unusable)
}

fn from_gamma(gamma: u32, chromaticities: Option<[u32; 8]>) -> Result<ColorProfile, Unusable> {
    if !(10_000..=1_000_000).contains(&gamma) {
        return Err(Unusable); // 0, or a curve that leaves nothing but black and white
    }
    let curve = curve_from_gamma(100_000.0 / gamma as f32);
    let mut profile = with_curve(ColorProfile::new_srgb(), curve);
    if let Some(numbers) = chromaticities {
        let at = |i: usize| {
            let [x, y] = [numbers[i], numbers[i + 1]].map(|number| number as f32 / 100_000.0);
            Chromaticity::new(x, y)
        };
        let (red, green, blue) = (at(2), at(4), at(6));
        profile.update_rgb_colorimetry(at(0).to_xyyb(), ColorPrimaries { red, green, blue });
        let columns = profile.colorant_matrix().v;
        if !columns.iter().flatten().all(|value| value.is_finite()) {
            return Err(Unusable); // primaries that lie on one line
        }
    }
    Ok(profile)
}

fn with_curve(mut profile: ColorProfile, curve: ToneReprCurve) -> ColorProfile {
    profile.cicp = None; // it would take precedence over the curves
    profile.red_trc = Some(curve.clone());
    profile.green_trc = Some(curve.clone());
    profile.blue_trc = Some(curve);
    profile
}
