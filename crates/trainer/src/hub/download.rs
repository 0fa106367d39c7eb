//! Downloading: each file once, continued where a connection broke, and in its place only when its digest is right.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, bail};
use fs4::FileExt;
use lora_core::files::digest::digest_file;
use tracing::{info, warn};

use super::api::{Client, HubFile};
use crate::progress::{Bar, bytes_bar};

/// Connections in a row that may bring nothing.
const TRIES: u32 = 6;

/// Completes a snapshot.
pub(super) fn all(
    client: &Client<'_>,
    folder: &Path,
    snapshot: &Path,
    files: &[HubFile],
) -> anyhow::Result<()> {
    let commit = snapshot.file_name().unwrap_or_default().to_string_lossy();
    let missing: Vec<&HubFile> = files
        .iter()
        .filter(|file| !snapshot.join(&file.path).is_file())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let blobs = folder.join("blobs");
    fs::create_dir_all(&blobs).with_context(|| format!("create {}", blobs.display()))?;
    let there: u64 = missing
        .iter()
        .map(|file| length(&partial(&blobs, file)).min(size(file)))
        .sum();
    let total: u64 = missing.iter().map(|file| size(file)).sum();
    let free = fs4::available_space(&blobs).unwrap_or(u64::MAX);
    if total - there > free {
        bail!(
            "{} needs {:.1} GB more in {}, where {:.1} GB are free: free some, or set HF_HOME to a folder on another disk",
            client.id,
            (total - there) as f64 / 1e9,
            folder.display(),
            free as f64 / 1e9
        );
    }
    info!(model = %client.id, files = missing.len(), megabytes = total / 1_000_000, "downloading");
    let bar = bytes_bar("download", total);
    for file in missing {
        let blob = blobs.join(digest(file));
        if !blob.is_file() {
            one(client, &commit, file, &blob, &bar)
                .with_context(|| format!("download {} of {}", file.path, client.id))?;
        } else {
            bar.inc(size(file));
        }
        link(&blob, &snapshot.join(&file.path))?;
    }
    bar.finish_and_clear();
    Ok(())
}

fn size(file: &HubFile) -> u64 {
    file.lfs
        .as_ref()
        .map_or(file.size, |lfs| Some(lfs.size))
        .unwrap_or(0)
}

/// SHA-256 of a large file, git's SHA-1 of a small one: the names that `huggingface_hub` gives to blobs.
fn digest(file: &HubFile) -> String {
    let of_large = file.lfs.as_ref().map(|lfs| lfs.sha256.clone());
    let digest = of_large
        .or_else(|| file.blob_id.clone())
        .unwrap_or_default();
    let is_hex = digest.bytes().all(|byte| byte.is_ascii_hexdigit());
    match is_hex && !digest.is_empty() {
        true => digest,
        false => lora_core::files::digest::sha256_hex(file.path.as_bytes()),
    }
}

