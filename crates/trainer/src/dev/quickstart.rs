//! What the bundled quickstart has learned: one picture to look at, and two numbers.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, ensure};
use image::{Rgb, RgbImage};

use crate::cli::{QuickstartArgs, SampleArgs};
use crate::config::RunConfig;
use crate::data::image::{ImageLimits, load_image};
use crate::image_file::ImagePlace;
use crate::sample::draw;

/// Things that the base model draws, that the LoRA was not shown, and that come out well with it.
const THINGS: [&str; 10] = [
    "fox", "dog", "giraffe", "penguin", "crab", "doughnut", "church", "guitar", "umbrella",
    "rocket",
];
/// Side of a thumbnail in pixels.
const TILE: u32 = 16;
/// Thumbnails of a thing: one for each style it was drawn in.
const STYLES: u32 = 4;

/// Draws `THINGS` in ink style without and with the LoRA of a finished run, writes `before-after.png` into the run
/// folder, and returns what to tell the user.
///
/// # Errors
/// A folder that holds no finished run, a gallery that cannot be read.
pub fn show(args: &QuickstartArgs) -> anyhow::Result<String> {
    let gallery = Gallery::load(&args.gallery)?;
    let config = RunConfig::load(&args.run.join("config.toml"), &[])?;
    let out = args.run.join("before-after.png");
    let place = ImagePlace::new(&out, true)?;
    let article = |thing: &str| {
        if thing.starts_with(['a', 'e', 'i', 'o', 'u']) {
            "an"
        } else {
            "a"
        }
    };
    let prompts = THINGS.map(|thing| format!("{} {thing}, ink style", article(thing)));
    let lora = args.run.join("lora.safetensors");
    let side = config.dataset.largest_resolution() as usize;
    let grid = draw(&SampleArgs {
        model: config.model.path.clone(),
        transformer: None,
        offline: true,
        lora: vec![lora.display().to_string()],
        prompt: prompts.to_vec(),
        steps: Some(20),
        guidance: None,
        height: Some(side),
        width: Some(side),
        seed: vec![1],
        compare: true,
        reference: Vec::new(),
        image: None,
        strength: None,
        mask: None,
        max_sequence_length: config.dataset.max_sequence_length,
        out: out.clone(),
        overwrite: true,
        device: args.device.clone(),
    })?;
    place.write(&grid.draw())?;

    let (without, with) = grid.pictures.split_at(THINGS.len());
    let found = |pictures: &[RgbImage]| {
        let pairs = pictures.iter().zip(THINGS);
        pairs
            .filter(|(picture, thing)| gallery.thing(picture) == *thing)
            .count()
    };
    let count = THINGS.len();
    let mut said = String::new();
    writeln!(
        said,
        "mean chroma: {:.3} without the LoRA, {:.3} with it (0 is black, white and grey)",
        mean_chroma(without),
        mean_chroma(with)
    )?;
    writeln!(
        said,
        "recognised:  {} of {count} without the LoRA, {} of {count} with it (nearest of {} thumbnails)",
        found(without),
        found(with),
        gallery.tiles.len()
    )?;
    writeln!(said, "before and after: {}", out.display())?;
    Ok(said)
}

/// Mean over all pixels of the largest less the smallest of red, green and blue, from 0 to 1.
pub fn mean_chroma(pictures: &[RgbImage]) -> f64 {
    let chroma = |Rgb(channels): &Rgb<u8>| {
        let (low, high) = (channels.iter().min(), channels.iter().max());
        f64::from(high.unwrap_or(&0) - low.unwrap_or(&0)) / 255.0
    };
    let pixels = pictures.iter().flat_map(RgbImage::pixels);
    let (sum, count) = pixels.fold((0.0, 0.0), |(sum, count), pixel| {
        (sum + chroma(pixel), count + 1.0)
    });
    sum / f64::max(count, 1.0)
}

/// Thumbnails of drawings on white, to find out what a picture shows.
#[derive(Debug)]
pub struct Gallery {
    tiles: Vec<Tile>,
}

#[derive(Debug)]
struct Tile {
    thing: String,
    values: Vec<f32>,
}

impl Gallery {
    /// Reads `gallery.png` and `things.txt`: a row of thumbnails for each line.
    ///
    /// # Errors
    /// Files that cannot be read or do not fit each other.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join("things.txt");
        let things = std::fs::read_to_string(&path);
        let things = things.with_context(|| format!("read {}", path.display()))?;
        let image = load_image(&folder.join("gallery.png"), &ImageLimits::default())?;
        let rows = things.lines().count() as u32;
        ensure!(
            image.dimensions() == (STYLES * TILE, rows * TILE),
            "{}: a gallery of {rows} things is {} x {} pixels",
            folder.join("gallery.png").display(),
            STYLES * TILE,
            rows * TILE
        );
        let tile = |row: u32, column: u32| {
            image::imageops::crop_imm(&image, column * TILE, row * TILE, TILE, TILE).to_image()
        };
        let tiles = (0..).zip(things.lines()).flat_map(|(row, thing)| {
            (0..STYLES).map(move |column| Tile {
                thing: thing.into(),
                values: thumbnail(&tile(row, column)),
            })
        });
        Ok(Self {
            tiles: tiles.collect(),
        })
    }

    /// The thing whose thumbnail is nearest to that of `picture`, whose sides must be a multiple of a thumbnail's.
    pub fn thing(&self, picture: &RgbImage) -> &str {
        let values = thumbnail(picture);
        let distance = |tile: &Tile| -> f32 {
            let pairs = tile.values.iter().zip(&values);
            pairs.map(|(a, b)| (a - b) * (a - b)).sum()
        };
        let nearest = self
            .tiles
            .iter()
            .min_by(|a, b| distance(a).total_cmp(&distance(b)));
        nearest.map_or("", |tile| &tile.thing)
    }
}

/// Means over the boxes of a 16 x 16 grid, three channels each.
fn thumbnail(picture: &RgbImage) -> Vec<f32> {
    let (width, height) = (
        (picture.width() / TILE).max(1),
        (picture.height() / TILE).max(1),
    );
    let mut values = vec![0.0; (TILE * TILE * 3) as usize];
    for (x, y, pixel) in picture.enumerate_pixels() {
        let (column, row) = (x / width, y / height);
        if column < TILE && row < TILE {
            let at = ((row * TILE + column) * 3) as usize;
            for (value, channel) in values[at..at + 3].iter_mut().zip(pixel.0) {
                *value += f32::from(channel) / (width * height) as f32;
            }
        }
    }
    values
}
