//! Damaged checkpoints: found, passed over by name, and the run ends as if nothing had been.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::rig::{Rig, STEPS, checkpoint};
use crate::tally::{Tally, Trial};

/// Files below this size get every byte flipped, larger ones this many.
const WHOLE: u64 = 64 << 10;
const POSITIONS: usize = 10_000;

/// One bit of a byte, put back afterwards.
struct Flip {
    path: PathBuf,
    at: u64,
    bit: u8,
}

impl Flip {
    fn random(rig: &Rig, path: &Path, at: u64) -> Self {
        Self {
            path: path.to_path_buf(),
            at,
            bit: 1 << rig.below(8),
        }
    }

    fn apply(&self) -> Result<()> {
        let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
        let mut byte = [0];
        file.read_exact_at(&mut byte, self.at)?;
        file.write_all_at(&[byte[0] ^ self.bit], self.at)?;
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn files_of(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        files.push((entry.path(), entry.metadata()?.len()));
    }
    files.sort();
    Ok(files)
}

/// `inspect CHECKPOINT` must fail and name the damaged file.
fn detected(rig: &Rig, folder: &Path, path: &Path) -> Result<Trial> {
    rig.inspect(folder)?.refused(&[&name(path)])?;
    Ok(Trial::Survived)
}

/// A copy of a checkpoint that `inspect` accepts.
fn victim(rig: &Rig) -> Result<PathBuf> {
    let run = rig.run_at(&[STEPS - 3])?;
    let folder = run.join(checkpoint(STEPS - 3));
    rig.inspect(&folder)?.ok()?;
    Ok(folder)
}

/// Every byte of small files and thousands of large ones.
pub fn bit_flip(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let folder = victim(rig)?;
    let files = files_of(&folder)?;
    let mut flips = Vec::new();
    for (path, length) in &files {
        let random = |count| (0..count).map(|_| rig.below(*length)).collect();
        let positions: Vec<u64> = match (rig.options.quick, *length < WHOLE) {
            (true, _) => random(200 / files.len()),
            (false, true) => (0..*length).collect(),
            (false, false) => random(POSITIONS),
        };
        flips.extend(positions.into_iter().map(|at| Flip::random(rig, path, at)));
    }
    for flip in &flips {
        flip.apply()?;
        let trial = detected(rig, &folder, &flip.path);
        flip.apply()?; // the same bit again
        tally.count(
            format!("{} byte {} bit {:#x}", name(&flip.path), flip.at, flip.bit),
            trial,
        );
    }
    rig.inspect(&folder)?.ok()?;
    tally.expect(flips.len());
    tally.note = match rig.options.quick {
        true => format!("random bytes of {} files, a process each", files.len()),
        false => {
            format!("every byte of files < 64 KiB, {POSITIONS} of larger ones, a process each")
        }
    };
    Ok(())
}

/// Every file of the checkpoint cut at every 512 bytes.
pub fn truncation(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let folder = victim(rig)?;
    let mut cuts = Vec::new();
    for (path, length) in files_of(&folder)? {
        cuts.extend(
            (0..length)
                .step_by(512)
                .chain([length - 1])
                .map(|at| (path.clone(), at)),
        );
    }
    let all = cuts.len();
    let chosen = rig.sample(&cuts, rig.count(40, usize::MAX));
    for (path, length) in &chosen {
        let whole = fs::read(path)?;
        OpenOptions::new()
            .write(true)
            .open(path)?
            .set_len(*length)?;
        let trial = detected(rig, &folder, path);
        fs::write(path, whole)?;
        tally.count(format!("{} cut to {length} bytes", name(path)), trial);
    }
    rig.inspect(&folder)?.ok()?;
    tally.expect(chosen.len());
    tally.note = format!(
        "{} of {all} cuts, at every 512 bytes and before the last",
        chosen.len()
    );
    Ok(())
}

/// A real resume with the newest checkpoint damaged: falls back to the one before and says so.
pub fn fallback(rig: &Rig, tally: &mut Tally) -> Result<()> {
    let trials = rig.count(3, 20);
    for i in 0..trials {
        let mut what = String::new();
        let trial = (|| {
            let run = rig.run_near_end()?;
            let folder = run.join(checkpoint(STEPS - 3));
            let files = files_of(&folder)?;
            let (path, length) = &files[i % files.len()];
            let file = name(path);
            let at = rig.below(*length);
            what = format!("{file} byte {at}");
            if i % 5 == 4 {
                OpenOptions::new().write(true).open(path)?.set_len(at)?;
            } else {
                Flip::random(rig, path, at).apply()?;
            }
            let ended = rig.run(rig.train(&run, &["--resume"]))?.ok()?;
            let said = |part: &str| {
                ensure!(
                    ended.err.contains(part),
                    "`{part}` is not in: {}",
                    ended.err
                );
                Ok(())
            };
            said("passed over")?;
            said(&file)?;
            said(&format!("step={}", STEPS - 4))?;
            remove_aside(&run)?;
            rig.compare(&run)
        })();
        tally.count(what, trial);
    }
    tally.expect(trials);
    tally.note = "resumed from the checkpoint before, which is said with the reason".into();
    Ok(())
}

/// The damaged checkpoint must have been kept under another name.
fn remove_aside(run: &Path) -> Result<()> {
    let mut found = 0;
    for entry in fs::read_dir(run)? {
        let path = entry?.path();
        if name(&path).contains(".aside-") {
            fs::remove_dir_all(path)?;
            found += 1;
        }
    }
    ensure!(found == 1, "{found} checkpoints were put aside");
    Ok(())
}
