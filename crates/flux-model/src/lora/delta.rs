//! What an update adds to a weight, computed on the host: for merging, for tests, and for what no adapter can express.
//!
//! DoRA (Liu et al. 2024, arXiv:2402.09353): with `V = W + scale * delta`, the new weight is `m * V / norm(V)`. The norm
//! is that of the changed weight, as in PEFT, LyCORIS and OneTrainer; ComfyUI takes the norm of `W` for the output axis.

use lora_core::files::host::HostTensor;

use super::error::LoraFormatError;
use super::lycoris::dense;
use super::{Axis, Bias, Component, LoraSet, Magnitude, ModuleUpdate};

/// Looks up a base weight `[out, in]`, row-major, by module path.
pub type BaseWeight<'a> = dyn FnMut(&str) -> Option<Vec<f32>> + 'a;

/// Change of the weight `[out, in]` by an update of full strength; zero if only the bias changes.
///
/// # Errors
/// A tensor that cannot be read; no `base` where the change depends on it (DoRA, replaced weights), or a DoRA magnitude
/// that counts the inputs of several modules together: [`LoraSet::weight_delta`] handles those.
pub fn delta(update: &ModuleUpdate, base: Option<&[f32]>) -> Result<Vec<f32>, LoraFormatError> {
    let mut lookup = |_: &str| base.map(<[f32]>::to_vec);
    let name = update
        .tensors()
        .first()
        .map_or("", |tensor| tensor.key())
        .to_string();
    if let Some(Magnitude {
        axis: Axis::Input { across },
        ..
    }) = &update.magnitude
        && across.len() > 1
    {
        return Err(needs_base(&name, &across.join(", ")));
    }
    group_delta(&name, &[(name.clone(), Some(update))], &mut lookup)
}

impl LoraSet {
    /// As [`delta`], for the module at `path`; `base` is asked for weights by module path, only if they are needed.
    ///
    /// # Errors
    /// As [`delta`], and if `base` does not have a weight that is needed.
    pub fn weight_delta(
        &self,
        component: Component,
        path: &str,
        base: &mut BaseWeight<'_>,
    ) -> Result<Option<Vec<f32>>, LoraFormatError> {
        let modules = self.modules(component);
        let Some(update) = modules.get(path).filter(|update| update.factors.is_some()) else {
            return Ok(None);
        };
        let group = group(path, update);
        let group: Vec<_> = group
            .into_iter()
            .map(|path| (path.clone(), modules.get(&path)))
            .collect();
        group_delta(path, &group, base).map(Some)
    }
}

/// The modules whose weights decide the change of the one at `path`, that one among them.
pub(super) fn group(path: &str, update: &ModuleUpdate) -> Vec<String> {
    match &update.magnitude {
        Some(Magnitude {
            axis: Axis::Input { across },
            ..
        }) if across.iter().any(|p| p == path) => across.clone(),
        _ => vec![path.into()],
    }
}

/// Change of the weight of `path`, which is in `group`.
pub(super) fn group_delta(
    path: &str,
    group: &[(String, Option<&ModuleUpdate>)],
    base: &mut BaseWeight<'_>,
) -> Result<Vec<f32>, LoraFormatError> {
    let mut weight = |module: &str| base(module).ok_or_else(|| needs_base(path, module));
    let own = group
        .iter()
        .find_map(|(module, update)| update.filter(|_| module == path));
    let Some(update) = own.filter(|update| update.factors.is_some()) else {
        return Ok(Vec::new());
    };
    if let Some(value) = update.replacement() {
        return Ok(minus(value.load_f32()?, &weight(path)?));
    }
    let change = scaled_dense(update)?;
    let Some(magnitude) = &update.magnitude else {
        return Ok(change);
    };
    let base = weight(path)?;
    let columns = update.size().map_or(1, |(_, input)| input).max(1);
    let mut changed = plus(change, &base);
    let wanted = magnitude.values.load_f32()?;
    match magnitude.axis {
        Axis::Output => {
            for (row, wanted) in changed.chunks_exact_mut(columns).zip(wanted) {
                let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
                let factor = ratio(wanted, squares);
                row.iter_mut().for_each(|x| *x *= factor);
            }
        }
        Axis::Input { .. } => {
            let mut squares = column_squares(&changed, columns);
            for (module, update) in group.iter().filter(|(module, _)| module != path) {
                let mut other = weight(module)?;
                if let Some(update) = update.filter(|update| update.factors.is_some()) {
                    other = plus(scaled_dense(update)?, &other);
                }
                let more = column_squares(&other, columns);
                squares
                    .iter_mut()
                    .zip(more)
                    .for_each(|(sum, more)| *sum += more);
            }
            let factors: Vec<f32> = wanted
                .iter()
                .zip(squares)
                .map(|(wanted, squares)| ratio(*wanted, squares))
                .collect();
            for row in changed.chunks_exact_mut(columns) {
                row.iter_mut()
                    .zip(&factors)
                    .for_each(|(x, factor)| *x *= factor);
            }
        }
    }
    Ok(minus(changed, &base))
}

impl ModuleUpdate {
    /// Change of the bias `[out]`, or its new value for [`Bias::Replaced`].
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn bias_values(&self) -> Result<Option<HostTensor>, LoraFormatError> {
        let Some(bias) = &self.bias else {
            return Ok(None);
        };
        let mut values = bias.tensor().load_f32()?;
        if let Bias::Scaled(_) = bias {
            values
                .iter_mut()
                .for_each(|x| *x = (f64::from(*x) * self.scale) as f32);
        }
        Ok(Some(HostTensor::from_f32([values.len()], &values)))
    }
}

fn scaled_dense(update: &ModuleUpdate) -> Result<Vec<f32>, LoraFormatError> {
    let mut change = dense(update)?;
    if update.scale != 1.0 {
        change
            .iter_mut()
            .for_each(|x| *x = (f64::from(*x) * update.scale) as f32);
    }
    Ok(change)
}

fn column_squares(values: &[f32], columns: usize) -> Vec<f64> {
    let mut squares = vec![0.0; columns];
    for row in values.chunks_exact(columns) {
        squares
            .iter_mut()
            .zip(row)
            .for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
    }
    squares
}

/// `wanted / norm`; a row of zeros has no direction and stays as it is.
fn ratio(wanted: f32, squares: f64) -> f32 {
    if squares == 0.0 {
        1.0
    } else {
        (f64::from(wanted) / squares.sqrt()) as f32
    }
}

fn plus(mut left: Vec<f32>, right: &[f32]) -> Vec<f32> {
    left.iter_mut().zip(right).for_each(|(x, y)| *x += y);
    left
}

fn minus(mut left: Vec<f32>, right: &[f32]) -> Vec<f32> {
    left.iter_mut().zip(right).for_each(|(x, y)| *x -= y);
    left
}

fn needs_base(module: &str, needed: &str) -> LoraFormatError {
    LoraFormatError::NeedsBase {
        module: module.into(),
        needed: needed.into(),
    }
}
