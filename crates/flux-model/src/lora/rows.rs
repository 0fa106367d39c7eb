//! A choice of rows of a matrix: parts of fused modules, exchanged halves.

use std::ops::Range;

/// Rows of a matrix, in order; adjacent ranges are one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rows(Vec<Range<usize>>);

impl Rows {
    /// The first `count` rows.
    pub fn all(count: usize) -> Self {
        Self::span(0..count)
    }

    /// Consecutive rows.
    pub fn span(rows: Range<usize>) -> Self {
        Self::of([rows])
    }

    /// The rows of all ranges, one range after the other.
    pub fn of(ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut joined: Vec<Range<usize>> = Vec::new();
        for range in ranges {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
        }
        Self(joined)
    }

    /// The second half of `count` rows, then the first.
    pub fn exchanged_halves(count: usize) -> Self {
        let half = count / 2;
        Self::of([half..2 * half, 0..half])
    }

    /// The ranges, in order.
    pub fn ranges(&self) -> &[Range<usize>] {
        &self.0
    }

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.0.iter().map(Range::len).sum()
    }

    /// The rows `wanted` of these rows.
    pub fn select(&self, wanted: &Self) -> Self {
        let mut selected = Vec::new();
        for wanted in &wanted.0 {
            let mut start = 0; // of `range`, counted in these rows
            for range in &self.0 {
                let from = wanted.start.max(start);
                let to = wanted.end.min(start + range.len());
                if from < to {
                    selected.push(range.start + from - start..range.start + to - start);
                }
                start += range.len();
            }
        }
        Self::of(selected)
    }

    /// These rows, then those of the others.
    pub fn stacked<'a>(parts: impl IntoIterator<Item = &'a Self>) -> Self {
        Self::of(parts.into_iter().flat_map(|part| part.0.iter().cloned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_compose() {
        let swapped = Rows::exchanged_halves(6);
        assert_eq!(swapped, Rows::of([3..6, 0..3]));
        assert_eq!(swapped.select(&Rows::span(2..4)), Rows::of([5..6, 0..1]));
        assert_eq!(swapped.select(&swapped), Rows::all(6));
        assert_eq!(swapped.select(&Rows::span(9..12)).count(), 0);
    }
}
