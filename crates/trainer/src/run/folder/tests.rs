use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::{Child, Command, Stdio};

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::run::manifest::tests::{borrowed, fields, files, identify, poke, quick_fs, write};
use crate::run::vfs::simulate::{
    Dice, Disk, EIO, ENOSPC, FailingFs, Failure, Fate, Op, Recorder, Stage, Tree, memory_dir,
};

const KEEP_2: Retention = Retention {
    keep: 2,
    keep_every: None,
};

fn new_run() -> (TempDir, RunLock) {
    let dir = memory_dir();
    let lock = RunDir::open_or_create(&dir.path().join("run"))
        .unwrap()
        .lock()
        .unwrap();
    (dir, lock)
}

fn run_with(steps: &[u64]) -> (TempDir, RunLock) {
    let (dir, lock) = new_run();
    for step in steps {
        write(&lock, *step, 1).unwrap();
    }
    (dir, lock)
}

fn steps(run: &RunDir) -> Vec<u64> {
    run.checkpoints()
        .unwrap()
        .iter()
        .map(|found| found.step)
        .collect()
}

fn damage(lock: &RunLock, step: u64) {
    let path = lock
        .run()
        .path()
        .join(format!("ckpt-{step:010}/lora.safetensors"));
    let byte = fs::read(&path).unwrap()[7];
    poke(&path, 7, byte ^ 1);
}

fn newest(run: &RunDir) -> ((u64, u32), Vec<String>) {
    let (verified, rejected) = run.newest_valid().unwrap();
    (
        identify(&verified),
        rejected.iter().map(Rejected::to_string).collect(),
    )
}

// Opening and locking

#[test]
fn a_run_folder_is_created_with_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("runs/one/");
    let run = RunDir::open_or_create(&path).unwrap();
    assert!(!run.has_checkpoints().unwrap());
    RunDir::open_or_create(&path).unwrap();
    fs::write(dir.path().join("file"), b"").unwrap();
    assert!(matches!(
        RunDir::open_or_create(&dir.path().join("file")),
        Err(CheckpointError::Kind {
            expected: "folder",
            ..
        })
    ));
    assert!(
        RunDir::open(&dir.path().join("absent"))
            .unwrap_err()
            .is_not_found()
    );
}

#[test]
fn two_locks_conflict_even_in_one_process() {
    let (_temp, lock) = new_run();
    let message = lock.run().lock().unwrap_err().to_string();
    let holder = format!("is in use by process {};", std::process::id());
    assert!(
        message.starts_with("run folder ") && message.contains(&holder),
        "{message}"
    );
    let run = lock.run().clone();
    drop(lock);
    run.lock().unwrap();
}

#[test]
fn a_lock_file_left_behind_is_no_obstacle() {
    let (_temp, lock) = new_run();
    let run = lock.run().clone();
    drop(lock);
    let path = run.path().join(LOCK);
    for left in ["", "1\n", "not a number", "99999999999999999999\n and more"] {
        fs::write(&path, left).unwrap();
        let _lock = run.lock().unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!("{}\n", std::process::id())
        );
    }
    fs::write(&path, "").unwrap();
    let _lock = run.lock().unwrap();
    fs::write(&path, "?").unwrap();
    assert!(
        run.lock()
            .unwrap_err()
            .to_string()
            .contains("in use by another process")
    );
}

/// Not a test of its own: the other processes of the two tests below run this.
#[test]
fn lock_and_wait() {
    let Some(path) = std::env::var_os("FLUX_LORA_TEST_LOCK") else {
        return;
    };
    let run = RunDir::open(Path::new(&path)).unwrap();
    let lock = run.lock();
    let said = lock
        .as_ref()
        .map_or_else(ToString::to_string, |_| "locked".to_string());
    let partial = run.path().join(format!("partial-{}", std::process::id()));
    fs::write(&partial, said).unwrap();
    fs::rename(
        &partial,
        run.path().join(format!("said-{}", std::process::id())),
    )
    .unwrap();
    if lock.is_ok() {
        std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    }
}

