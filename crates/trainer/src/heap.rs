//! Memory that is freed stays with the program, in large pages.
//!
//! A step takes hundreds of megabytes and frees them. By default glibc gives them back to the system, and gets them anew page
//! by page, each of them zeroed: a tenth of a step (docs/benchmarks.md). What it does instead it reads when a program starts, so
//! the program starts itself anew, in the same process.
//!
//! Source: glibc manual, "Memory Allocation Tunables"; Linux, "Transparent Hugepage Support".

/// Where glibc reads it.
pub const VARIABLE: &str = "GLIBC_TUNABLES";

/// Starts the program anew if nothing is said to glibc yet. Where that cannot be, or with another C library, all goes on as it is.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed_memory() {
    use std::env;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    // Large pages; what has 8 MiB or more comes from the system and goes back to it, of the rest 256 MiB may lie idle. A tensor of
    // a real model has more than that, and takes far longer to compute than to get; among smaller ones it would leave holes.
    const TUNABLES: &str = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8388608:glibc.malloc.trim_threshold=268435456";
    if env::var_os(VARIABLE).is_some() {
        return;
    }
    let Ok(program) = env::current_exe() else {
        return;
    };
    let mut command = Command::new(program);
    let mut args = env::args_os();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    let _failed = command.args(args).env(VARIABLE, TUNABLES).exec();
}

/// Other C libraries are left as they are.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed_memory() {}
