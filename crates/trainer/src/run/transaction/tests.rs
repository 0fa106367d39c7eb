use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;

use super::*;
use crate::run::error::Rejected;
use crate::run::folder::{Found, RunDir};
use crate::run::manifest::verify;
use crate::run::metrics::truncate_metrics;
use crate::run::testing::{
    KEEP_2, fields, files, identify, line, names, new_run, newest, quick_fs, resume, step_and_save,
    steps, with_files, write,
};
use crate::run::vfs::RealFs;
use crate::run::vfs::simulate::{
    Dice, Disk, EIO, ENOSPC, FailingFs, Failure, Fate, Op, Recorder, Stage, Tree, memory_dir,
};

#[test]
fn what_is_written_is_read_back() {
    let (_temp, lock) = new_run();
    let files = files(120, 1);
    let dir = with_files(&files, |files| {
        write_checkpoint(&RealFs, &lock, 120, files, &fields())
    })
    .unwrap();
    assert_eq!(dir, lock.run().path().join("ckpt-0000000120"));
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
    assert_eq!(
        names(&dir),
        [
            MANIFEST,
            "lora.safetensors",
            "optimizer.safetensors",
            "state.json"
        ]
    );

    let verified = verify(&dir).unwrap();
    assert_eq!(identify(&verified), (120, 1));
    assert_eq!(verified.manifest.fingerprint, fields().fingerprint);
    assert_eq!(verified.manifest.config_digest, fields().config_digest);
    assert_eq!(lock.run().latest().unwrap(), Some(dir));
}

#[test]
fn the_same_content_again_keeps_the_folder() {
    let (_temp, lock) = new_run();
    let dir = write(&lock, 120, 1).unwrap();
    let before = fs::metadata(&dir).unwrap().ino();
    fs::remove_file(lock.run().path().join("LATEST")).unwrap();
    assert_eq!(write(&lock, 120, 1).unwrap(), dir);
    assert_eq!(fs::metadata(&dir).unwrap().ino(), before);
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
    assert_eq!(lock.run().latest().unwrap(), Some(dir));
}

#[test]
fn other_content_of_the_same_step_takes_its_place() {
    let (_temp, lock) = new_run();
    write(&lock, 120, 1).unwrap();
    let dir = write(&lock, 120, 2).unwrap();
    assert_eq!(identify(&verify(&dir).unwrap()), (120, 2));
    fs::write(dir.join("state.json"), b"damaged").unwrap();
    write(&lock, 120, 3).unwrap();
    assert_eq!(identify(&verify(&dir).unwrap()), (120, 3));
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
    assert_eq!(lock.run().latest().unwrap(), Some(dir));
}

#[test]
fn a_step_before_an_existing_one_is_refused() {
    let (_temp, lock) = new_run();
    write(&lock, 120, 1).unwrap();
    let error = write(&lock, 119, 1).unwrap_err().to_string();
    assert!(
        error.contains("ckpt-0000000120 is newer than step 119"),
        "{error}"
    );
    assert_eq!(
        names(lock.run().path()),
        ["LATEST", "ckpt-0000000120", "run.lock"]
    );
}

#[test]
fn file_names_are_plain_and_unique() {
    let (_temp, lock) = new_run();
    for name in ["", ".", "..", "a/b", "../a", "a\\b", ".hidden", MANIFEST] {
        let error = write_checkpoint(&RealFs, &lock, 1, &[(name, &|_| Ok(()))], &fields());
        assert!(
            matches!(error, Err(CheckpointError::FileName { .. })),
            "{name}"
        );
    }
    let twice: [(&str, Content); 2] = [("a", &|_| Ok(())), ("a", &|_| Ok(()))];
    let error = write_checkpoint(&RealFs, &lock, 1, &twice, &fields());
    assert!(matches!(error, Err(CheckpointError::FileName { .. })));
    assert_eq!(names(lock.run().path()), ["run.lock"]);
}

