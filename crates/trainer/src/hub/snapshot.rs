//! The folder of a repository, downloaded if need be.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tracing::{info, warn};

use super::api::Client;
use super::download;
use super::files::{Replaced, needed};
use super::id::HubId;
use super::source::Hub;

/// The folder that `model` names: itself if it is there or has not the form of a repository, else the repository's snapshot,
/// downloaded if need be.
///
/// # Errors
/// A repository that is not there, gated or no pipeline; a network that cannot be reached, unless the cache has it.
pub fn folder_of(model: &Path, replaced: Replaced, offline: bool) -> anyhow::Result<PathBuf> {
    let id = model.to_str().and_then(HubId::parse);
    match id.filter(|_| !model.exists()) {
        Some(id) => Hub::from_env(offline).snapshot(&id, replaced),
        None => Ok(model.into()),
    }
}

impl Hub {
    /// The snapshot of `id`, complete.
    pub(crate) fn snapshot(&self, id: &HubId, replaced: Replaced) -> anyhow::Result<PathBuf> {
        let folder = format!("models--{}", id.repository.replace('/', "--"));
        let folder = self.cache.join(folder);
        if self.offline {
            return cached(&folder, id)?.with_context(|| {
                format!(
                    "{id} is not on this disk: there is no such folder, and it is not in {}; download it without --offline (HF_HUB_OFFLINE)",
                    self.cache.display()
                )
            });
        }
        let client = Client { hub: self, id };
        let listing = match client.listing() {
            Ok(listing) => listing,
            Err(error) => match cached(&folder, id)? {
                Some(snapshot) if error.unreachable => {
                    warn!("{}; what is in the cache is used", error.message);
                    return Ok(snapshot);
                }
                _ => bail!(error.message),
            },
        };
        let files = needed(&listing, replaced).with_context(|| format!("{id} on the Hub"))?;
        let snapshot = folder.join("snapshots").join(&listing.commit);
        download::all(&client, &folder, &snapshot, &files)?;
        let reference = folder.join("refs").join(&id.revision);
        if id.revision != listing.commit {
            write(&reference, listing.commit.as_bytes())?;
        }
        info!(model = %id, commit = listing.commit, folder = %snapshot.display(), "model from the Hub");
        Ok(snapshot)
    }
}

/// The snapshot of `id` in the cache.
fn cached(folder: &Path, id: &HubId) -> anyhow::Result<Option<PathBuf>> {
    let reference = folder.join("refs").join(&id.revision);
    let commit = fs::read_to_string(reference).unwrap_or_else(|_| id.revision.clone());
    let snapshot = folder.join("snapshots").join(commit.trim());
    Ok(snapshot
        .join("model_index.json")
        .is_file()
        .then_some(snapshot))
}

/// Writes a small file and the folders above it.
fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}
