//! Models by name: a folder on this disk, or a repository of the Hugging Face Hub, which is downloaded once.
//!
//! What is downloaded lies where `huggingface_hub` keeps it, in its form, so that Python's programs and this one share it:
//!
//! ```text
//! ~/.cache/huggingface/hub/models--OWNER--NAME/
//!   refs/main                      the commit that `main` was when last asked for
//!   blobs/<digest>                 each file once, by its SHA-256 (large files) or git's SHA-1 (small ones)
//!   snapshots/<commit>/vae/...     links into blobs
//! ```
//! The environment is that of `huggingface_hub`: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`,
//! `HF_HUB_OFFLINE`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tracing::{info, warn};

use self::api::Client;
use self::files::needed;

mod api;
mod download;
mod files;
mod http;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;

/// A repository, as `owner/name` or `owner/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `owner/name`.
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl HubId {
    /// What `text` names, if it has the form of a repository.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = repository.split_once('/')?;
        let is_name = |part: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty()
                && part.len() <= 96
                && part.chars().all(plain)
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.', '-'])
                && !part.contains("..")
        };
        let is_revision = !revision.is_empty() && revision.split('/').all(is_name);
        (is_name(owner) && is_name(name) && is_revision).then(|| Self {
            repository: repository.into(),
            revision: revision.into(),
        })
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.revision.as_str() {
            "main" => f.write_str(&self.repository),
            revision => write!(f, "{}@{revision}", self.repository),
        }
    }
}

/// Which files of a repository are not wanted, because single files stand in their place.
#[derive(Debug, Clone, Copy, Default)]
pub struct Replaced {
    /// The transformer's weights.
    pub transformer: bool,
    /// The autoencoder.
    pub vae: bool,
}

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

/// Where repositories come from, and where they are kept. Not to be printed: it has the token.
#[derive(Clone)]
pub(crate) struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
    /// Before a connection that broke is tried again; doubled each time.
    pause: std::time::Duration,
}

impl Hub {
    fn from_env(offline: bool) -> Self {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let home = set("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(env::home_dir()?.join(".cache")));
            cache.unwrap_or_default().join("huggingface")
        });
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let token = text("HF_TOKEN").or_else(|| {
            let path = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            fs::read_to_string(path).ok()
        });
        let token = token.map(|token| token.trim().to_string());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let is_on =
            |value: String| !["0", "false", "no", "off"].contains(&value.to_lowercase().as_str());
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            token: token.filter(|token| !token.is_empty()),
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: offline || text("HF_HUB_OFFLINE").is_some_and(is_on),
            pause: std::time::Duration::from_secs(1),
        }
    }

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
