//! A parameter's place in a checkpoint, checked, and what is stored there.

use burn::tensor::Device;
use lora_core::files::host::{Dtype, first_non_finite};
use lora_core::files::quantised::Codec;

use super::checkpoint::Checkpoint;
use super::layout::{Layout, Location};
use super::storage::{BaseDtype, Kept, Read, Ready, Storage};
use crate::error::WeightsError;

/// Where a parameter is in a checkpoint, which has it in this shape.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) location: Location,
    /// In the checkpoint's order of axes.
    shape: Vec<usize>,
}

impl Place {
    /// Shape of the parameter, in the checkpoint's order of axes.
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Rows of the stored tensor that the parameter takes.
    pub(super) fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }
}

/// A parameter of a network that was found in its checkpoint.
pub(super) struct Parameter {
    /// Its path in the network.
    pub(super) name: String,
    pub(super) place: Place,
    pub(super) is_linear: bool,
}

impl Parameter {
    /// Its path in the block at `block`, if it is there.
    pub(super) fn within(&self, block: &str) -> Option<&str> {
        self.name.strip_prefix(block)?.strip_prefix('.')
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

    /// How a parameter is brought into few bits, if it is.
    pub(super) fn codec(
        &self,
        parameter: &Parameter,
        base: BaseDtype,
        device: &Device,
    ) -> Option<Codec> {
        let stored = self.storage(&parameter.place.location.key)?;
        let kept = parameter.is_linear.then(|| base.kept(stored, device))?;
        kept.codec()
    }

    /// A parameter's values, ready for a device.
    ///
    /// # Errors
    /// A file that has changed since it was opened, a value that is not finite.
    pub(super) fn ready(
        &self,
        parameter: &Parameter,
        base: BaseDtype,
        device: &Device,
    ) -> Result<Ready, WeightsError> {
        let place = &parameter.place;
        if let Some(kept) = &self.kept
            && let Some(codec) = self.codec(parameter, base, device)
            && let Some(tensor) = kept.read(&parameter.name, codec, place.shape())?
        {
            return Ok(Ready::FewBits(tensor.into()));
        }
        let ready = Ready::new(self.stored(place)?, parameter.is_linear, base, device);
        ready.map_err(|index| self.not_finite(&place.location.key, index))
    }

    /// The type of a weight that is computed with as it is stored, byte for byte, if it is such a one.
    pub(super) fn as_stored(
        &self,
        location: &Location,
        is_linear: bool,
        base: BaseDtype,
        device: &Device,
    ) -> Option<Dtype> {
        let storage = self.storage(&location.key)?;
        let Storage::Dense(dtype @ (Dtype::Bf16 | Dtype::F16)) = storage else {
            return None;
        };
        let is_same = is_linear
            && base.kept(storage, device) == Kept::Dense(dtype)
            && !location.swap_halves
            && cfg!(target_endian = "little");
        is_same.then_some(dtype)
    }

    /// As [`ready`](Self::ready), but a weight that is computed with as it is stored is where the file is mapped.
    ///
    /// # Errors
    /// As [`ready`](Self::ready).
    pub(super) fn ready_where_it_lies(
        &self,
        parameter: &Parameter,
        base: BaseDtype,
        device: &Device,
    ) -> Result<Ready, WeightsError> {
        let place = &parameter.place;
        if let Some(dtype) = self.as_stored(&place.location, parameter.is_linear, base, device)
            && let Some(bytes) = self.map(&place.location)?
        {
            return match first_non_finite(dtype, &bytes) {
                None => Ok(Ready::as_stored(bytes, place.shape(), dtype)),
                Some(index) => Err(self.not_finite(&place.location.key, index)),
            };
        }
        self.ready(parameter, base, device)
    }

    fn not_finite(&self, key: &str, index: usize) -> WeightsError {
        WeightsError::NotFinite {
            path: self.path.clone(),
            key: key.into(),
            index,
        }
    }
}
