use std::fs;

use serde_json::json;

use super::*;
use crate::run::testing::{line, new_run, quick_fs, step_and_save};
use crate::run::vfs::simulate::{FailingFs, Failure};

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
fn a_line_too_long_to_be_ours_is_a_damaged_one() {
    let (_temp, lock) = new_run();
    let path = lock.run().metrics_path();
    let long = format!("{{\"step\":2}}{}", " ".repeat(3 << 20));
    fs::write(&path, format!("{{\"step\":1}}\n{long}\n")).unwrap();
    let cut = truncate_metrics(&quick_fs(), &path, Some(9)).unwrap();
    assert_eq!((cut.kept, cut.dropped), (1, 1));
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
    fs::write(&path, format!("{long}\n{{\"step\":3}}\n")).unwrap();
    let message = truncate_metrics(&quick_fs(), &path, Some(9)).unwrap_err();
    assert!(
        message.to_string().contains("metrics.jsonl line 1 "),
        "{message}"
    );
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
