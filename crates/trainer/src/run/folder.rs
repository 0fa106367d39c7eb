//! The run folder: who may write to it, which checkpoint to resume, and which ones to keep.
//!
//! ```text
//! run/
//!   config.toml  samples/
//!   run.lock                          locked while a process trains here; never deleted
//!   LATEST                            folder name, newline, SHA-256 of its MANIFEST.json, newline
//!   metrics.jsonl                     one JSON object a line, each with its `step`
//!   timings.jsonl  metrics.csv  tensorboard/   see `timings`, `logs`
//!   ckpt-0000000120/                  a checkpoint (see `transaction`)
//!   ckpt-0000000120.old-<pid>-<n>/    one that is being replaced; still a checkpoint
//!   ckpt-0000000160.aside-<pid>-<n>/  later than a step that was gone back to; kept, not resumed
//!   *.tmp-<pid>-<n>                   unfinished; removed at the next start
//! ```
//! Decisions:
//! - Everything that writes is a method of [`RunLock`] or takes one, so no code can write without
//!   the lock.
//! - **The newest valid checkpoint by step is resumed, even when `LATEST` names an older one.** The
//!   two differ only if a save was stopped after the folder got its name and before `LATEST` was
//!   replaced. Nobody was told of that checkpoint, but it was complete and verified before it got
//!   its name, so it holds the state of its step, and resuming from it or from the one before ends
//!   in the same bits. The newer one saves work. This needs the folder to hold one history only: a
//!   step saved means every later checkpoint descends from it. [`RunLock::rewind_to`] keeps it so
//!   by putting aside what is later than the chosen checkpoint, and [`write_checkpoint`](crate::run::transaction::write_checkpoint) refuses a
//!   step before an existing one.
//! - `LATEST` is the witness: if what it names is gone or has another content, an acknowledged
//!   checkpoint was lost, and [`RunDir::newest_valid`] says so among the rejected.
//! - A checkpoint about to be deleted first gets a temporary name (fsynced), so a half-deleted one
//!   is never seen.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fs4::{FileExt, TryLockError};
use lora_core::files::digest::sha256_hex;
use tracing::{info, warn};

use crate::run::error::{CheckpointError, Rejected, io};
use crate::run::manifest::{
    MANIFEST, MANIFEST_LIMIT, Verified, parse_checkpoint_name, read_at_most, verify,
};
use crate::run::vfs::{
    Vfs, create_dir_durably, discard, list, remove_tree, replace_file, sibling, writable,
};

/// The file that names the last acknowledged checkpoint.
pub(crate) const LATEST: &str = "LATEST";
pub(crate) const LOCK: &str = "run.lock";
pub(crate) const METRICS: &str = "metrics.jsonl";
const TIMINGS: &str = "timings.jsonl";
const CSV: &str = "metrics.csv";
const TENSORBOARD: &str = "tensorboard";
pub(crate) const CONFIG: &str = "config.toml";
pub(crate) const CACHE: &str = "cache";
pub(crate) const SAMPLES: &str = "samples";
const LORA: &str = "lora.safetensors";
const BEST: &str = "best.safetensors";
const PEFT: &str = "lora-peft";

/// How long a lock that another process has is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// A run folder, for reading. To write, [`RunDir::lock`] it.
#[derive(Debug, Clone)]
pub struct RunDir {
    path: PathBuf,
}

/// A checkpoint folder by its name alone, not verified.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The step in the name.
    pub step: u64,
    /// The folder.
    pub dir: PathBuf,
}

/// The right to write to a run folder, held until dropped; the kernel ends it with the process,
/// however that ends.
#[derive(Debug)]
pub struct RunLock {
    run: RunDir,
    file: File,
    /// What the lock file said before, to be put back by a start that is refused.
    before: RefCell<Option<Vec<u8>>>,
    /// Checkpoints that this process has verified, as they were then.
    whole: RefCell<BTreeMap<PathBuf, Stamp>>,
}

/// Name, length and time of change of every file of a folder.
type Stamp = BTreeMap<OsString, (u64, SystemTime)>;

impl RunDir {
    /// Opens the folder, creating it and its parents if need be.
    ///
    /// # Errors
    /// A folder that is no run's and holds something: what a run writes could replace it.
    pub fn open_or_create(path: &Path) -> Result<Self, CheckpointError> {
        create_dir_durably(path)?;
        let run = Self::open(path)?;
        match run.stranger()? {
            None => Ok(run),
            Some(holds) => Err(CheckpointError::NotARun {
                path: path.to_path_buf(),
                holds,
            }),
        }
    }

