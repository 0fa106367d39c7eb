//! How the program has glibc keep memory.

use std::fs;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use flux_lora_tests::Workbench;

/// `GLIBC_TUNABLES` of a run once it has made its folder.
fn tunables(set: Option<&str>) -> String {
    let bench = Workbench::new();
    let mut command = bench.train_command("run", "flex", &[]);
    command.env_remove("GLIBC_TUNABLES").stderr(Stdio::null());
    command.envs(set.map(|set| ("GLIBC_TUNABLES", set)));
    let mut run = command.stdout(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !bench.path("run").is_dir() {
        assert!(started.elapsed() < Duration::from_secs(60), "no run folder");
        sleep(Duration::from_millis(5));
    }
    let environ = fs::read(format!("/proc/{}/environ", run.id())).unwrap();
    run.kill().unwrap();
    run.wait().unwrap();
    // glibc cuts its variable into pieces where it lies
    String::from_utf8_lossy(&environ).replace('\0', ":")
}

#[test]
fn freed_memory_stays_with_the_program_unless_glibc_is_told_something_else() {
    let kept = tunables(None);
    for part in ["glibc.malloc.hugetlb=1", "glibc.malloc.trim_threshold="] {
        assert!(kept.contains(part), "{kept}");
    }
    let own = tunables(Some("glibc.malloc.arena_max=4"));
    assert!(
        own.contains("arena_max=4") && !own.contains("hugetlb"),
        "{own}"
    );
}