fn spawn_locker(run: &RunDir) -> Child {
    let this_test = module_path!().split_once("::").unwrap().1.to_string() + "::lock_and_wait";
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &this_test])
        .env("FLUX_LORA_TEST_LOCK", run.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn said(run: &RunDir, child: &Child) -> String {
    let path = run.path().join(format!("said-{}", child.id()));
    for _ in 0..6000 {
        if let Ok(text) = fs::read_to_string(&path) {
            return text;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("process {} does not answer", child.id());
}

#[test]
fn of_fifty_processes_one_gets_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open_or_create(dir.path()).unwrap();
    let mut children: Vec<_> = (0..50).map(|_| spawn_locker(&run)).collect();
    let answers: Vec<_> = children.iter().map(|child| said(&run, child)).collect();
    let winners: Vec<_> = answers
        .iter()
        .filter(|answer| *answer == "locked")
        .collect();
    assert_eq!(winners.len(), 1, "{answers:#?}");
    assert!(
        answers
            .iter()
            .all(|answer| answer == "locked" || answer.contains("is in use by")),
        "{answers:#?}"
    );
    for child in &mut children {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
    run.lock().unwrap();
}

#[test]
fn a_killed_process_leaves_the_lock_free() {
    let dir = tempfile::tempdir().unwrap();
    let run = RunDir::open_or_create(dir.path()).unwrap();
    let mut child = spawn_locker(&run);
    assert_eq!(said(&run, &child), "locked");
    let message = run.lock().unwrap_err().to_string();
    assert!(
        message.contains(&format!("process {}", child.id())),
        "{message}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    run.lock().unwrap();
}

// Choosing what to resume

#[test]
fn the_newest_whole_checkpoint_is_chosen_and_the_others_named() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40]);
    assert_eq!(newest(lock.run()), ((40, 1), vec![]));
    damage(&lock, 40);
    fs::remove_file(lock.run().path().join("ckpt-0000000030/MANIFEST.json")).unwrap();
    let (chosen, rejected) = newest(lock.run());
    assert_eq!(chosen, (20, 1));
    assert_eq!(rejected.len(), 2, "{rejected:?}");
    assert!(
        rejected[0].contains("ckpt-0000000040/lora.safetensors is damaged: SHA-256 "),
        "{rejected:?}"
    );
    assert!(
        rejected[1].contains("ckpt-0000000030/MANIFEST.json is missing"),
        "{rejected:?}"
    );

    damage(&lock, 20);
    damage(&lock, 10);
    let message = lock.run().newest_valid().unwrap_err().to_string();
    for step in ["10", "20", "30", "40"] {
        assert!(
            message.contains(&format!("ckpt-00000000{step}/")),
            "{message}"
        );
    }
    assert!(lock.run().has_checkpoints().unwrap());
}

#[test]
fn an_empty_run_has_nothing_to_resume() {
    let (_temp, lock) = new_run();
    fs::create_dir(lock.run().path().join("ckpt-0000000010.tmp-1-0")).unwrap();
    assert!(!lock.run().has_checkpoints().unwrap());
    assert!(matches!(
        lock.run().newest_valid(),
        Err(CheckpointError::NoCheckpoint { .. })
    ));
    assert_eq!(lock.run().latest().unwrap(), None);
}

#[test]
fn whatever_is_named_like_a_checkpoint_forbids_a_silent_start() {
    let (_temp, lock) = new_run();
    let run = lock.run();
    for (name, says) in [
        ("ckpt-120", "is not named like a checkpoint"),
        ("ckpt-0000000120", "is not a folder"),
        (
            "ckpt-0000000120.aside-1-0",
            "rename it back to ckpt-0000000120",
        ),
    ] {
        let path = run.path().join(name);
        fs::write(&path, b"").unwrap();
        assert!(run.has_checkpoints().unwrap());
        let message = run.newest_valid().unwrap_err().to_string();
        assert!(message.contains(says), "{message}");
        fs::remove_file(&path).unwrap();
    }
    std::os::unix::fs::symlink("/tmp", run.path().join("ckpt-0000000120")).unwrap();
    assert!(
        run.newest_valid()
            .unwrap_err()
            .to_string()
            .contains("is not a folder")
    );
}

#[test]
fn latest_is_a_witness_not_the_judge() {
    let (_temp, lock) = run_with(&[10, 20]);
    let run = lock.run();
    let path = run.path().join(LATEST);
    let good = fs::read(&path).unwrap();

    fs::remove_file(&path).unwrap();
    assert_eq!(newest(run), ((20, 1), vec![])); // stopped before the first LATEST

    let ten = sha256_hex(&fs::read(run.path().join("ckpt-0000000010/MANIFEST.json")).unwrap());
    fs::write(&path, format!("ckpt-0000000010\n{ten}\n")).unwrap();
    assert_eq!(newest(run), ((20, 1), vec![])); // stopped between rename and LATEST

    for (content, says) in [
        (String::new(), "LATEST is damaged"),
        ("ckpt-0000000020".into(), "LATEST is damaged"),
        (
            format!("../run/ckpt-0000000020\n{ten}\n"),
            "LATEST is damaged",
        ),
        (format!("ckpt-0000000020\n{ten}\n"), "another content"),
        (
            format!("ckpt-0000000030\n{ten}\n"),
            "LATEST names ckpt-0000000030, which is not there",
        ),
        ("x".repeat(1 << 20), "LATEST is damaged"),
    ] {
        fs::write(&path, content).unwrap();
        let (chosen, rejected) = newest(run);
        assert_eq!(chosen, (20, 1));
        assert!(
            rejected.len() == 1 && rejected[0].contains(says),
            "{rejected:?}"
        );
    }

    fs::remove_file(&path).unwrap();
    fs::write(&path, &good).unwrap();
    for (at, byte) in good.iter().enumerate() {
        for bit in 0..8 {
            poke(&path, at, byte ^ 1 << bit);
            let (chosen, rejected) = newest(run);
            assert_eq!(
                (chosen, rejected.len()),
                ((20, 1), 1),
                "byte {at} bit {bit}"
            );
        }
        poke(&path, at, *byte);
    }
    for length in (0..good.len()).rev() {
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(length as u64)
            .unwrap();
        assert_eq!(newest(run).1.len(), 1, "cut to {length}");
    }
}

#[test]
fn latest_of_a_pruned_folder_is_reported() {
    let (_temp, lock) = run_with(&[10, 20]);
    fs::remove_dir_all(lock.run().path().join("ckpt-0000000020")).unwrap();
    let (chosen, rejected) = newest(lock.run());
    assert_eq!(chosen, (10, 1));
    assert!(
        rejected[0].contains("LATEST names ckpt-0000000020, which is not there"),
        "{rejected:?}"
    );
}

#[test]
fn a_checkpoint_that_was_being_replaced_can_be_resumed() {
    let (_temp, lock) = run_with(&[10, 20]);
    let run = lock.run().path();
    fs::rename(
        run.join("ckpt-0000000020"),
        run.join("ckpt-0000000020.old-1-0"),
    )
    .unwrap();
    fs::remove_file(run.join(LATEST)).unwrap();
    assert_eq!(newest(lock.run()), ((20, 1), vec![]));
    let (chosen, _) = lock.run().newest_valid().unwrap();
    assert_eq!(
        lock.rewind_to(&quick_fs(), &chosen).unwrap(),
        Vec::<PathBuf>::new()
    );
    assert_eq!(
        lock.run().latest().unwrap(),
        Some(run.join("ckpt-0000000020.old-1-0"))
    );
    write(&lock, 20, 2).unwrap();
    assert_eq!(newest(lock.run()), ((20, 2), vec![]));
    write(&lock, 30, 2).unwrap();
    lock.prune(&quick_fs(), &KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [30, 20]); // the older content of 20 went, and 10
}

#[test]
fn going_back_puts_later_checkpoints_aside() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40]);
    let run = lock.run();
    damage(&lock, 30);
    let chosen = verify(&run.path().join("ckpt-0000000020")).unwrap();
    let aside = lock.rewind_to(&quick_fs(), &chosen).unwrap();
    assert_eq!(aside.len(), 2);
    assert!(aside.iter().all(|path| path.is_dir()));
    assert_eq!(steps(run), [20, 10]);
    assert_eq!(newest(run), ((20, 1), vec![]));
    assert_eq!(
        run.latest().unwrap(),
        Some(run.path().join("ckpt-0000000020"))
    );

    write(&lock, 30, 2).unwrap();
    assert_eq!(newest(run), ((30, 2), vec![]));
    let (chosen, _) = run.newest_valid().unwrap();
    let untouched = FailingFs::new(0, Failure::Errno(EIO), true);
    lock.rewind_to(&untouched, &chosen).unwrap(); // nothing to do, nothing done
    assert_eq!(untouched.calls(), 0);

    let (_other, elsewhere) = run_with(&[20]);
    let stranger = verify(&elsewhere.run().path().join("ckpt-0000000020")).unwrap();
    assert!(matches!(
        lock.rewind_to(&quick_fs(), &stranger),
        Err(CheckpointError::NotInRun { .. })
    ));
}

