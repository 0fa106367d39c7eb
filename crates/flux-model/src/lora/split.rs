//! One update of a fused module as an update of each of its parts.
//!
//! The change of a part is the rows of the change that belong to it, so every part has the same down projection and its
//! rows of the up projection: always exact. [`LoraSet::pruned`] then drops what the rows do not use, which undoes the
//! block-diagonal form in which separate parts are fused.

use lora_core::kinds::parts::{Dim, Part, WHOLE};

use super::error::LoraFormatError;
use super::names::Place;
use super::rows::Rows;
use super::tensor::TensorRef;
use super::{Axis, Component, Factors, LoraSet, Magnitude, ModuleUpdate};

/// Whether rows of the part are rows of the module, each as many as [`rows_each`] says; the others every part of a fused
/// module has in common.
pub(super) fn is_cut(part: Part) -> bool {
    part.has(0, Dim::Out) || part.has(0, Dim::Outer) || part == WHOLE
}

/// Rows of the module that a row of what is cut stands for: of a Kronecker product's outer factor, those of the inner one.
fn rows_each(factors: &Factors) -> usize {
    let inner = factors
        .sides()
        .map(|[_, w2]| w2.size(|part| part.axes())[0]);
    inner.unwrap_or(1).max(1)
}

/// The update of each place.
pub(super) fn split(update: &ModuleUpdate, places: &[Place]) -> Vec<ModuleUpdate> {
    // All parts of a Kronecker product are cut the same way, so that they can be joined again.
    let each = update.factors.as_ref().map_or(1, rows_each);
    let mut bounds = places
        .iter()
        .flat_map(|place| place.rows.ranges())
        .flat_map(|rows| [rows.start, rows.end]);
    let whole = update.rows.is_none() && bounds.all(|bound| bound.is_multiple_of(each));
    let across: Vec<String> = places.iter().map(|place| place.path.clone()).collect();
    places
        .iter()
        .map(|place| {
            let mut part = update.clone();
            match &update.factors {
                Some(factors) if whole => {
                    part.factors = Some(of_rows(factors, &place.rows, each));
                }
                Some(factors) => part.rows = of_product(update, factors, &place.rows),
                None => {}
            }
            beside(part, &place.rows, &across)
        })
        .collect()
}

/// The factors of some rows, each of which is a multiple of `each`.
fn of_rows(factors: &Factors, rows: &Rows, each: usize) -> Factors {
    let ranges = rows.ranges().iter();
    let rows = Rows::of(ranges.map(|rows| rows.start / each..rows.end / each));
    factors.clone().map(|part, tensor| match is_cut(part) {
        true => tensor.select(&rows),
        false => tensor,
    })
}

/// Some of the rows of what the factors make; `None` for all.
fn of_product(update: &ModuleUpdate, factors: &Factors, wanted: &Rows) -> Option<Rows> {
    let all = Rows::all(factors.size(TensorRef::axes)[0]);
    let rows = update.rows.as_ref().unwrap_or(&all).select(wanted);
    Some(rows).filter(|rows| *rows != all)
}

/// The part of the bias and of the magnitude.
fn beside(update: ModuleUpdate, rows: &Rows, across: &[String]) -> ModuleUpdate {
    let bias = update.bias.as_ref();
    let bias = bias.map(|bias| bias.with(bias.tensor().select(rows)));
    let magnitude = update
        .magnitude
        .as_ref()
        .map(|magnitude| match &magnitude.axis {
            Axis::Output => Magnitude {
                values: magnitude.values.select(rows),
                axis: Axis::Output,
            },
            Axis::Input { .. } => Magnitude {
                values: magnitude.values.clone(),
                axis: Axis::Input {
                    across: across.to_vec(),
                },
            },
        });
    ModuleUpdate {
        bias,
        magnitude,
        ..update
    }
}

impl LoraSet {
    /// Drops the columns of each up projection that are zero, and the rows of the down projection they meet.
    ///
    /// The changes stay the same to the bit; ranks shrink where parts were fused block-diagonally. A module that has no
    /// column left changes nothing and is removed, unless it has a bias or a magnitude. Not for resuming a training.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn pruned(mut self) -> Result<Self, LoraFormatError> {
        for component in Component::ALL {
            let mut kept = std::mem::take(self.modules_mut(component));
            let mut empty = Vec::new();
            for (path, update) in &mut kept {
                let Some((down, up)) = update.pair() else {
                    continue;
                };
                let used = used_columns(&up.load_f32()?, up.size().1);
                if used.len() == up.size().1 {
                    continue;
                }
                if used.is_empty() {
                    if update.bias.is_none() && update.magnitude.is_none() {
                        empty.push(path.clone());
                    }
                    continue;
                }
                let down = down.select(&Rows::of(used.iter().map(|&i| i..i + 1)));
                update.factors = Some(Factors::lora(down, up.pick_columns(&used)));
                update.alpha = None; // the scale stays; alpha over the new rank would be another one
            }
            for path in &empty {
                kept.remove(path);
                let reason = "its up projection is zero: it changes nothing";
                self.report
                    .ignored
                    .push((format!("{component}.{path}"), reason.into()));
            }
            *self.modules_mut(component) = kept;
        }
        Ok(self)
    }
}

fn used_columns(values: &[f32], columns: usize) -> Vec<usize> {
    let mut used = vec![false; columns];
    for row in values.chunks_exact(columns.max(1)) {
        used.iter_mut()
            .zip(row)
            .for_each(|(used, value)| *used |= *value != 0.0);
    }
    (0..columns).filter(|&column| used[column]).collect()
}
