//! One update of a fused module as an update of each of its parts.
//!
//! The change of a part is the rows of the change that belong to it, so every part has the same down projection and its
//! rows of the up projection: always exact. [`LoraSet::pruned`] then drops what the rows do not use, which undoes the
//! block-diagonal form in which separate parts are fused.

use super::error::LoraFormatError;
use super::names::Place;
use super::rows::Rows;
use super::tensor::TensorRef;
use super::{Axis, Bias, Component, Factors, LoraSet, Magnitude, ModuleUpdate};

/// The update of each place.
pub(super) fn split(update: &ModuleUpdate, places: &[Place]) -> Vec<ModuleUpdate> {
    // All parts of a Kronecker product are cut the same way, so that they can be joined again.
    let inner = match &update.factors {
        Some(Factors::LoKr(lokr)) => lokr.w2.size(TensorRef::axes)[0].max(1),
        _ => 1,
    };
    let mut bounds = places
        .iter()
        .flat_map(|place| place.rows.ranges())
        .flat_map(|rows| [rows.start, rows.end]);
    let cut = bounds.any(|bound| !bound.is_multiple_of(inner));
    let across: Vec<String> = places.iter().map(|place| place.path.clone()).collect();
    places
        .iter()
        .map(|place| part(update, &place.rows, cut, &across))
        .collect()
}

fn part(update: &ModuleUpdate, rows: &Rows, cut: bool, across: &[String]) -> ModuleUpdate {
    let factors = update.factors.as_ref().map(|factors| match factors {
        Factors::LowRank { down, up } => Factors::LowRank {
            down: down.clone(),
            up: up.select(rows),
        },
        Factors::LoHa { a, b } => Factors::LoHa {
            a: a.clone().map(|a| a.select(rows)),
            b: b.clone(),
        },
        Factors::LoKr(lokr) => Factors::LoKr(lokr.select(rows, cut)),
        Factors::Full(tensor) => Factors::Full(tensor.select(rows)),
        Factors::Replace(tensor) => Factors::Replace(tensor.select(rows)),
    });
    let bias = update.bias.as_ref().map(|bias| match bias {
        Bias::Scaled(tensor) => Bias::Scaled(tensor.select(rows)),
        Bias::Added(tensor) => Bias::Added(tensor.select(rows)),
        Bias::Replaced(tensor) => Bias::Replaced(tensor.select(rows)),
    });
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
        factors,
        bias,
        magnitude,
        ..update.clone()
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
                let Some(Factors::LowRank { down, up }) = &mut update.factors else {
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
                *down = down.select(&Rows::of(used.iter().map(|&i| i..i + 1)));
                *up = up.pick_columns(&used);
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
