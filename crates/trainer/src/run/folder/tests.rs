use std::process::{Child, Command, Stdio};

use super::*;
use crate::run::testing::{
    KEEP_2, damage, new_run, newest, poke, quick_fs, run_with, steps, write,
};
use crate::run::vfs::simulate::{EIO, FailingFs, Failure};

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
fn a_folder_that_holds_something_else_is_no_run_folder() {
    let dir = tempfile::tempdir().unwrap();
    let opens = |name: &str, holds: &[&str]| {
        let path = dir.path().join(name);
        for file in holds {
            let file = path.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, b"x").unwrap();
        }
        RunDir::open_or_create(&path).map(drop)
    };
    let refused = opens("mine", &["lora.safetensors", "b.txt"]).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("mine is not a run folder, but holds b.txt,"),
        "{refused}"
    );
    for holds in [
        "ckpt-best/x",
        "ckpt-0000000010.zip",
        "metrics.jsonl",
        "cache/x",
        "x/run.lock",
    ] {
        opens(&holds.replace('/', "-"), &[holds]).unwrap_err();
    }
    for (name, holds) in [
        ("hidden", &[".DS_Store", "lost+found/x"][..]),
        ("stopped", &["run.lock", "notes.txt"]),
        (
            "copied",
            &["ckpt-0000000010/MANIFEST.json", "metrics.jsonl"],
        ),
        ("aside", &["ckpt-0000000010.aside-1-0/MANIFEST.json"]),
        ("encoded", &["cache/digests.json"]),
    ] {
        opens(name, holds).unwrap();
    }
}

#[test]
fn a_place_that_is_taken_is_found_before_the_work() {
    for (name, is_folder) in [
        ("cache", false),
        ("samples", false),
        ("lora-peft", false),
        ("lora.safetensors", true),
        ("config.toml", true),
    ] {
        let (_temp, lock) = new_run();
        lock.run().check_places().unwrap();
        let path = lock.run().path().join(name);
        match is_folder {
            true => fs::create_dir(&path).unwrap(),
            false => fs::write(&path, b"").unwrap(),
        }
        let error = lock.run().check_places().unwrap_err().to_string();
        assert!(error.contains(&format!("/{name} is not a f")), "{error}");
    }
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
fn a_lock_that_is_let_go_in_a_moment_is_waited_for() {
    let (_temp, lock) = new_run();
    let run = lock.run().clone();
    let dying = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(lock);
    });
    run.lock().unwrap();
    dying.join().unwrap();
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

#[test]
fn a_start_that_is_refused_leaves_the_lock_file_as_it_was() {
    let (_temp, lock) = new_run();
    let run = lock.run().clone();
    drop(lock);
    let path = run.path().join(LOCK);
    fs::write(&path, "4711\n").unwrap();
    drop(run.lock().unwrap());
    assert_eq!(fs::read_to_string(&path).unwrap(), "4711\n");
    run.lock().unwrap().begin(&quick_fs()).unwrap();
    let own = format!("{}\n", std::process::id());
    assert_eq!(fs::read_to_string(&path).unwrap(), own);
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
    lock.prune(&quick_fs(), KEEP_2).unwrap();
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
    lock.begin(&quick_fs()).unwrap();
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
        lock.prune(&quick_fs(), keep).unwrap();
        assert_eq!(steps(lock.run()), left);
        assert!(lock.run().scan().unwrap().stale.is_empty());
    }
}

#[test]
fn damaged_checkpoints_do_not_count() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40, 50]);
    damage(&lock, 50);
    damage(&lock, 30);
    lock.prune(&quick_fs(), KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [50, 40, 30, 20]);
    assert_eq!(newest(lock.run()).0, (40, 1));
    damage(&lock, 40);
    damage(&lock, 20);
    lock.prune(&quick_fs(), KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [50, 40, 30, 20]); // nothing whole is left: nothing goes
}

#[test]
fn what_latest_names_stays() {
    let (_temp, lock) = run_with(&[10, 20, 30, 40]);
    let ten = lock.run().path().join("ckpt-0000000010");
    let sha256 = verify(&ten).unwrap().manifest_sha256;
    lock.run().write_latest(&quick_fs(), &ten, &sha256).unwrap();
    lock.prune(&quick_fs(), KEEP_2).unwrap();
    assert_eq!(steps(lock.run()), [40, 30, 10]);
}