    /// The folder as a run would find it, which need not be there yet and is not made.
    ///
    /// # Errors
    /// A folder that is no run's and holds something.
    pub(crate) fn planned(path: &Path) -> Result<Self, CheckpointError> {
        if path.exists() {
            return Self::open_or_create(path); // there is nothing to create
        }
        let path = path.to_path_buf();
        Ok(Self { path })
    }

    /// The folder itself, or the nearest above it that is there.
    pub(crate) fn nearest_existing(&self) -> PathBuf {
        let absolute = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let there = absolute.ancestors().find(|folder| folder.exists());
        there.unwrap_or(&absolute).to_path_buf()
    }

    /// The first thing in the folder, if nothing there shows that it is a run's. What a run never writes, hidden files and
    /// the `lost+found` of a disk, is in no danger and does not count.
    fn stranger(&self) -> Result<Option<String>, CheckpointError> {
        let mut strangers = BTreeSet::new();
        for entry in list(&self.path)? {
            let name = entry.file_name().to_string_lossy().into_owned();
            let base = name.split('.').next().unwrap_or_default();
            if name == LOCK
                || name == LATEST
                || (parse_checkpoint_name(base).is_some() && entry.path().is_dir())
                || (name == CACHE && entry.path().join("digests.json").is_file())
            {
                return Ok(None);
            }
            if !name.starts_with('.') && name != "lost+found" {
                strangers.insert(name);
            }
        }
        Ok(strangers.pop_first())
    }

    /// The LoRA of a run that has ended here.
    pub(crate) fn finished(&self) -> Result<Option<PathBuf>, CheckpointError> {
        if !self.path.exists() {
            return Ok(None);
        }
        let names = list(&self.path)?.into_iter().map(|entry| entry.file_name());
        let mut outputs = names.filter(|name| {
            let name = name.to_string_lossy();
            name == PEFT
                || name == LORA
                || name.starts_with("lora-") && name.ends_with(".safetensors")
        });
        Ok(outputs.next().map(|name| self.path.join(name)))
    }

    /// Tries whether everything that a run writes has a place here.
    ///
    /// # Errors
    /// A folder that cannot be written to, a file where a folder belongs, or the reverse.
    pub(crate) fn check_places(&self) -> Result<(), CheckpointError> {
        let kind = |path: PathBuf, expected| Err(CheckpointError::Kind { path, expected });
        if !self.path.exists() {
            return writable(&self.nearest_existing());
        }
        for name in [CONFIG, METRICS, TIMINGS, CSV, LATEST, LORA, BEST] {
            let path = self.path.join(name);
            if path.is_dir() {
                return kind(path, "file");
            }
        }
        writable(&self.path)?;
        for name in [CACHE, SAMPLES, TENSORBOARD, PEFT] {
            let path = self.path.join(name);
            match fs::symlink_metadata(&path) {
                Ok(_) if !path.is_dir() => return kind(path, "folder"),
                Ok(_) => writable(&path)?,
                Err(_) => {} // to be made
            }
        }
        Ok(())
    }

    /// Where encoded samples are.
    pub fn cache_path(&self) -> PathBuf {
        self.path.join(CACHE)
    }

    /// Where previews are.
    pub fn samples_path(&self) -> PathBuf {
        self.path.join(SAMPLES)
    }

    /// Where the LoRA of the best validation is.
    pub(crate) fn best_path(&self) -> PathBuf {
        self.path.join(BEST)
    }

    /// Where the finished LoRA is.
    pub fn lora_path(&self) -> PathBuf {
        self.path.join(LORA)
    }

