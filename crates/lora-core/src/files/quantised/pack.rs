//! What this crate has quantised, as bytes and back.

use super::encode::{BLOCK, NESTED_BLOCK, NF4, dynamic_map};
use super::{Factors, Quantised, Values};

/// A storage in few bits that this crate brings weights into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// [`Quantised::nf4`].
    Nf4,
    /// [`Quantised::int8`].
    Int8,
}

impl Codec {
    /// The elements in few bits.
    ///
    /// # Panics
    /// If `values` does not fill `shape`.
    pub fn encode(self, shape: impl Into<Vec<usize>>, values: &[f32]) -> Quantised {
        match self {
            Self::Nf4 => Quantised::nf4(shape, values),
            Self::Int8 => Quantised::int8(shape, values),
        }
    }

    /// How many bytes [`Quantised::to_bytes`] gives for so many elements.
    pub fn packed_len(self, numel: usize) -> usize {
        let blocks = numel.div_ceil(BLOCK);
        match self {
            Self::Nf4 => numel.div_ceil(2) + blocks + 4 * blocks.div_ceil(NESTED_BLOCK) + 4,
            Self::Int8 => numel + 4 * blocks,
        }
    }

    /// The tensor that [`Quantised::to_bytes`] made these bytes of; `None` if they are not so many.
    pub fn unpack(self, shape: Vec<usize>, bytes: &[u8]) -> Option<Quantised> {
        let numel = shape.iter().product::<usize>();
        if bytes.len() != self.packed_len(numel) {
            return None;
        }
        let blocks = numel.div_ceil(BLOCK);
        let (values, codes, factors) = match self {
            Self::Int8 => {
                let (codes, factors) = bytes.split_at(numel);
                (Values::Int8, codes, Factors::Plain(floats(factors)))
            }
            Self::Nf4 => {
                let (codes, rest) = bytes.split_at(numel.div_ceil(2));
                let (nested, rest) = rest.split_at(blocks);
                let mut floats = floats(rest);
                let offset = floats.pop()?;
                let table = Values::Bytes(Box::new(dynamic_map()));
                let floats = Factors::Plain(floats);
                let nested =
                    Quantised::new(vec![blocks], nested.to_vec(), table, NESTED_BLOCK, floats);
                let factors = Factors::Quantised(Box::new(nested.ok()?), offset);
                (Values::Nibbles(NF4), codes, factors)
            }
        };
        Quantised::new(shape, codes.to_vec(), values, BLOCK, factors).ok()
    }
}

impl Quantised {
    /// The codes, then the factors in f32; where these are quantised, their codes, their factors and the offset. Tables, blocks
    /// and shape are the codec's and the caller's.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.codes.clone();
        match &self.factors {
            Factors::Plain(factors) => extend(&mut bytes, factors),
            Factors::Quantised(codes, offset) => {
                bytes.extend(codes.to_bytes());
                extend(&mut bytes, &[*offset]);
            }
        }
        bytes
    }
}

fn extend(bytes: &mut Vec<u8>, floats: &[f32]) {
    bytes.extend(floats.iter().flat_map(|value| value.to_le_bytes()));
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    let (floats, _) = bytes.as_chunks();
    floats.iter().copied().map(f32::from_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    #[test]
    fn a_tensor_comes_back_from_its_bytes_to_the_bit() {
        for codec in [Codec::Nf4, Codec::Int8] {
            for shape in [vec![3, 5], vec![64, 64], vec![300, 129], vec![0, 4]] {
                let numel = shape.iter().product();
                let values = Stream::new(1, "weights", numel as u64, 0).normals(numel);
                let tensor = codec.encode(shape.clone(), &values);
                let bytes = tensor.to_bytes();
                assert_eq!(bytes.len(), codec.packed_len(numel), "{codec:?} {shape:?}");
                assert_eq!(codec.unpack(shape.clone(), &bytes), Some(tensor));
                assert_eq!(codec.unpack(shape, &[&bytes[..], &[0]].concat()), None);
            }
        }
    }
}
