//! A parameter's place in a checkpoint, checked, and what is stored there.

use super::checkpoint::Checkpoint;
use super::layout::{Layout, Location};
use super::storage::Read;
use crate::error::WeightsError;

/// Where a parameter is in a checkpoint, which has it in this shape.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) location: Location,
    /// In the checkpoint's order of axes.
    shape: Vec<usize>,
}

impl Place {
    /// Rows of the stored tensor that the parameter takes.
    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }
}

impl Checkpoint {
    /// Finds the parameter that diffusers calls `key`, of the shape that the checkpoint must give it; reads nothing.
    ///
    /// # Errors
    /// No such tensor, or one of another shape.
    pub(super) fn find(
        &self,
        layout: Layout,
        key: &str,
        expected: Vec<usize>,
    ) -> Result<Place, WeightsError> {
        let missing = |key: &str| WeightsError::Missing {
            path: self.path.clone(),
            key: key.into(),
        };
        let mut location = layout.locate(key).ok_or_else(|| missing(key))?;
        if layout == Layout::T5 && key == "shared.weight" && self.shape(key).is_none() {
            location.key = "encoder.embed_tokens.weight".into();
        }
        let found = self.shape(&location.key);
        let found = found.ok_or_else(|| missing(&location.key))?.to_vec();
        let mut available = found.clone();
        if location.pointwise && found.ends_with(&[1, 1]) && found.len() == 4 {
            available.truncate(2);
        }
        let mut fits = true;
        if let (Some(rows), Some(first)) = (&location.rows, available.first_mut()) {
            fits = rows.end <= *first;
            *first = rows.len();
        }
        if !fits || available != expected {
            return Err(WeightsError::Shape {
                path: self.path.clone(),
                key: location.key,
                expected,
                found,
            });
        }
        let shape = expected;
        Ok(Place { location, shape })
    }

    /// Reads what is stored at a place.
    ///
    /// # Errors
    /// A file that has changed since it was opened.
    pub(super) fn stored(&self, place: &Place) -> Result<Read, WeightsError> {
        let location = &place.location;
        let read = self.read(location)?;
        if let Read::FewBits(tensor) = &read
            && tensor.shape() == place.shape
            && !location.swap_halves
        {
            return Ok(read);
        }
        let mut tensor = read.dense();
        tensor.shape = place.shape.clone();
        if location.swap_halves {
            let half = tensor.bytes.len() / 2;
            tensor.bytes.rotate_left(half);
        }
        Ok(Read::Dense(tensor))
    }

    pub(super) fn not_finite(&self, key: &str, index: usize) -> WeightsError {
        WeightsError::NotFinite {
            path: self.path.clone(),
            key: key.into(),
            index,
        }
    }
}
