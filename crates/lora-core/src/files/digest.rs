//! SHA-256, as every file and name of this project writes it: 64 lowercase hexadecimal digits.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

/// SHA-256 of some bytes.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file, which is read in pieces.
///
/// # Errors
/// A file that cannot be read.
pub fn digest_file(path: &Path) -> io::Result<String> {
    let mut digest = Sha256Hex::default();
    io::copy(&mut File::open(path)?, &mut digest)?;
    Ok(digest.finish())
}

/// SHA-256 of what is written to it; writing never fails.
///
/// Pieces are not told apart: whoever digests several values puts the length of each before it.
#[derive(Debug, Clone, Default)]
pub struct Sha256Hex(Sha256);

impl Sha256Hex {
    /// Takes some more bytes.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes);
    }

    /// The digest of everything taken.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

impl Write for Sha256Hex {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    // The one-block example of FIPS 180-4 (NIST's `SHA256.pdf`).
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn bytes_pieces_and_files_have_the_digest_of_the_standard() {
        assert_eq!(sha256_hex(b"abc"), ABC);
        let mut pieces = Sha256Hex::default();
        pieces.update("a");
        pieces.write_all(b"bc").expect("never fails");
        assert_eq!(pieces.finish(), ABC);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("abc");
        std::fs::write(&path, b"abc").expect("a writable folder");
        assert_eq!(digest_file(&path).expect("a file"), ABC);
    }
}