#[test]
fn the_next_start_removes_what_is_unfinished() {
    let (_temp, lock) = run_with(&[10]);
    let run = lock.run().path();
    fs::create_dir_all(run.join("ckpt-0000000020.tmp-1-0/nested")).unwrap();
    fs::write(
        run.join("ckpt-0000000020.tmp-1-0/nested/lora.safetensors"),
        b"half",
    )
    .unwrap();
    std::os::unix::fs::symlink(
        run.join("ckpt-0000000010"),
        run.join("ckpt-0000000020.tmp-1-0/link"),
    )
    .unwrap();
    fs::write(run.join("LATEST.tmp-1-0"), b"ckpt").unwrap();
    fs::write(run.join("metrics.jsonl.tmp-1-0"), b"{").unwrap();
    fs::write(run.join("notes.tmp-1-0"), b"not ours").unwrap();
    fs::create_dir(run.join("lora-peft")).unwrap();
    let peft = |name: &str| run.join("lora-peft").join(name);
    fs::write(peft("adapter_model.safetensors.tmp-1"), b"half").unwrap();
    fs::write(peft("adapter_config.json"), b"whole").unwrap();
    fs::write(peft("notes.tmp-1"), b"not ours").unwrap();
    lock.remove_stale(&quick_fs()).unwrap();
    let mut left: Vec<_> = list(run)
        .unwrap()
        .iter()
        .map(fs::DirEntry::file_name)
        .collect();
    left.sort();
    assert_eq!(
        left,
        [
            "LATEST",
            "ckpt-0000000010",
            "lora-peft",
            "notes.tmp-1-0",
            "run.lock"
        ]
    );
    assert!(!peft("adapter_model.safetensors.tmp-1").exists());
    assert!(peft("adapter_config.json").exists() && peft("notes.tmp-1").exists());
    assert_eq!(newest(lock.run()), ((10, 1), vec![]));
}

