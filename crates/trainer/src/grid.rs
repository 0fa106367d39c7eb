//! Pictures in rows and columns, with what they show written above and beside them.

use std::convert::Infallible;

use embedded_graphics::Pixel;
use embedded_graphics::draw_target::DrawTarget;
use embedded_graphics::geometry::{OriginDimensions, Point, Size};
use embedded_graphics::mono_font::MonoTextStyle;
use embedded_graphics::mono_font::iso_8859_1::FONT_6X10 as FONT;
use embedded_graphics::pixelcolor::BinaryColor;
use embedded_graphics::prelude::Drawable;
use embedded_graphics::text::{Baseline, Text};
use image::{Rgb, RgbImage, imageops};

/// Pixels between pictures, and around texts.
const GAP: u32 = 4;
/// A picture this wide has letters of the font's own size; a wider one has them enlarged.
const WIDTH_OF_SMALL_LETTERS: u32 = 256;
/// Longer texts are cut here.
const MAX_LINES: usize = 6;

/// Pictures of one size, row by row, and the texts that name columns and rows.
#[derive(Debug)]
pub struct Grid {
    /// One for each column.
    pub columns: Vec<String>,
    /// One for each row; not written where there is one row only.
    pub rows: Vec<String>,
    /// As many as rows times columns, row by row.
    pub pictures: Vec<RgbImage>,
}

impl Grid {
    /// The whole as one picture, on white.
    pub fn draw(&self) -> RgbImage {
        let (width, height) = self.pictures.first().map_or((0, 0), RgbImage::dimensions);
        let scale = (width / WIDTH_OF_SMALL_LETTERS).max(1);
        let letter = (
            FONT.character_size.width * scale,
            FONT.character_size.height * scale,
        );
        let columns: Vec<Vec<String>> = self
            .columns
            .iter()
            .map(|text| wrap(text, (width / letter.0).saturating_sub(1).max(1) as usize))
            .collect();
        let rows: Vec<Vec<String>> = match self.rows.as_slice() {
            [_] => vec![Vec::new()],
            rows => rows.iter().map(|text| wrap(text, 12)).collect(),
        };
        let lines = columns.iter().map(Vec::len).max().unwrap_or(0) as u32;
        let letters = rows.iter().flatten().map(|line| line.chars().count());
        let letters = letters.max().unwrap_or(0) as u32;
        let top = GAP + lines * letter.1 + GAP;
        let left = GAP
            + if letters > 0 {
                letters * letter.0 + GAP
            } else {
                0
            };
        let x = |column: usize| left + column as u32 * (width + GAP);
        let y = |row: usize| top + row as u32 * (height + GAP);

        let mut image = RgbImage::from_pixel(x(columns.len()), y(rows.len()), WHITE);
        for (column, lines) in columns.iter().enumerate() {
            write(&mut image, lines, x(column), GAP, scale);
        }
        for (row, lines) in rows.iter().enumerate() {
            let above = height.saturating_sub(lines.len() as u32 * letter.1) / 2;
            write(&mut image, lines, GAP, y(row) + above, scale);
        }
        for (index, picture) in self.pictures.iter().enumerate() {
            let (row, column) = (index / columns.len(), index % columns.len());
            imageops::replace(&mut image, picture, x(column).into(), y(row).into());
        }
        image
    }
}

const WHITE: Rgb<u8> = Rgb([255, 255, 255]);
const BLACK: Rgb<u8> = Rgb([0, 0, 0]);

/// Lines of at most `width` letters, broken between words where that can be.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        while !word.is_empty() {
            let Some(line) = lines.last_mut() else { break };
            let used = line.chars().count();
            let space = usize::from(used > 0);
            if used + space + word.len() <= width {
                line.extend(" ".chars().take(space).chain(word.drain(..)));
            } else if used == 0 {
                line.extend(word.drain(..width));
            } else {
                lines.push(String::new());
            }
        }
    }
    if lines.len() > MAX_LINES {
        lines.truncate(MAX_LINES - 1);
        lines.push("...".into());
    }
    lines
}

/// Writes lines with their upper left corner at `left`, `top`. Letters beyond Latin-1 become question marks.
fn write(image: &mut RgbImage, lines: &[String], left: u32, top: u32, scale: u32) {
    let mut ink = Ink {
        image,
        left,
        top,
        scale,
    };
    let style = MonoTextStyle::new(&FONT, BinaryColor::On);
    let text = lines.join("\n");
    let Ok(_) = Text::with_baseline(&text, Point::zero(), style, Baseline::Top).draw(&mut ink);
}

