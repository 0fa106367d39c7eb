//! SHA-256 of large files, remembered from start to start.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::Context;
use lora_core::files::digest::{Sha256Hex, digest_file};
use lora_core::files::replace::replace_file;
use lora_core::files::strict_json::{parse_json, read_file};

/// Largest file of remembered digests read, in bytes: some hundred thousand of them.
const MAX_DIGESTS: u64 = 64 << 20;

/// SHA-256 of large files, remembered by path, size and time of change so that a start does not read them all again.
#[derive(Debug)]
pub struct FileDigests {
    path: PathBuf,
    known: BTreeMap<String, String>,
}

impl FileDigests {
    /// The digests remembered in `folder`; none if there are none or they cannot be read.
    pub fn load(folder: &Path) -> Self {
        let path = folder.join("digests.json");
        let known = read_file(&path, MAX_DIGESTS)
            .ok()
            .and_then(|bytes| parse_json(&bytes).ok())
            .unwrap_or_default();
        Self { path, known }
    }

    /// One digest for all files in or at `paths`: their names and contents.
    ///
    /// # Errors
    /// A path that cannot be read.
    pub fn of_all(&mut self, paths: &[PathBuf]) -> anyhow::Result<String> {
        let mut all = Sha256Hex::default();
        for path in paths {
            let mut files = Vec::new();
            list_files(path, &mut files).with_context(|| format!("read {}", path.display()))?;
            files.sort();
            for file in files {
                let name = file
                    .file_name()
                    .map(|name| name.to_string_lossy().into_owned())
                    .unwrap_or_default();
                all.update(name.as_bytes());
                all.update(
                    self.of(&file)
                        .with_context(|| format!("read {}", file.display()))?,
                );
            }
        }
        Ok(all.finish())
    }

    fn of(&mut self, file: &Path) -> std::io::Result<String> {
        let metadata = fs::metadata(file)?;
        let changed = metadata
            .modified()?
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let identity = format!(
            "{} {} {}",
            fs::canonicalize(file)?.display(),
            metadata.len(),
            changed.as_nanos()
        );
        if let Some(known) = self.known.get(&identity) {
            return Ok(known.clone());
        }
        let digest = digest_file(file)?;
        self.known.insert(identity, digest.clone());
        Ok(digest)
    }

    /// Remembers the digests for the next start.
    ///
    /// # Errors
    /// A full disk.
    pub fn save(&self) -> anyhow::Result<()> {
        let json = serde_json::to_vec_pretty(&self.known)?;
        replace_file(&self.path, |out| out.write_all(&json))
            .with_context(|| format!("write {}", self.path.display()))
    }
}

fn list_files(path: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            list_files(&entry?.path(), files)?;
        }
    } else {
        fs::metadata(path)?;
        files.push(path.into());
    }
    Ok(())
}