    /// Opens a folder that exists.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        if !fs::metadata(path).map_err(io("open", path))?.is_dir() {
            let path = path.to_path_buf();
            let expected = "folder";
            return Err(CheckpointError::Kind { path, expected });
        }
        Ok(Self {
            path: path.to_path_buf(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the resolved config of the run is.
    pub fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// Where the metrics log is.
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// Where the times of the steps are.
    pub fn timings_path(&self) -> PathBuf {
        self.path.join(TIMINGS)
    }

    /// Where the metrics are as a table.
    pub fn csv_path(&self) -> PathBuf {
        self.path.join(CSV)
    }

    /// Where TensorBoard's event files are.
    pub fn tensorboard_path(&self) -> PathBuf {
        self.path.join(TENSORBOARD)
    }

    /// Takes the lock where a lock file shows that a run is or was here. Where there is none, nobody writes, and a start that
    /// is refused has nothing to make.
    pub(crate) fn lock_if_there(&self) -> Result<Option<RunLock>, CheckpointError> {
        let is_there = self.path.join(LOCK).exists();
        is_there.then(|| self.lock()).transpose()
    }

    /// Takes the lock, or fails if another process has it and keeps it: one that was killed has it until the system has
    /// taken its memory back. A lock file left by a dead process is no obstacle.
    pub fn lock(&self) -> Result<RunLock, CheckpointError> {
        let path = self.path.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(io("open", &path))?;
        let started = Instant::now();
        let mut is_said = false;
        while let Err(error) = FileExt::try_lock(&file) {
            match error {
                TryLockError::Error(source) => return Err(io("lock", &path)(source)),
                TryLockError::WouldBlock if started.elapsed() >= PATIENCE => {
                    return Err(self.in_use(&file));
                }
                TryLockError::WouldBlock if !is_said => {
                    info!(run = %self.path.display(), "in use by another process; waiting {} s for its end", PATIENCE.as_secs());
                    is_said = true;
                }
                TryLockError::WouldBlock => thread::sleep(Duration::from_millis(20)),
            }
        }
        let before = read_at_most(&path, &path, 200).ok();
        // For the message of the next one only: on a full disk the lock holds all the same.
        let pid = format!("{}\n", std::process::id());
        if let Err(error) = rewrite(&file, pid.as_bytes()) {
            warn!(path = %path.display(), %error, "no process id in the lock file");
        }
        Ok(RunLock {
            run: self.clone(),
            file,
            before: RefCell::new(before),
            whole: RefCell::default(),
        })
    }

    /// Whether a process trains here just now, for people: the lock is tried for an instant.
    pub fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.path.join(LOCK)) else {
            return false;
        };
        matches!(
            FileExt::try_lock_shared(&file),
            Err(TryLockError::WouldBlock)
        )
    }

    /// The folders named like checkpoints, newest first, not verified.
    pub fn checkpoints(&self) -> Result<Vec<Found>, CheckpointError> {
        Ok(self.scan()?.checkpoints)
    }

    /// Whether anything here could be a checkpoint, damaged or put aside included: then a fresh
    /// start would be a mistake.
    pub fn has_checkpoints(&self) -> Result<bool, CheckpointError> {
        if !self.path.exists() {
            return Ok(false);
        }
        let scan = self.scan()?;
        Ok(!scan.checkpoints.is_empty() || !scan.other.is_empty())
    }

    /// The checkpoint `LATEST` names, after comparing the manifest there with the one it was
    /// written for; `None` without a `LATEST`, as before the first save.
    pub fn latest(&self) -> Result<Option<PathBuf>, CheckpointError> {
        let path = self.path.join(LATEST);
        let text = match read_at_most(&path, &path, 200) {
            Err(error) if error.is_not_found() => return Ok(None),
            text => text?,
        };
        let parse = || {
            let (target, sha256) = std::str::from_utf8(&text)
                .ok()?
                .strip_suffix('\n')?
                .split_once('\n')?;
            parse_checkpoint_name(target)?;
            (sha256.len() == 64).then_some((target, sha256))
        };
        let Some((target, sha256)) = parse() else {
            let what = "it is not a checkpoint name and a SHA-256, a line each";
            return Err(CheckpointError::Malformed { path, what });
        };
        let dir = self.path.join(target);
        let target = target.to_string();
        let manifest = dir.join(MANIFEST);
        match read_at_most(&manifest, &manifest, MANIFEST_LIMIT) {
            Ok(manifest) if sha256_hex(&manifest) == sha256 => Ok(Some(dir)),
            Err(error) if error.is_not_found() && !dir.exists() => {
                Err(CheckpointError::LatestGone { path, target })
            }
            _ => Err(CheckpointError::LatestStale { path, target }),
        }
    }

    /// The checkpoint to resume: the newest by step that verifies, and all that was passed over on
    /// the way.
    ///
    /// Why not simply what `LATEST` names: see the head of this module. `LATEST` itself is among
    /// the rejected if it is damaged, or if the checkpoint it was written for is no more.
    ///
    /// # Errors
    /// [`CheckpointError::NoCheckpoint`] if there is nothing, [`CheckpointError::NoneValid`] if
    /// nothing is whole.
    pub fn newest_valid(&self) -> Result<(Verified, Vec<Rejected>), CheckpointError> {
        let scan = self.scan()?;
        let mut rejected = Vec::new();
        if let Err(reason) = self.latest() {
            let path = self.path.join(LATEST);
            rejected.push(Rejected { path, reason });
        }
        for Found { dir: path, .. } in scan.checkpoints {
            match verify(&path) {
                Ok(verified) => return Ok((verified, rejected)),
                Err(reason) => rejected.push(Rejected { path, reason }),
            }
        }
        rejected.extend(scan.other);
        let run = self.path.clone();
        match rejected.is_empty() {
            true => Err(CheckpointError::NoCheckpoint { run }),
            false => Err(CheckpointError::NoneValid { run, rejected }),
        }
    }

    /// The folder of `chosen` as it is listed here, and the checkpoints that are later.
    ///
    /// # Errors
    /// A checkpoint of another run.
    pub(crate) fn later_than(
        &self,
        chosen: &Verified,
    ) -> Result<(PathBuf, Vec<Found>), CheckpointError> {
        let mut later = self.checkpoints()?;
        let real = |dir: &Path| fs::canonicalize(dir).map_err(io("open", dir));
        let chosen_dir = real(&chosen.dir)?;
        let Some(position) = later
            .iter()
            .position(|found| real(&found.dir).is_ok_and(|dir| dir == chosen_dir))
        else {
            return Err(CheckpointError::NotInRun {
                path: chosen.dir.clone(),
                run: self.path.clone(),
            });
        };
        let dir = later[position].dir.clone();
        later.truncate(position);
        Ok((dir, later))
    }

    /// Points `LATEST` to a checkpoint that is verified and durable.
    pub(crate) fn write_latest(
        &self,
        vfs: &dyn Vfs,
        dir: &Path,
        sha256: &str,
    ) -> Result<(), CheckpointError> {
        let name = dir.file_name().unwrap_or_default().display();
        let text = format!("{name}\n{sha256}\n");
        replace_file(vfs, &self.path.join(LATEST), &|out| {
            out.write_all(text.as_bytes())
        })
    }

    pub(super) fn scan(&self) -> Result<Scan, CheckpointError> {
        let mut scan = Scan::default();
        for entry in list(&self.path)? {
            let path = entry.path();
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let temporary = ["ckpt-", LATEST, METRICS, TIMINGS, CONFIG, "lora", BEST]
                .iter()
                .any(|kind| name.starts_with(kind));
            if temporary && name.contains(".tmp-") {
                scan.stale.push(path);
            } else if name.starts_with("ckpt-") {
                let reason = match parse_checkpoint_name(&name) {
                    // A link is refused too: pruning it would empty a folder somewhere else.
                    Some(_) if !entry.file_type().map_err(io("read", &path))?.is_dir() => {
                        CheckpointError::Kind {
                            path: path.clone(),
                            expected: "folder",
                        }
                    }
                    Some(step) => {
                        scan.checkpoints.push(Found { step, dir: path });
                        continue;
                    }
                    None => match name.split_once(".aside-") {
                        Some((back, _)) => CheckpointError::PutAside {
                            path: path.clone(),
                            back: back.to_string(),
                        },
                        None => CheckpointError::Name { path: path.clone() },
                    },
                };
                scan.other.push(Rejected { path, reason });
            } else if name == PEFT && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // The one thing here that is written file by file.
                let files = list(&path)?.into_iter().filter(|file| {
                    let name = file.file_name();
                    let name = name.to_string_lossy();
                    name.starts_with("adapter_") && name.contains(".tmp-")
                });
                scan.stale.extend(files.map(|file| file.path()));
            }
        }
        // `ckpt-N` sorts before `ckpt-N.old-*`, so among equal steps the one in place comes first.
        scan.checkpoints
            .sort_by(|a, b| b.step.cmp(&a.step).then_with(|| a.dir.cmp(&b.dir)));
        scan.other.sort_by(|a, b| b.path.cmp(&a.path));
        Ok(scan)
    }

    fn in_use(&self, file: &File) -> CheckpointError {
        let mut text = String::new();
        let read = file.take(20).read_to_string(&mut text).ok();
        let pid = read.and_then(|_| text.lines().next()?.parse::<u32>().ok());
        CheckpointError::InUse {
            run: self.path.clone(),
            holder: pid.map_or("another process".to_string(), |pid| {
                format!("process {pid}")
            }),
        }
    }
}

