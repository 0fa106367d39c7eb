//! Base weights that a run brings into few bits (`model.base_dtype = "q8"` or `"nf4"`), made once for all runs on this machine.
//!
//! They are in the user's cache folder (`$XDG_CACHE_HOME/flux-lora`, else `~/.cache/flux-lora`), a file for each base model and
//! type, and may be deleted at any time. A run without the file, or without room for it, makes the same weights in memory.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::tensor::Device;
use flux_model::family::Family;
use flux_model::weights::{BaseDtype, KeptWeights};
use lora_core::files::digest::sha256_hex;
use tracing::{info, warn};

use crate::progress::shown;

/// The base weights of `family` as `dtype`, where that is few bits and its files have more; `base_model` is the digest of
/// these files. What cannot be kept is said, and left to the run.
pub(crate) fn kept<F: Family>(
    family: &F,
    dtype: BaseDtype,
    base_model: &str,
    device: &Device,
) -> Option<KeptWeights> {
    if !matches!(dtype, BaseDtype::Q8 | BaseDtype::Nf4) {
        return None;
    }
    let key = format!("{base_model} as {dtype}, version {}", KeptWeights::VERSION);
    let path = folder()?.join(format!(
        "{}-{dtype}.safetensors",
        &sha256_hex(key.as_bytes())[..32]
    ));
    if path.is_file() {
        match KeptWeights::open(&path, &key) {
            Ok(kept) => {
                info!(file = %path.display(), "base weights as {dtype}, made before");
                return Some(kept);
            }
            Err(problem) => warn!("{}: {problem}; it is made again", path.display()),
        }
    }
    match make(family, dtype, &key, &path, device) {
        Ok(kept) => kept,
        Err(error) => {
            warn!("{error:#}; base weights are brought into {dtype} in memory, at every start");
            None
        }
    }
}

fn make<F: Family>(
    family: &F,
    dtype: BaseDtype,
    key: &str,
    path: &Path,
    device: &Device,
) -> anyhow::Result<Option<KeptWeights>> {
    let blocks = family.to_keep(dtype, device)?;
    let need = blocks.kept_bytes();
    if need == 0 {
        return Ok(None);
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    remove_leftovers(path);
    let free = fs4::available_space(folder)
        .with_context(|| format!("ask for the free space of {}", folder.display()))?;
    if free < need {
        anyhow::bail!(
            "{} has {} free, and base weights as {dtype} take {} there",
            folder.display(),
            shown(free),
            shown(need)
        );
    }
    info!(
        file = %path.display(),
        size = shown(need),
        "bringing base weights into {dtype}, once for all runs"
    );
    blocks.keep(path, key)?;
    let kept = KeptWeights::open(path, key);
    Ok(Some(kept.map_err(|problem| {
        anyhow::anyhow!("{}: {problem}", path.display())
    })?))
}

/// The user's cache folder for this program, where there is one.
fn folder() -> Option<PathBuf> {
    let set = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = set.filter(|path| path.is_absolute()); // others are to be ignored, says the specification
    let cache = cache.or_else(|| Some(env::home_dir()?.join(".cache")))?;
    Some(cache.join("flux-lora"))
}

/// Removes what processes that were killed had written of this file; a process that lives goes on writing.
fn remove_leftovers(path: &Path) {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return;
    };
    let prefix = format!("{}.tmp-", name.to_string_lossy());
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = name
            .strip_prefix(&prefix)
            .map(|id| Path::new("/proc").join(id));
        if process.is_some_and(|process| Path::new("/proc/self").exists() && !process.exists()) {
            let _ = fs::remove_file(entry.path()); // the room is asked for next
        }
    }
}