#[test]
fn errors_name_the_path_and_the_cause() {
    let (_temp, lock) = new_run();
    // The folder; the adapter, its two pieces, its fsync; the moments.
    let full = FailingFs::new(6, Failure::Errno(28), false);
    let reason = with_files(&files(9, 1), |files| {
        write_checkpoint(&full, &lock, 9, files, &fields())
    })
    .unwrap_err();
    let path = lock.run().path().to_path_buf();
    let line = Rejected { path, reason }.to_string();
    assert_eq!(
        line,
        format!(
            "write {}/ckpt-0000000009/optimizer.safetensors: No space left on device (os error 28)",
            lock.run().path().display()
        )
    );
    assert_eq!(names(lock.run().path()), ["run.lock"]);
}

// Faults

/// Fails every call of `attempt` in turn, on a run that has saved 10, 20 and 30. Whatever
/// happens, one of `allowed` is found afterwards, `LATEST` is right, and a healthy disk can go
/// on.
fn fail_every_call(
    latest_may_be_absent: bool,
    allowed: &[(u64, u32)],
    attempt: &dyn Fn(&dyn Vfs, &RunLock) -> Result<(), CheckpointError>,
) -> usize {
    let mut trials = 0;
    let kinds = [
        Failure::Errno(ENOSPC),
        Failure::Errno(EIO),
        Failure::ShortWrite,
        Failure::LyingWrite,
    ];
    for (failure, broken_since) in kinds
        .into_iter()
        .flat_map(|failure| [(failure, false), (failure, true)])
    {
        for at in 0.. {
            let (_temp, lock) = new_run();
            let run = lock.run();
            let (_, mut log) = resume(&quick_fs(), &lock).unwrap();
            for step in [10, 20, 30] {
                step_and_save(&quick_fs(), &lock, &mut log, step, 1).unwrap();
            }

            let vfs = FailingFs::new(at, failure, broken_since);
            let result = attempt(&vfs, &lock);
            let context =
                format!("call {at}, {failure:?}, broken since: {broken_since}, {result:?}");
            assert_eq!(result.is_err(), vfs.fired(), "{context}");
            if let Err(reason) = result {
                let message = Rejected {
                    path: PathBuf::new(),
                    reason,
                }
                .to_string();
                assert!(message.contains(run.path().to_str().unwrap()), "{message}");
                match failure {
                    Failure::Errno(ENOSPC) => {
                        assert!(message.contains("No space left on device"), "{message}")
                    }
                    Failure::Errno(_) => {
                        assert!(message.contains("Input/output error"), "{message}")
                    }
                    _ => {}
                }
            }

            let (chosen, rejected) = newest(run);
            assert!(
                allowed.contains(&chosen) && rejected.is_empty(),
                "{context}: {chosen:?} {rejected:?}"
            );
            match run.latest().unwrap() {
                Some(dir) => assert!(
                    allowed.contains(&identify(&verify(&dir).unwrap())),
                    "{context}"
                ),
                None => assert!(latest_may_be_absent, "{context}"),
            }
            let (resumed, mut log) = resume(&quick_fs(), &lock).unwrap();
            assert_eq!(resumed, Some(chosen), "{context}");
            assert!(run.scan().unwrap().stale.is_empty(), "{context}");
            step_and_save(&quick_fs(), &lock, &mut log, 50, 9).unwrap();
            assert_eq!(newest(run), ((50, 9), vec![]), "{context}");

            trials += 1;
            if vfs.calls() <= at {
                break; // the attempt makes no more calls than that
            }
        }
    }
    trials
}

#[test]
fn a_save_that_fails_anywhere_harms_nothing() {
    let trials = fail_every_call(false, &[(30, 1), (40, 1)], &|vfs, lock| {
        let (_, mut log) = resume(&quick_fs(), lock)?;
        step_and_save(vfs, lock, &mut log, 40, 1).map(drop)
    });
    assert!(trials > 150, "{trials}");
}

#[test]
fn a_replacement_that_fails_anywhere_harms_nothing() {
    let trials = fail_every_call(true, &[(30, 1), (30, 2)], &|vfs, lock| {
        with_files(&files(30, 2), |files| {
            write_checkpoint(vfs, lock, 30, files, &fields()).map(drop)
        })
    });
    assert!(trials > 150, "{trials}");
}