fn partial(blobs: &Path, file: &HubFile) -> PathBuf {
    blobs.join(format!("{}.incomplete", digest(file)))
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn one(
    client: &Client<'_>,
    commit: &str,
    file: &HubFile,
    blob: &Path,
    bar: &Bar,
) -> anyhow::Result<()> {
    let path = blob.with_file_name(format!("{}.incomplete", digest(file)));
    let mut out = OpenOptions::new()
        .create(true)
        .read(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("write {}", path.display()))?;
    if FileExt::try_lock(&out).is_err() {
        info!("another process downloads {}: waiting for it", file.path);
        FileExt::lock(&out).with_context(|| format!("lock {}", path.display()))?;
        if blob.is_file() {
            return Ok(());
        }
    }
    let (mut failures, mut wrong) = (0, false);
    bar.inc(length(&path).min(size(file)));
    loop {
        let before = length(&path);
        let problem = match fetch(client, commit, file, &mut out, bar) {
            Ok(()) if length(&path) < size(file) => "the connection broke".to_string(),
            Ok(()) => match is_right(&path, file)? {
                true => break,
                false if wrong => bail!(
                    "its digest is not the one the Hub tells, twice: what comes over this connection is not what was uploaded; try again later, or from elsewhere"
                ),
                false => {
                    wrong = true;
                    out.set_len(0)?;
                    "its digest is not the one the Hub tells; from the beginning".into()
                }
            },
            Err(Failed::Refused(message)) => bail!(message),
            Err(Failed::Disk(error)) => {
                return Err(error).with_context(|| format!("write {}", path.display()));
            }
            Err(Failed::Broken(message)) => message,
        };
        failures = if length(&path) > before {
            0
        } else {
            failures + 1
        };
        if failures == TRIES {
            bail!(
                "{problem}, {TRIES} times in a row; what is there stays, and the same command goes on with it"
            );
        }
        warn!("{}: {problem}, trying again", file.path);
        thread::sleep(client.hub.pause * 2_u32.pow(failures));
    }
    out.sync_all()
        .with_context(|| format!("fsync {}", path.display()))?;
    fs::rename(&path, blob).with_context(|| format!("rename {}", path.display()))
}

enum Failed {
    Refused(String),
    Broken(String),
    Disk(io::Error),
}

/// Appends what the server sends to what is there.
fn fetch(
    client: &Client<'_>,
    commit: &str,
    file: &HubFile,
    out: &mut File,
    bar: &Bar,
) -> Result<(), Failed> {
    let from = out.metadata().map_err(Failed::Disk)?.len();
    if from > 0 && from >= size(file) {
        return Ok(());
    }
    let broken = |error: anyhow::Error| Failed::Broken(format!("{error:#}"));
    let mut answer = client.file(commit, &file.path, from).map_err(broken)?;
    let status = answer.status;
    match status {
        206 if from > 0 => {}
        200 => out.set_len(0).map_err(Failed::Disk)?, // the server knows no ranges
        416 => return out.set_len(0).map_err(Failed::Disk),
        500.. => return Err(Failed::Broken(format!("the server answers {status}"))),
        _ => {
            let message = client.refusal(&answer);
            return Err(Failed::Refused(
                message.unwrap_or_else(|| format!("the server answers {status}")),
            ));
        }
    }
    let (mut piece, mut length) = (vec![0; 1 << 20], if status == 206 { from } else { 0 });
    loop {
        let read = match answer.body.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failed::Broken(format!("the connection broke ({error})"))),
        };
        length += read as u64;
        // More than there should be is not written: its digest would be wrong.
        if length > size(file) {
            out.set_len(0).map_err(Failed::Disk)?;
            return Err(Failed::Broken("more came than the file has".into()));
        }
        out.write_all(&piece[..read]).map_err(Failed::Disk)?;
        bar.inc(read as u64);
    }
}

fn is_right(path: &Path, file: &HubFile) -> anyhow::Result<bool> {
    let read = || format!("read {}", path.display());
    if length(path) != size(file) {
        return Ok(false);
    }
    if let Some(lfs) = &file.lfs {
        return Ok(digest_file(path).with_context(read)? == lfs.sha256);
    }
    let Some(blob_id) = &file.blob_id else {
        return Ok(true);
    };
    let bytes = fs::read(path).with_context(read)?;
    let mut sha1 = sha1_smol::Sha1::new();
    sha1.update(format!("blob {}\0", bytes.len()).as_bytes());
    sha1.update(&bytes);
    Ok(sha1.digest().to_string() == *blob_id)
}

/// Gives a blob its name in a snapshot: as a link where there are links.
fn link(blob: &Path, path: &Path) -> anyhow::Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let _ = fs::remove_file(path); // a link to what is gone
    #[cfg(unix)]
    {
        let name = blob.file_name().unwrap_or_default();
        let below = path
            .ancestors()
            .skip(1)
            .take_while(|folder| folder.file_name().is_some_and(|name| name != "snapshots"))
            .count();
        let mut target: PathBuf = std::iter::repeat_n("..", below + 1).collect();
        target.push("blobs");
        target.push(name);
        std::os::unix::fs::symlink(target, path).with_context(|| format!("link {}", path.display()))
    }
    #[cfg(not(unix))]
    fs::hard_link(blob, path)
        .or_else(|_| fs::copy(blob, path).map(drop))
        .with_context(|| format!("link {}", path.display()))
}
