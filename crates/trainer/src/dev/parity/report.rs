//! What a case computes to, and how far that is from what it expects.

use anyhow::Context;
use lora_core::files::host::HostTensor;

use super::case::{Case, Tensors};

/// One compared quantity.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) error: f64,
    pub(crate) bound: f64,
}

impl Line {
    pub(crate) fn passed(&self) -> bool {
        self.error <= self.bound // false for NaN
    }
}

/// Everything a case computes to, and the comparison.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) lines: Vec<Line>,
    pub(crate) actual: Tensors,
}

impl Report {
    /// A line for every expected tensor, with the case's one tolerance; integers must be equal.
    ///
    /// # Errors
    /// A case without `tolerance.rel`.
    pub(crate) fn by_tensor(case: &Case, actual: Tensors) -> anyhow::Result<Self> {
        let rel = case.f64("/tolerance/rel")?;
        let line = |name: &str| {
            let expected = case.expected.read(name)?;
            Ok(match actual.get(name) {
                None => Line {
                    name: format!("{name} (not computed)"),
                    error: f64::NAN,
                    bound: rel,
                },
                Some(actual) => Line {
                    name: name.into(),
                    error: tensor_error(actual, &expected),
                    bound: if expected.dtype.is_float() { rel } else { 0.0 },
                },
            })
        };
        let lines = case.expected.names().map(line);
        let lines = lines.collect::<anyhow::Result<_>>()?;
        Ok(Self { lines, actual })
    }

    /// The line of an expected tensor.
    pub(crate) fn line(&mut self, name: &str) -> Option<&mut Line> {
        self.lines.iter_mut().find(|line| line.name == name)
    }

    /// A tensor that was computed.
    pub(crate) fn actual(&self, name: &str) -> anyhow::Result<&HostTensor> {
        self.actual
            .get(name)
            .with_context(|| format!("no `{name}` was computed"))
    }
}

/// `‖actual - expected‖ / ‖expected‖` in f64; infinite for another shape, and for integers unless they are equal.
pub(crate) fn tensor_error(actual: &HostTensor, expected: &HostTensor) -> f64 {
    if actual.shape != expected.shape {
        return f64::INFINITY;
    }
    if !expected.dtype.is_float() {
        return match actual.to_i64() == expected.to_i64() {
            true => 0.0,
            false => f64::INFINITY,
        };
    }
    relative_error(&actual.to_f64(), &expected.to_f64())
}

/// `‖actual - expected‖ / ‖expected‖`.
pub(crate) fn relative_error(actual: &[f64], expected: &[f64]) -> f64 {
    let difference: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e) * (a - e))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    if difference == 0.0 {
        0.0
    } else {
        (difference / norm).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_must_be_equal_and_floats_are_relative() {
        let a = HostTensor::from_i64([2], &[1, 2]);
        assert_eq!(
            tensor_error(&a, &HostTensor::from_i64([2], &[1, 3])),
            f64::INFINITY
        );
        let x = HostTensor::from_f32([2], &[3.0, 4.0]);
        assert!((tensor_error(&HostTensor::from_f32([2], &[3.0, 4.5]), &x) - 0.1).abs() < 1e-12);
        assert!(tensor_error(&HostTensor::from_f32([2], &[f32::NAN, 4.0]), &x).is_nan());
    }
}