#[test]
fn going_back_that_fails_anywhere_harms_nothing() {
    let trials = fail_every_call(false, &[(30, 1), (20, 1)], &|vfs, lock| {
        let chosen = verify(&lock.run().path().join("ckpt-0000000020"))?;
        lock.rewind_to(vfs, &chosen)?;
        MetricsLog::open(vfs, lock, Some(20)).map(drop)
    });
    assert!(trials > 50, "{trials}");
}

/// The calls of a whole run, and what must be found if the power goes while they are made.
struct Recording {
    ops: Vec<Op>,
    syncs: Vec<usize>,
    /// From which call on what must be found.
    promises: Vec<(usize, Promise)>,
    /// The metrics log that belongs to a checkpoint.
    metrics: BTreeMap<Option<(u64, u32)>, Vec<u8>>,
}

#[derive(Clone)]
struct Promise {
    /// What [`RunDir::newest_valid`] may choose and `LATEST` may name; `None` is nothing.
    found: Vec<Option<(u64, u32)>>,
    latest_may_be_absent: bool,
    /// So many different steps can be resumed.
    at_least: usize,
}

/// A run while it is recorded.
struct Recorded<'a> {
    vfs: &'a Recorder,
    lock: &'a RunLock,
    recording: Recording,
}

impl Recorded<'_> {
    fn promise(
        &mut self,
        found: &[Option<(u64, u32)>],
        latest_may_be_absent: bool,
        at_least: usize,
    ) {
        let found = found.to_vec();
        let promise = Promise {
            found,
            latest_may_be_absent,
            at_least,
        };
        self.recording.promises.push((self.vfs.len(), promise));
    }

    /// Notes that the log as it is now is the one of the checkpoint `new`.
    fn metrics_of(&mut self, new: (u64, u32)) {
        let log = fs::read(self.lock.run().metrics_path()).unwrap();
        self.recording.metrics.insert(Some(new), log);
    }

    /// What [`save`] does, in its parts: the promise begins before the pruning.
    fn save(&mut self, log: &mut MetricsLog, (step, version): (u64, u32)) {
        let before = self.recording.promises.last().unwrap().1.clone();
        let (last, new) = (before.found[0], Some((step, version)));
        let replaces = last.is_some_and(|(last, _)| last == step);
        if !replaces {
            log.append(self.vfs, &line(step - 3, version)).unwrap();
            log.append(self.vfs, &line(step, version)).unwrap();
            log.sync(self.vfs).unwrap();
        }
        self.metrics_of((step, version));
        self.promise(&[last, new], replaces || last.is_none(), before.at_least);
        with_files(&files(step, version), |files| {
            write_checkpoint(self.vfs, self.lock, step, files, &fields())
        })
        .unwrap();
        let more = if replaces { 0 } else { 1 };
        self.promise(&[new], false, 2.min(before.at_least + more));
        self.lock.prune(self.vfs, KEEP_2).unwrap();
    }
}