// Retention

#[test]
fn the_newest_stay_and_never_fewer_than_two() {
    for (keep, left) in [
        (0, vec![50, 40]),
        (2, vec![50, 40]),
        (3, vec![50, 40, 30]),
        (9, vec![50, 40, 30, 20, 10]),
    ] {
        let (_temp, lock) = run_with(&[10, 20, 30, 40, 50]);
        lock.prune(
            &quick_fs(),
            &Retention {
                keep,
                keep_every: None,
            },
        )
        .unwrap();
        assert_eq!(steps(lock.run()), left);
        assert!(lock.run().scan().unwrap().stale.is_empty());
    }
}

#[test]
fn damaged_checkpoints_do_not_count() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40, 50]);
    damage(&lock, 50);
    damage(&lock, 30);
    lock.prune(&quick_fs(), &KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [50, 40, 30, 20]);
    assert_eq!(newest(lock.run()).0, (40, 1));
    damage(&lock, 40);
    damage(&lock, 20);
    lock.prune(&quick_fs(), &KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [50, 40, 30, 20]); // nothing whole is left: nothing goes
}

#[test]
fn every_so_many_steps_one_stays_for_ever() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40, 50, 60]);
    let retention = |every| Retention {
        keep: 2,
        keep_every: Some(every),
    };
    lock.prune(&quick_fs(), &retention(20)).unwrap();
    assert_eq!(steps(lock.run()), [60, 50, 40, 20]);
    lock.prune(&quick_fs(), &retention(0)).unwrap(); // no step is a multiple of none
    assert_eq!(steps(lock.run()), [60, 50]);
}

#[test]
fn what_latest_names_stays() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40]);
    let ten = lock.run().path().join("ckpt-0000000010");
    let sha256 = verify(&ten).unwrap().manifest_sha256;
    lock.run().write_latest(&quick_fs(), &ten, &sha256).unwrap();
    lock.prune(&quick_fs(), &KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [40, 30, 10]);
}