impl Drop for RunLock {
    /// A start that was refused leaves the folder as it was, its lock file included.
    fn drop(&mut self) {
        if let Some(before) = self.before.take()
            && let Err(error) = rewrite(&self.file, &before)
        {
            warn!(%error, "the lock file keeps the id of this process");
        }
    }
}

/// Gives a file that is open another content.
fn rewrite(mut file: &File, bytes: &[u8]) -> std::io::Result<()> {
    file.rewind()?;
    file.write_all(bytes)?;
    file.set_len(bytes.len() as u64)
}

impl RunLock {
    /// The folder that is locked.
    pub fn run(&self) -> &RunDir {
        &self.run
    }

    /// To be called once, before anything is written: from here on the folder belongs to this run. Removes what dead
    /// processes left unfinished; what cannot be removed is left for the next time.
    pub fn begin(&self, vfs: &dyn Vfs) -> Result<(), CheckpointError> {
        self.before.take();
        for path in self.run.scan()?.stale {
            match remove_tree(vfs, &path) {
                Ok(()) => info!(path = %path.display(), "removed an unfinished save"),
                Err(error) => warn!(%error, "an unfinished save could not be removed"),
            }
        }
        Ok(())
    }

    /// Makes `chosen` the newest checkpoint of the run, so that training can go on from it.
    ///
    /// Later checkpoints, damaged or of a history that is being left, are put aside under another
    /// name, and their new paths returned. To be called on every resume, before
    /// [`MetricsLog::open`](crate::run::metrics::MetricsLog::open); mostly it finds nothing to do.
    pub fn rewind_to(
        &self,
        vfs: &dyn Vfs,
        chosen: &Verified,
    ) -> Result<Vec<PathBuf>, CheckpointError> {
        let run = self.run.path();
        let (dir, later) = self.run.later_than(chosen)?;
        if later.is_empty() && self.run.latest().ok().flatten().as_ref() == Some(&dir) {
            return Ok(Vec::new());
        }

        self.run.write_latest(vfs, &dir, &chosen.manifest_sha256)?;
        let mut aside = Vec::new();
        for Found { dir, .. } in later {
            let path = sibling(&dir, "aside");
            vfs.rename(&dir, &path).map_err(io("rename", &dir))?;
            warn!(from = %dir.display(), to = %path.display(), "a later checkpoint was put aside");
            aside.push(path);
        }
        vfs.sync_dir(run).map_err(io("fsync", run))?;
        Ok(aside)
    }

