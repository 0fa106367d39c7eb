//! How a header spells tensors, and which names and sizes it may give them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde::de::{Error, MapAccess};

use crate::files::host::Dtype;
use crate::files::strict_json::{Object, Unique};

use super::error::FileError;

/// Largest header the format allows, in bytes.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// Bytes of the header length in front of the header.
pub(super) const LENGTH: u64 = 8;
/// The entry of a header that is no tensor.
pub(super) const METADATA: &str = "__metadata__";

#[derive(Default)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) entries: Vec<(String, Entry)>,
}

impl Object for Header {
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        if key == METADATA {
            self.metadata = map.next_value::<Unique<_>>()?.0;
        } else {
            self.entries
                .push((key.into(), map.next_value::<Unique<_>>()?.0));
        }
        Ok(())
    }
}

/// One tensor as the header spells it.
#[derive(Default, Serialize)]
pub(super) struct Entry {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    pub(super) data_offsets: [u64; 2],
}

impl Object for Entry {
    const REQUIRED: &[&str] = &["dtype", "shape", "data_offsets"];

    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "dtype" => self.dtype = map.next_value()?,
            "shape" => self.shape = map.next_value()?,
            "data_offsets" => self.data_offsets = map.next_value()?,
            _ => return Err(A::Error::custom("no tensor has this field")),
        }
        Ok(())
    }
}

impl Object for BTreeMap<String, String> {
    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        self.insert(key.into(), map.next_value()?);
        Ok(())
    }
}

/// Parses JSON in which no object may repeat a key. `serde_json` itself limits the depth to 128.
pub(super) fn parse_json<T: Object>(
    path: &Path,
    part: &'static str,
    bytes: &[u8],
) -> Result<T, FileError> {
    let text = std::str::from_utf8(bytes).map_err(|source| FileError::NotUtf8 {
        path: path.into(),
        part,
        source,
    })?;
    match serde_json::from_str::<Unique<T>>(text) {
        Ok(object) => Ok(object.0),
        Err(source) => Err(FileError::Json {
            path: path.into(),
            part,
            source,
        }),
    }
}

/// Size of a tensor, or `None` where the lengths of its axes overflow, even beside an axis of length 0: any product
/// of them then fits a `usize`.
pub(super) fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let len = shape
        .iter()
        .try_fold(dtype.size(), |len, &axis| len.checked_mul(axis.max(1)))?;
    Some(if shape.contains(&0) { 0 } else { len as u64 })
}

/// Names become keys and, in other tools, file names: nothing invisible and nothing that climbs out of a folder.
pub(super) fn is_valid_name(name: &str) -> bool {
    let climbs = name.split(['/', '\\']).any(|segment| segment == "..");
    !(name.is_empty() || name == METADATA || name.contains(char::is_control) || climbs)
}
