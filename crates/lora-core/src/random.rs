//! Random numbers that are a function of what they are for.
//!
//! Nothing here has state that outlives a call: a [`Stream`] is named by (seed, name, step, index), so a resumed run draws
//! what the uninterrupted run would have drawn, on every backend and platform. ChaCha8 supplies the bits; `libm` supplies
//! the logarithm and cosine of Box-Muller, since the platform's own differ in the last bit.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// FNV-1a, the 64-bit hash that names streams and layers.
pub fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A sequence of random numbers, named by what it is for.
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of `name` (such as `"noise"`) at `step` for the sample or layer `index`.
    pub fn new(seed: u64, name: &str, step: u64, index: u64) -> Self {
        let mut key = [0; 32];
        for (slot, word) in key
            .chunks_exact_mut(8)
            .zip([seed, name_hash(name), step, index])
        {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        Self(ChaCha8Rng::from_seed(key))
    }

    /// The stream from its number `n` of 32 [`bits`](Self::bits) on, as if so many had been drawn from a new one.
    pub fn from_bits(mut self, n: u64) -> Self {
        self.0.set_word_pos(n.into());
        self
    }

    /// Uniform 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.0.next_u32()
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`, without bias.
    ///
    /// # Panics
    /// If `n` is zero.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "an empty range has no elements");
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let draw = self.0.next_u64();
            if draw < limit {
                return draw % n;
            }
        }
    }

    /// Standard normal (Box-Muller; the second value of each pair is not kept).
    pub fn normal(&mut self) -> f64 {
        self.normal_pair().0
    }

    /// `n` standard normals in f32.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(n + 1);
        while values.len() < n {
            let (a, b) = self.normal_pair();
            values.extend([a as f32, b as f32]);
        }
        values.truncate(n);
        values
    }

    /// `0..n` in random order (Fisher-Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64 + 1) as usize);
        }
        order
    }

    fn normal_pair(&mut self) -> (f64, f64) {
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - self.uniform()));
        let angle = std::f64::consts::TAU * self.uniform();
        (radius * libm::cos(angle), radius * libm::sin(angle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_vectors_never_change() {
        let mut stream = Stream::new(42, "noise", 7, 3);
        let bits: Vec<u32> = (0..4).map(|_| stream.bits()).collect();
        let normals: Vec<u32> = Stream::new(42, "noise", 7, 3)
            .normals(4)
            .iter()
            .map(|v| v.to_bits())
            .collect();
        let order = Stream::new(1, "shuffle", 0, 0).permutation(8);
        assert_eq!(
            (bits, normals, order),
            (
                GOLDEN_BITS.to_vec(),
                GOLDEN_NORMALS.to_vec(),
                GOLDEN_ORDER.to_vec()
            )
        );
    }
    const GOLDEN_BITS: [u32; 4] = [393495276, 3752585578, 2192038594, 451445749];
    const GOLDEN_NORMALS: [u32; 4] = [1070441435, 1067433288, 3216906581, 3214321804];
    const GOLDEN_ORDER: [usize; 8] = [7, 3, 2, 0, 1, 5, 4, 6];

    #[test]
    fn a_stream_can_be_entered_anywhere() {
        let stream = || Stream::new(3, "test", 1, 4);
        let mut all = stream();
        let bits: Vec<u32> = (0..200).map(|_| all.bits()).collect();
        for n in [0, 1, 15, 16, 63, 64, 65, 199] {
            assert_eq!(stream().from_bits(n).bits(), bits[n as usize], "{n}");
        }
    }

    #[test]
    fn normals_have_zero_mean_and_unit_variance() {
        let values = Stream::new(0, "test", 0, 0).normals(100_000);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 1e5;
        let var = values
            .iter()
            .map(|&v| (f64::from(v) - mean).powi(2))
            .sum::<f64>()
            / 1e5;
        assert!(
            mean.abs() < 0.02 && (var - 1.0).abs() < 0.02,
            "mean {mean}, variance {var}"
        );
    }

    #[test]
    fn every_part_of_the_name_matters() {
        let first = |s: u64, n: &str, t: u64, i: u64| Stream::new(s, n, t, i).bits();
        let all = [
            first(1, "a", 2, 3),
            first(2, "a", 2, 3),
            first(1, "b", 2, 3),
            first(1, "a", 3, 3),
            first(1, "a", 2, 4),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
    }
}