/// A run with every kind of writing: saves with pruning, a save killed before its name was
/// durable, a replacement, a resume from an earlier step. `forget_sync` is the canary: that
/// sync is not done.
fn record(forget_sync: Option<usize>) -> Recording {
    let (_temp, lock) = new_run();
    let run = lock.run().path();
    let vfs = Recorder::new(run, forget_sync);
    let recording = Recording {
        ops: Vec::new(),
        syncs: Vec::new(),
        promises: Vec::new(),
        metrics: BTreeMap::from([(None, Vec::new())]),
    };
    let mut recorded = Recorded {
        vfs: &vfs,
        lock: &lock,
        recording,
    };

    recorded.promise(&[None], true, 0);
    let (_, mut log) = resume(&vfs, &lock).unwrap();
    for step in [10, 20, 30] {
        recorded.save(&mut log, (step, 1));
    }

    // Killed after the rename of the folder and before its fsync; the next process saves the
    // same again.
    log.append(&vfs, &line(40, 1)).unwrap();
    recorded.metrics_of((40, 1));
    recorded.promise(&[Some((30, 1)), Some((40, 1))], false, 2);
    vfs.kill_after.replace(Some("ckpt-0000000040".into()));
    with_files(&files(40, 1), |files| {
        save(&vfs, &lock, &mut log, 40, files, &fields(), KEEP_2).unwrap_err();
    });
    assert_eq!(steps(lock.run()), [40, 30, 20]);
    vfs.revive();
    with_files(&files(40, 1), |files| {
        write_checkpoint(&vfs, &lock, 40, files, &fields()).unwrap();
    });
    recorded.promise(&[Some((40, 1))], false, 2);
    lock.prune(&vfs, KEEP_2).unwrap();

    recorded.save(&mut log, (40, 2));

    // Back to 30, and on from there in another way.
    let chosen = verify(&run.join("ckpt-0000000030")).unwrap();
    recorded.promise(&[Some((40, 2)), Some((30, 1))], false, 1);
    lock.rewind_to(&vfs, &chosen).unwrap();
    recorded.promise(&[Some((30, 1))], false, 1);
    let mut log = MetricsLog::open(&vfs, &lock, Some(30)).unwrap();
    for step in [35, 40, 50] {
        recorded.save(&mut log, (step, 3));
    }

    Recording {
        ops: vfs.ops(),
        syncs: vfs.syncs(),
        ..recorded.recording
    }
}

impl Recording {
    /// What is promised once so many calls were made.
    fn promise(&self, calls: usize) -> &Promise {
        &self
            .promises
            .iter()
            .rfind(|(from, _)| *from <= calls)
            .unwrap()
            .1
    }

    /// Looks at a run folder as found after a power loss.
    fn judge(&self, run: &Path, promise: &Promise) -> Result<Option<(u64, u32)>, String> {
        let run = RunDir::open(run).unwrap();
        let latest = match run.latest().map_err(|error| error.to_string())? {
            Some(dir) => Some(identify(&verify(&dir).map_err(|error| error.to_string())?)),
            None if promise.latest_may_be_absent => None,
            None => return Err("LATEST is lost".to_string()),
        };
        if latest.is_some() && !promise.found.contains(&latest) {
            return Err(format!("LATEST names {latest:?}"));
        }
        let mut whole = BTreeSet::new();
        for Found { step, dir } in run.checkpoints().unwrap() {
            verify(&dir).map_err(|error| format!("half a checkpoint is seen: {error}"))?;
            whole.insert(step);
        }
        if whole.len() < promise.at_least {
            return Err(format!("only {whole:?} can be resumed"));
        }
        let newest = match run.newest_valid() {
            Ok((verified, _)) => Some(identify(&verified)),
            Err(CheckpointError::NoCheckpoint { .. }) => None,
            Err(error) => return Err(error.to_string()),
        };
        if !promise.found.contains(&newest) {
            return Err(format!(
                "{newest:?} is resumed, expected one of {:?}",
                promise.found
            ));
        }

        let log = run.path().with_file_name("log-after-cut");
        let _ = fs::remove_file(&log);
        if run.metrics_path().exists() {
            fs::copy(run.metrics_path(), &log).unwrap();
        }
        let step = newest.map(|(step, _)| step);
        truncate_metrics(&quick_fs(), &log, step).map_err(|error| error.to_string())?;
        let log = fs::read(&log).unwrap_or_default();
        if log != self.metrics[&newest] {
            return Err(format!(
                "the metrics of {newest:?} are {}",
                String::from_utf8_lossy(&log)
            ));
        }
        Ok(newest)
    }

    /// Crash states after `calls` calls: the extreme ones, each effect alone lost, kept or
    /// torn, then `random` more.
    fn states(&self, calls: usize, random: usize, dice: &mut Dice) -> Vec<Tree> {
        let disk = Disk::replay(&self.ops[..calls]);
        let effects = disk.unsynced();
        let mut trees = vec![disk.crash(|_| Fate::Lost)];
        if effects == 0 {
            return trees;
        }
        trees.push(disk.crash(|_| Fate::Kept));
        for one in 0..effects {
            trees.push(disk.crash(|effect| {
                if effect == one {
                    Fate::Kept
                } else {
                    Fate::Lost
                }
            }));
            trees.push(disk.crash(|effect| {
                if effect == one {
                    Fate::Lost
                } else {
                    Fate::Kept
                }
            }));
            let seed = dice.roll();
            trees.push(disk.crash(|effect| {
                if effect == one {
                    Fate::Torn(seed)
                } else {
                    Fate::Kept
                }
            }));
        }
        for _ in 0..random {
            let fates: Vec<_> = (0..effects)
                .map(|_| match dice.roll() % 3 {
                    0 => Fate::Lost,
                    1 => Fate::Kept,
                    _ => Fate::Torn(dice.roll()),
                })
                .collect();
            trees.push(disk.crash(|effect| fates[effect]));
        }
        trees
    }

