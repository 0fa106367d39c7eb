//! Lines in panels beside each other, as text and as SVG.

use std::fmt::{self, Write};

const WIDTH: f64 = 300.0;
const HEIGHT: f64 = 240.0;
/// Around a panel's axes, on each side.
const MARGIN: f64 = 42.0;
const COLOURS: [&str; 3] = ["#1f77b4", "#d62728", "#999999"];

/// Lines over a common axis, each as multiples of one value.
pub(super) struct Panel {
    title: &'static str,
    axis: &'static str,
    /// Where the points are.
    pub(super) x: Vec<usize>,
    lines: Vec<(&'static str, Vec<f64>)>,
}

impl Panel {
    /// One without lines.
    pub(super) fn new(title: &'static str, axis: &'static str) -> Self {
        Self {
            title,
            axis,
            x: Vec::new(),
            lines: Vec::new(),
        }
    }

    /// A line of values, as multiples of its first.
    pub(super) fn add(&mut self, name: &'static str, values: impl Iterator<Item = f64>) {
        let values: Vec<f64> = values.collect();
        let first = values.first().copied().unwrap_or(1.0);
        self.add_of(name, first, values.into_iter());
    }

    /// A line of values, as multiples of `of`.
    pub(super) fn add_of(
        &mut self,
        name: &'static str,
        of: f64,
        values: impl Iterator<Item = f64>,
    ) {
        let multiples = values.map(|value| value / of);
        self.lines.push((name, multiples.collect()));
    }

    fn svg(&self, left: f64) -> String {
        let lines = self.lines.iter().flat_map(|(_, line)| line.iter().copied());
        let top = lines.fold(1.0, f64::max) * 1.05;
        let right = self.x.iter().copied().max().unwrap_or(1) as f64 * 1.05;
        let at = |x: f64, y: f64| {
            let across = left + MARGIN + x / right * (WIDTH - 1.5 * MARGIN);
            let down = HEIGHT - MARGIN - y / top * (HEIGHT - 2.0 * MARGIN);
            (across, down)
        };
        let mut svg = String::new();
        let text = |svg: &mut String, (x, y): (f64, f64), anchor: &str, text: &str| {
            let _ = writeln!(
                svg,
                r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
            );
        };
        let (origin, up, along) = (at(0.0, 0.0), at(0.0, top), at(right, 0.0));
        let _ = writeln!(
            svg,
            r##"<path d="M{:.1} {:.1}V{:.1}H{:.1}" fill="none" stroke="#444"/>"##,
            up.0, up.1, origin.1, along.0
        );
        let middle = (origin.0 + along.0) / 2.0;
        text(&mut svg, (middle, MARGIN / 2.0), "middle", self.title);
        text(&mut svg, (middle, HEIGHT - 8.0), "middle", self.axis);
        for &x in &self.x {
            let (across, down) = at(x as f64, 0.0);
            text(&mut svg, (across, down + 14.0), "middle", &x.to_string());
        }
        for y in 1..=top as usize {
            let (across, down) = at(0.0, y as f64);
            text(&mut svg, (across - 5.0, down + 4.0), "end", &y.to_string());
        }
        for ((name, line), (row, colour)) in self.lines.iter().zip(COLOURS.iter().enumerate()) {
            let points = self.x.iter().zip(line);
            let points: Vec<String> = points
                .map(|(&x, &y)| {
                    let (x, y) = at(x as f64, y);
                    format!("{x:.1},{y:.1}")
                })
                .collect();
            let _ = writeln!(
                svg,
                r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
                points.join(" ")
            );
            let (x, y) = (up.0 + 10.0, up.1 + 12.0 + 14.0 * row as f64);
            let _ = writeln!(
                svg,
                r#"<text x="{x:.1}" y="{y:.1}" fill="{colour}">{name}</text>"#
            );
        }
        svg
    }
}

impl fmt::Display for Panel {
    /// A Markdown table.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = |cells: Vec<String>| format!("| {} |", cells.join(" | "));
        let head = self.x.iter().map(usize::to_string);
        let title = format!("{}, by {}", self.title, self.axis);
        writeln!(f, "{}", cells([title].into_iter().chain(head).collect()))?;
        writeln!(f, "|{}", "---|".repeat(1 + self.x.len()))?;
        for (name, line) in &self.lines {
            let line = line.iter().map(|multiple| format!("{multiple:.2}"));
            let name = (*name).to_string();
            writeln!(f, "{}", cells([name].into_iter().chain(line).collect()))?;
        }
        writeln!(f)
    }
}

/// The panels beside each other.
pub(super) fn figure(panels: &[Panel]) -> String {
    let width = WIDTH * panels.len() as f64;
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="white"/>
"#
    );
    for (index, panel) in panels.iter().enumerate() {
        svg += &panel.svg(index as f64 * WIDTH);
    }
    svg + "</svg>\n"
}
