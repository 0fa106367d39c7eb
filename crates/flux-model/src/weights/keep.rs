//! Writing [`KeptWeights`](super::KeptWeights).

use std::collections::BTreeMap;
use std::io::{self, BufWriter};
use std::path::Path;

use lora_core::files::digest::sha256_hex;
use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::replace::replace_file;
use lora_core::files::safetensors::write_streaming;

use super::kept::{DIGEST, KEY, digest_of};
use super::stream::Stream;
use crate::error::WeightsError;

impl Stream {
    /// Bytes of what [`keep`](Self::keep) would write; 0 if no weight is brought into few bits.
    pub fn kept_bytes(&self) -> u64 {
        self.rows().map(|(_, bytes)| bytes as u64).sum()
    }

    /// The tensors of the file but the digest, and their bytes.
    fn rows(&self) -> impl Iterator<Item = (String, usize)> {
        self.codecs().map(|(parameter, codec)| {
            let numel = parameter.place.shape().iter().product();
            (parameter.name.clone(), codec.packed_len(numel))
        })
    }

    /// Brings the weights of all blocks into few bits and writes them to `path`, of one block at a time.
    ///
    /// # Errors
    /// A value that is not finite, a file that cannot be read or written; what was at `path` stays.
    pub fn keep(&self, path: &Path, key: &str) -> Result<(), WeightsError> {
        let digest = (DIGEST.to_string(), sha256_hex(b"").len());
        let layout: Vec<_> = (self.rows().chain([digest]))
            .map(|(name, bytes)| (name, Dtype::U8, vec![bytes]))
            .collect();
        let metadata = BTreeMap::from([(KEY.to_string(), key.to_string())]);
        let (mut digests, mut blocks) = (BTreeMap::new(), 0..self.count());
        let mut made: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let tensor = |name: &str| -> Result<HostTensor, Failure> {
            let bytes = match name {
                DIGEST => digest_of(std::mem::take(&mut digests)).into_bytes(),
                name => {
                    while !made.contains_key(name)
                        && let Some(block) = blocks.next()
                    {
                        let weights = self.few_bits(block)?.into_iter();
                        made.extend(weights.map(|(name, weight)| (name, weight.to_bytes())));
                    }
                    let bytes = made.remove(name).unwrap_or_default();
                    digests.insert(name.to_string(), sha256_hex(&bytes));
                    bytes
                }
            };
            Ok(HostTensor {
                dtype: Dtype::U8,
                shape: vec![bytes.len()],
                bytes,
            })
        };
        let written = replace_file(path, |out| {
            write_streaming(&mut BufWriter::new(out), &layout, &metadata, tensor)
        });
        written.map_err(|failure| match failure {
            Failure::Weights(error) => error,
            Failure::Write(source) => WeightsError::Write {
                path: path.into(),
                source,
            },
        })
    }
}

/// Why a file could not be made.
enum Failure {
    Weights(WeightsError),
    Write(io::Error),
}

impl From<WeightsError> for Failure {
    fn from(error: WeightsError) -> Self {
        Self::Weights(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}
