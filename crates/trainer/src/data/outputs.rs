//! What this program has written itself, recognised by what is in a folder and not by its name: a run inside a dataset folder
//! holds previews, which are no training images.

use std::fs;
use std::io::Read;
use std::path::Path;

use crate::run::folder::{CACHE, CONFIG, LATEST, LOCK, METRICS, SAMPLES};
use crate::run::manifest::{MANIFEST, parse_checkpoint_name};

/// Whether a folder is the folder of a run.
///
/// Its lock file is never deleted, but a copy may lack it: then `LATEST`, a checkpoint, or configuration and metrics show it.
pub(super) fn is_run(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    has(LOCK) || names_checkpoint(folder) || (has(CONFIG) && has(METRICS)) || has_checkpoint(folder)
}

/// Whether a folder was written and not collected: a run, or a part of one that shares its folder with the images.
pub(super) fn is_output(parent_is_run: bool, folder: &Path) -> bool {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let is_part = name == SAMPLES || name == CACHE || name.starts_with("ckpt-");
    (parent_is_run && is_part) || is_run(folder)
}

fn names_checkpoint(folder: &Path) -> bool {
    let mut start = [0; 5];
    let file = fs::File::open(folder.join(LATEST));
    file.is_ok_and(|mut file| file.read_exact(&mut start).is_ok()) && &start == b"ckpt-"
}

fn has_checkpoint(folder: &Path) -> bool {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| {
            let name = entry.file_name();
            name.to_str().and_then(parse_checkpoint_name).is_some()
                && entry.path().join(MANIFEST).is_file()
        })
}
