//! Base weights that were brought into few bits, kept in a file: made from a checkpoint once, read from then on.
//!
//! The file is a safetensors file of bytes: a tensor for every weight of a block that is brought into few bits, by its path in the
//! network, as [`Quantised::to_bytes`] gives it, and the SHA-256 of all of them. What it was made from and how is one text, its
//! *key*. Everything else that a network has is read from its checkpoint.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lora_core::files::digest::sha256_hex;
use lora_core::files::quantised::{Codec, Quantised};
use lora_core::files::safetensors::TensorFile;

use crate::error::WeightsError;

/// Where the digest is.
pub(super) const DIGEST: &str = "sha256";
/// Where the metadata has the key.
pub(super) const KEY: &str = "made_from";

/// A file of base weights in few bits; a copy is the same file.
#[derive(Debug, Clone)]
pub struct KeptWeights(Arc<TensorFile>);

impl KeptWeights {
    /// Changes with the codecs and with the form of the file: belongs in a key.
    pub const VERSION: u32 = 1;

    /// Opens a file of this key, and compares all that is in it with its digest.
    ///
    /// # Errors
    /// What is wrong with the file, in words.
    pub fn open(path: &Path, key: &str) -> Result<Self, String> {
        let file = TensorFile::open(path).map_err(|error| error.to_string())?;
        if file.metadata().get(KEY).map(String::as_str) != Some(key) {
            return Err("it was made from something else".into());
        }
        let bytes = |name: &str| match file.read(name) {
            Ok(tensor) => Ok(tensor.bytes),
            Err(error) => Err(error.to_string()),
        };
        let names = file.names().filter(|name| *name != DIGEST);
        let digests = names.map(|name| Ok((name.to_string(), sha256_hex(&bytes(name)?))));
        let digests = digests.collect::<Result<_, String>>()?;
        match bytes(DIGEST)? == digest_of(digests).into_bytes() {
            true => Ok(Self(file.into())),
            false => Err("its contents are not what was written (SHA-256 differs)".into()),
        }
    }

    /// The weight at `name`, of this shape, where the file has it.
    pub(super) fn read(
        &self,
        name: &str,
        codec: Codec,
        shape: &[usize],
    ) -> Result<Option<Quantised>, WeightsError> {
        if self.0.info(name).is_none() {
            return Ok(None);
        }
        let bytes = self.0.read(name)?.bytes;
        let tensor = codec.unpack(shape.to_vec(), &bytes);
        let other = || WeightsError::Unusable {
            path: self.0.path().into(),
            what: format!("has `{name}` in another size: delete it, it is made again"),
        };
        tensor.map(Some).ok_or_else(other)
    }
}

/// Of the digests of all tensors, by name.
pub(super) fn digest_of(digests: BTreeMap<String, String>) -> String {
    let lines = digests
        .iter()
        .map(|(name, digest)| format!("{digest}  {name}\n"));
    sha256_hex(lines.collect::<String>().as_bytes())
}