// Metrics

fn line(step: u64, version: u32) -> serde_json::Value {
    json!({"step": step, "loss": 0.1 * step as f64, "version": version})
}

#[test]
fn the_log_is_cut_back_to_the_step_that_is_resumed() {
    let (_temp, lock) = new_run();
    let vfs = quick_fs();
    let path = lock.run().metrics_path();
    assert_eq!(
        truncate_metrics(&vfs, &path, Some(9)).unwrap(),
        Truncated {
            kept: 0,
            dropped: 0
        }
    );
    let mut log = MetricsLog::open(&vfs, &lock, None).unwrap();
    for step in 1..=6 {
        log.append(&vfs, &line(step, 1)).unwrap();
    }
    log.sync(&vfs).unwrap();
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = whole.split_inclusive('\n').collect();
    assert_eq!(lines.len(), 6);

    for torn in ["", "{\"step\":7,\"lo", "\0\0\0\0", "{\"step\":7}"] {
        for step in 0..=7 {
            fs::write(&path, format!("{whole}{torn}")).unwrap();
            let mut log = MetricsLog::open(&vfs, &lock, Some(step)).unwrap();
            log.append(&vfs, &line(step + 1, 2)).unwrap();
            let kept = lines[..lines.len().min(step as usize)].concat();
            let seven = if torn.ends_with('}') && step == 7 {
                "{\"step\":7}\n"
            } else {
                ""
            };
            assert_eq!(
                fs::read_to_string(&path).unwrap(),
                format!("{kept}{seven}{}\n", line(step + 1, 2))
            );
        }
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(
        truncate_metrics(&vfs, &path, Some(4)).unwrap(),
        Truncated {
            kept: 4,
            dropped: 2
        }
    );
    fs::write(&path, "{\"step\":0}\n").unwrap();
    assert_eq!(
        truncate_metrics(&vfs, &path, Some(0)).unwrap(),
        Truncated {
            kept: 1,
            dropped: 0
        }
    );
    assert_eq!(
        truncate_metrics(&vfs, &path, None).unwrap(),
        Truncated {
            kept: 0,
            dropped: 1
        }
    );
}

#[test]
fn every_cut_of_the_log_keeps_exactly_its_whole_lines() {
    let (_temp, lock) = new_run();
    let path = lock.run().metrics_path();
    let whole: String = (1..=4).map(|step| format!("{}\n", line(step, 1))).collect();
    for length in 0..=whole.len() {
        let _ = fs::remove_file(&path);
        fs::write(&path, &whole[..length]).unwrap();
        truncate_metrics(&quick_fs(), &path, Some(9)).unwrap();
        let lines = whole[..length].matches('}').count();
        let expected: String = whole.split_inclusive('\n').take(lines).collect();
        assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    }
}

#[test]
fn a_damaged_line_before_good_ones_is_an_error() {
    let (_temp, lock) = new_run();
    let path = lock.run().metrics_path();
    fs::write(
        &path,
        "{\"step\":1}\n{\"step\":\"2\"}\n{\"step\":3}\n{\"step\":4}\n",
    )
    .unwrap();
    let message = truncate_metrics(&quick_fs(), &path, Some(3))
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("metrics.jsonl line 2 is not a JSON object"),
        "{message}"
    );
    truncate_metrics(&quick_fs(), &path, Some(2)).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
}

#[test]
fn a_line_without_a_step_is_refused() {
    let (_temp, lock) = new_run();
    let vfs = quick_fs();
    let mut log = MetricsLog::open(&vfs, &lock, None).unwrap();
    for bad in [
        json!({"loss": 1.0}),
        json!({"step": 1.5}),
        json!({"step": -1}),
        json!(7),
    ] {
        assert!(
            matches!(log.append(&vfs, &bad), Err(CheckpointError::Json { .. })),
            "{bad}"
        );
    }
    assert_eq!(fs::read(lock.run().metrics_path()).unwrap(), b"");
}