    /// Notes that a checkpoint has just been verified.
    pub(crate) fn note_whole(&self, dir: &Path) {
        if let Some(stamp) = stamp(dir) {
            self.whole.borrow_mut().insert(dir.into(), stamp);
        }
    }

    /// Verifies a checkpoint, unless it was before and its files have not changed since: reading all that are kept after every save
    /// would take longer than the save.
    fn check_whole(&self, dir: &Path) -> Result<(), CheckpointError> {
        let stamp = stamp(dir);
        if stamp.is_some() && self.whole.borrow().get(dir) == stamp.as_ref() {
            return Ok(());
        }
        verify(dir)?;
        if let Some(stamp) = stamp {
            self.whole.borrow_mut().insert(dir.into(), stamp);
        }
        Ok(())
    }

    /// Deletes all but the newest `keep` checkpoints, and never leaves fewer than 2. A damaged one does not
    /// count as kept, and goes only once enough later ones are whole.
    pub fn prune(&self, vfs: &dyn Vfs, keep: usize) -> Result<(), CheckpointError> {
        let keep = keep.max(2);
        let checkpoints = self.run.checkpoints()?;
        if checkpoints.len() <= keep {
            return Ok(()); // without reading them all again
        }
        let latest = self.run.latest().ok().flatten();

        let mut whole = BTreeSet::new();
        let mut victims = Vec::new();
        for Found { step, dir } in checkpoints {
            // An older content of the same step, left by a save that was stopped.
            let superseded = whole.contains(&step);
            let enough = whole.len() >= keep;
            if superseded || (enough && latest.as_ref() != Some(&dir)) {
                victims.push(dir);
            } else if !enough {
                match self.check_whole(&dir) {
                    Ok(()) => drop(whole.insert(step)),
                    Err(reason) => {
                        warn!(reason = %Rejected { path: dir, reason }, "a damaged checkpoint is not counted")
                    }
                }
            }
        }
        discard(vfs, self.run.path(), &victims)
    }
}

/// `None` where the system does not tell.
fn stamp(dir: &Path) -> Option<Stamp> {
    let entries = fs::read_dir(dir).ok()?.map(|entry| {
        let entry = entry.ok()?;
        let metadata = entry.metadata().ok()?;
        Some((
            entry.file_name(),
            (metadata.len(), metadata.modified().ok()?),
        ))
    });
    entries.collect()
}

#[derive(Default)]
pub(super) struct Scan {
    /// Newest first.
    checkpoints: Vec<Found>,
    /// `ckpt-*` that can never be resumed as they are.
    other: Vec<Rejected>,
    /// Unfinished files and folders.
    pub(super) stale: Vec<PathBuf>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;
