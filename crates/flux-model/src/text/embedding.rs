//! Rows of a token embedding that stays on disk, read for the tokens that occur.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use burn::tensor::{Device, Tensor, TensorData};

use crate::error::WeightsError;
use crate::weights::Stream;

/// The embedding is this block of an encoder's stream.
pub(super) const EMBEDDING: usize = 0;

/// Rows of the embedding, `[1, tokens, width]`; each one that occurs is read once.
///
/// # Errors
/// A row that cannot be read, an id that is not below `vocab_size`.
pub(super) fn embed(
    stream: &Stream,
    ids: &[i64],
    vocab_size: usize,
    device: &Device,
) -> Result<Tensor<3>, WeightsError> {
    let mut rows: BTreeMap<i64, Vec<f32>> = BTreeMap::new();
    let mut values = Vec::new();
    for &id in ids {
        let row = match rows.entry(id) {
            Entry::Occupied(read) => read.into_mut(),
            Entry::Vacant(unread) => match usize::try_from(id) {
                Ok(row) if row < vocab_size => unread.insert(stream.row(EMBEDDING, row)?),
                _ => {
                    return Err(WeightsError::Config {
                        path: stream.checkpoint().path().into(),
                        reason: format!("it knows {vocab_size} tokens, and no id {id}"),
                    });
                }
            },
        };
        values.extend_from_slice(row);
    }
    let shape = [1, ids.len(), values.len() / ids.len().max(1)];
    Ok(Tensor::from_data(TensorData::new(values, shape), device))
}