/// Where letters are drawn: each of their pixels is a square of `scale` pixels.
struct Ink<'a> {
    image: &'a mut RgbImage,
    left: u32,
    top: u32,
    scale: u32,
}

impl OriginDimensions for Ink<'_> {
    fn size(&self) -> Size {
        let (width, height) = self.image.dimensions();
        Size::new(
            width.saturating_sub(self.left) / self.scale,
            height.saturating_sub(self.top) / self.scale,
        )
    }
}

impl DrawTarget for Ink<'_> {
    type Color = BinaryColor;
    type Error = Infallible;

    fn draw_iter<I>(&mut self, pixels: I) -> Result<(), Infallible>
    where
        I: IntoIterator<Item = Pixel<BinaryColor>>,
    {
        let size = self.size();
        for Pixel(point, color) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(point.x), u32::try_from(point.y)) else {
                continue;
            };
            if !color.is_on() || x >= size.width || y >= size.height {
                continue;
            }
            for (dx, dy) in (0..self.scale).flat_map(|dy| (0..self.scale).map(move |dx| (dx, dy))) {
                let (x, y) = (
                    self.left + x * self.scale + dx,
                    self.top + y * self.scale + dy,
                );
                self.image.put_pixel(x, y, BLACK);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(color: [u8; 3]) -> RgbImage {
        RgbImage::from_pixel(48, 32, Rgb(color))
    }

    #[test]
    fn every_picture_is_there_whole_and_named() {
        let colors = [[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0]];
        let grid = Grid {
            columns: vec!["a fox".into(), "an owl on a tree".into()],
            rows: vec!["seed 1".into(), "seed 2".into()],
            pictures: colors.map(picture).to_vec(),
        };
        let image = grid.draw();
        for color in colors {
            let pixels = image.pixels().filter(|pixel| pixel.0 == color).count();
            assert_eq!(pixels, 48 * 32, "{color:?}");
        }
        // in the order of reading
        let at = |color: [u8; 3]| {
            image
                .enumerate_pixels()
                .find_map(|(x, y, pixel)| (pixel.0 == color).then_some((x, y)))
                .expect("the picture is there")
        };
        let [a, b, c, d] = colors.map(at);
        assert!(
            a.1 == b.1 && c.1 == d.1 && a.1 < c.1,
            "{a:?} {b:?} {c:?} {d:?}"
        );
        assert!(
            a.0 == c.0 && b.0 == d.0 && a.0 < b.0,
            "{a:?} {b:?} {c:?} {d:?}"
        );
        let black = |x: std::ops::Range<u32>, y: std::ops::Range<u32>| {
            let inside = |at: (u32, u32)| x.contains(&at.0) && y.contains(&at.1);
            image
                .enumerate_pixels()
                .filter(|&(x, y, pixel)| *pixel == BLACK && inside((x, y)))
                .count()
        };
        assert!(black(a.0..a.0 + 48, 0..a.1) > 20);
        assert!(black(b.0..b.0 + 48, 0..a.1) > black(a.0..a.0 + 48, 0..a.1));
        assert!(black(0..a.0, a.1..a.1 + 32) > 20);
        assert!(black(0..a.0, c.1..c.1 + 32) > 20);
    }

    #[test]
    fn one_row_needs_no_name_and_wide_pictures_get_large_letters() {
        let one = |width| {
            Grid {
                columns: vec!["a fox".into()],
                rows: vec!["seed 1".into()],
                pictures: vec![RgbImage::new(width, 8)],
            }
            .draw()
        };
        assert_eq!(
            one(96).dimensions(),
            (GAP + 96 + GAP, GAP + 10 + GAP + 8 + GAP)
        );
        assert_eq!(one(1024).height(), GAP + 40 + GAP + 8 + GAP);
    }

    #[test]
    fn texts_are_broken_between_words_and_cut_when_long() {
        assert_eq!(wrap("a fox, ink style", 10), ["a fox, ink", "style"]);
        assert_eq!(wrap("abcdefgh ij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(wrap("", 4), [""]);
        let long = wrap(&"word ".repeat(50), 4);
        assert_eq!(long.len(), MAX_LINES);
        assert_eq!(long[MAX_LINES - 1], "...");
    }
}
