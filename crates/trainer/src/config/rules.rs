//! What values of the configuration must be, beyond what their types say.

use std::path::Path;

use crate::nearest::one_line;

/// Counts beyond this are typing errors, and their products would overflow.
pub(super) const MAX_COUNT: usize = 1 << 16;

/// Sides of images are multiples of this: 8 for the VAE, 2 for packing latents into tokens.
const SIDE_MULTIPLE_PX: u32 = 16;

/// Sides beyond this are typing errors.
const MAX_SIDE_PX: u32 = 8192;

/// A key and what is wrong with its value.
pub(super) type Invalid = (&'static str, String);

/// What a number must be, in words and as a test; NaN and infinity are never it.
pub(super) struct Rule(pub(super) &'static str, pub(super) fn(f64) -> bool);

pub(super) const FINITE: Rule = Rule("a finite number", |_| true);
pub(super) const ABOVE_0: Rule = Rule("above 0", |x| x > 0.0);
pub(super) const AT_LEAST_0: Rule = Rule("at least 0", |x| x >= 0.0);
pub(super) const BELOW_1: Rule = Rule("at least 0 and below 1", |x| (0.0..1.0).contains(&x));
pub(super) const PROBABILITY: Rule = Rule("between 0 and 1", |x| (0.0..=1.0).contains(&x));
/// Above `2 / (pi - 2)` the "mode" density folds back and leaves [0, 1] (arXiv:2403.03206, section 3.1).
pub(super) const MODE_SCALE: Rule = Rule("between -1 and 1.75", |x| {
    (-1.0..=2.0 / (std::f64::consts::PI - 2.0)).contains(&x)
});

impl Rule {
    pub(super) fn check(&self, key: &'static str, value: f64) -> Result<(), Invalid> {
        let Self(rule, holds) = self;
        if value.is_finite() && holds(value) {
            return Ok(());
        }
        Err((key, format!("must be {rule}, found {value}")))
    }
}

pub(super) fn check_word(key: &'static str, word: Option<&str>) -> Result<(), Invalid> {
    match word {
        Some(word) if word.trim().is_empty() || word.contains(char::is_control) => {
            let problem = format!("must be a word, found \"{}\"", one_line(word));
            Err((key, problem))
        }
        _ => Ok(()),
    }
}

pub(super) fn check_at_least_1(key: &'static str, value: u64) -> Result<(), Invalid> {
    if value >= 1 {
        return Ok(());
    }
    Err((key, format!("must be at least 1, found {value}")))
}

pub(super) fn check_count(key: &'static str, value: usize, max: usize) -> Result<(), Invalid> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err((key, format!("must be between 1 and {max}, found {value}")))
}

pub(super) fn check_seed(key: &'static str, seed: u64) -> Result<(), Invalid> {
    if i64::try_from(seed).is_ok() {
        return Ok(());
    }
    let max = i64::MAX;
    let problem = format!("must be at most {max}, the largest number TOML can hold, found {seed}");
    Err((key, problem))
}

pub(super) fn check_side(key: &'static str, side_px: u32) -> Result<(), Invalid> {
    if side_px.is_multiple_of(SIDE_MULTIPLE_PX)
        && (SIDE_MULTIPLE_PX..=MAX_SIDE_PX).contains(&side_px)
    {
        return Ok(());
    }
    let below =
        (side_px / SIDE_MULTIPLE_PX * SIDE_MULTIPLE_PX).clamp(SIDE_MULTIPLE_PX, MAX_SIDE_PX);
    let nearest = match below + SIDE_MULTIPLE_PX {
        above if side_px > below && above <= MAX_SIDE_PX => format!("{below} or {above}"),
        _ => below.to_string(),
    };
    let problem = format!(
        "must be a multiple of {SIDE_MULTIPLE_PX} between {SIDE_MULTIPLE_PX} and {MAX_SIDE_PX}, found {side_px}: take {nearest}"
    );
    Err((key, problem))
}

pub(super) fn check_path(key: &'static str, path: Option<&Path>) -> Result<(), Invalid> {
    let Some(path) = path else { return Ok(()) };
    let text = path.to_string_lossy();
    let problem = if text.is_empty() {
        "required, but not given"
    } else if text.starts_with('~') {
        "`~` is not expanded to your home folder here: write the path in full"
    } else if text.starts_with('$') || text.starts_with('%') {
        "variables are not expanded here: write the path in full"
    } else if text.contains(char::is_control) {
        "has a control character in it: in double quotes \\t is a tab and \\n a line break, so write a Windows path in single quotes or with /"
    } else {
        return Ok(());
    };
    Err((key, problem.into()))
}