    /// The first broken promise after the power goes at any call from `first` on, and how many
    /// different states were looked at.
    fn attack(&self, first: usize, random: usize) -> (Result<(), String>, usize) {
        let temp = memory_dir();
        let (at, again) = (temp.path().join("run"), temp.path().join("again"));
        fs::create_dir(&at).unwrap();
        let mut stage = Stage::new(&at);
        let mut dice = Dice(1);
        let mut seen = HashSet::new();
        for calls in first..=self.ops.len() {
            let promise = self.promise(calls);
            for tree in self.states(calls, random, &mut dice) {
                let mut hasher = DefaultHasher::new();
                (calls, &tree).hash(&mut hasher);
                if !seen.insert(hasher.finish()) {
                    continue;
                }
                stage.show(tree.clone());
                let newest = match self.judge(&at, promise) {
                    Ok(newest) => newest,
                    Err(broken) => {
                        let op = calls.checked_sub(1).map(|last| &self.ops[last]);
                        return (
                            Err(format!("power loss after call {calls} {op:?}: {broken}")),
                            seen.len(),
                        );
                    }
                };
                if seen.len() % 25 == 0 {
                    go_on(&again, tree, newest);
                }
            }
        }
        (Ok(()), seen.len())
    }
}

/// The run of a crash state resumes and saves again.
fn go_on(at: &Path, tree: Tree, newest: Option<(u64, u32)>) {
    fs::create_dir(at).unwrap();
    Stage::new(at).show(tree);
    let lock = RunDir::open(at).unwrap().lock().unwrap();
    let (resumed, mut log) = resume(&quick_fs(), &lock).unwrap();
    assert_eq!(resumed, newest);
    assert!(lock.run().scan().unwrap().stale.is_empty());
    let step = newest.map_or(0, |(step, _)| step) + 5;
    step_and_save(&quick_fs(), &lock, &mut log, step, 7).unwrap();
    assert_eq!(self::newest(lock.run()), ((step, 7), vec![]));
    fs::remove_dir_all(at).unwrap();
}

#[test]
fn no_power_loss_breaks_a_promise() {
    let (result, states) = record(None).attack(0, 60);
    result.unwrap();
    assert!(states >= 2_000, "{states} states only");
    println!("crash states: {states}"); // the fault suite counts them
}

/// The same at length, for the fault suite.
#[test]
#[ignore = "takes a minute"]
fn ten_thousand_power_losses_break_no_promise() {
    let (result, states) = record(None).attack(0, 1500);
    result.unwrap();
    assert!(states >= 10_000, "{states} states only");
    println!("crash states: {states}"); // the fault suite counts them
}

/// The canary: with any one fsync of the run left out, the simulation finds a broken promise.
#[test]
fn every_fsync_is_needed() {
    let syncs = record(None).syncs.len();
    assert!(syncs > 70, "{syncs}");
    for forgotten in 0..syncs {
        let recording = record(Some(forgotten));
        let at = recording.syncs[forgotten];
        let around = &recording.ops[at - 1..=at];
        // One is there for the reader only: the replaced folder is discarded next, which syncs
        // the same names.
        let covered = matches!(around, [Op::Rename(_, latest), Op::Rename(old, _)]
                if latest == Path::new(LATEST) && old.to_string_lossy().contains(".old-"));
        assert_eq!(
            recording.attack(at, 4).0.is_ok(),
            covered,
            "fsync {forgotten}, between {around:?}"
        );
    }
}