#[test]
fn lines_of_a_saved_step_are_final() {
    let (_temp, lock) = new_run();
    let vfs = quick_fs();
    let mut log = MetricsLog::open(&vfs, &lock, None).unwrap();
    log.append(&vfs, &line(0, 1)).unwrap();
    step_and_save(&vfs, &lock, &mut log, 10, 1).unwrap();
    let message = log.append(&vfs, &line(10, 1)).unwrap_err().to_string();
    assert!(
        message.contains("a line of step 10 comes after the checkpoint of step 10"),
        "{message}"
    );
    log.append(&vfs, &line(11, 1)).unwrap();
    let mut log = MetricsLog::open(&vfs, &lock, Some(10)).unwrap();
    assert!(log.append(&vfs, &line(10, 1)).is_err());
    log.append(&vfs, &line(11, 1)).unwrap();
}

#[test]
fn a_failed_append_leaves_no_torn_line() {
    let (_temp, lock) = new_run();
    let mut log = MetricsLog::open(&quick_fs(), &lock, None).unwrap();
    log.append(&quick_fs(), &line(1, 1)).unwrap();
    let full = FailingFs::new(0, Failure::ShortWrite, false);
    assert!(log.append(&full, &line(2, 1)).is_err());
    log.append(&quick_fs(), &line(2, 1)).unwrap();
    assert_eq!(
        fs::read_to_string(lock.run().metrics_path()).unwrap(),
        format!("{}\n{}\n", line(1, 1), line(2, 1))
    );

    log.append(&FailingFs::new(0, Failure::LyingWrite, false), &line(3, 1))
        .unwrap();
    assert!(matches!(
        log.sync(&quick_fs()),
        Err(CheckpointError::Length { .. })
    ));
    assert!(matches!(
        log.append(&quick_fs(), &line(4, 1)),
        Err(CheckpointError::Length { .. })
    ));
}

// Faults

/// What the training loop does at a save: a line of metrics, then the checkpoint.
fn step_and_save(
    vfs: &dyn Vfs,
    lock: &RunLock,
    log: &mut MetricsLog,
    step: u64,
    version: u32,
) -> Result<PathBuf, CheckpointError> {
    log.append(vfs, &line(step, version))?;
    lock.save(
        vfs,
        log,
        step,
        &borrowed(&files(step, version)),
        &fields(),
        &KEEP_2,
    )
}

/// What a run does at its start: clean up, choose, go back if need be, open the log.
fn resume(
    vfs: &dyn Vfs,
    lock: &RunLock,
) -> Result<(Option<(u64, u32)>, MetricsLog), CheckpointError> {
    lock.remove_stale(vfs)?;
    let resumed = match lock.run().has_checkpoints()? {
        false => None,
        true => {
            let (chosen, _) = lock.run().newest_valid()?;
            lock.rewind_to(vfs, &chosen)?;
            Some(identify(&chosen))
        }
    };
    let log = MetricsLog::open(vfs, lock, resumed.map(|(step, _)| step))?;
    Ok((resumed, log))
}

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
        write_checkpoint(vfs, lock, 30, &borrowed(&files(30, 2)), &fields()).map(drop)
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

    /// What [`RunLock::save`] does, in its parts: the promise begins before the pruning.
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
        write_checkpoint(
            self.vfs,
            self.lock,
            step,
            &borrowed(&files(step, version)),
            &fields(),
        )
        .unwrap();
        let more = if replaces { 0 } else { 1 };
        self.promise(&[new], false, 2.min(before.at_least + more));
        self.lock.prune(self.vfs, &KEEP_2).unwrap();
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
    // The log, the folder, its files, its fsync, its name:
    vfs.calls_left.set(1 + 1 + 2 * 4 + 1 + 1);
    lock.save(
        &vfs,
        &mut log,
        40,
        &borrowed(&files(40, 1)),
        &fields(),
        &KEEP_2,
    )
    .unwrap_err();
    assert_eq!(steps(lock.run()), [40, 30, 20]);
    vfs.calls_left.set(usize::MAX);
    write_checkpoint(&vfs, &lock, 40, &borrowed(&files(40, 1)), &fields()).unwrap();
    recorded.promise(&[Some((40, 1))], false, 2);
    lock.prune(&vfs, &KEEP_2).unwrap();

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
            check(&dir).map_err(|error| format!("half a checkpoint is seen: {error}"))?;
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
