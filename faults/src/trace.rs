//! The system calls of a process, through strace, and how to make one of them fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::rig::{Ended, Process, Rig, installed};

/// What changes files and folders. One list for counting and injecting, since calls are counted by name.
const CALLS: &str = "openat,write,pwrite64,fsync,fdatasync,ftruncate,rename,renameat,renameat2,\
                     mkdir,mkdirat,unlink,unlinkat,rmdir";

/// A call of the main thread on something in the run folder.
#[derive(Debug, Clone)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// It is the `nth` of this name in its thread, from 1.
    pub nth: usize,
    /// The line strace wrote.
    pub line: String,
}

impl Call {
    /// Whether its name is one of these.
    pub fn is(&self, names: &[&str]) -> bool {
        names.contains(&self.name.as_str())
    }

    /// Whether the file was opened to be read.
    pub fn only_reads(&self) -> bool {
        self.name == "openat" && self.line.contains("O_RDONLY")
    }

    /// The paths in quotes or, for calls on open files, the path of the file.
    pub fn paths(&self) -> Vec<PathBuf> {
        let quoted: Vec<_> = self.line.split('"').skip(1).step_by(2).collect();
        if self.is(&["write", "pwrite64", "fsync", "fdatasync", "ftruncate"]) {
            let path = self.line.split(['<', '>']).nth(1);
            path.map(PathBuf::from).into_iter().collect()
        } else {
            quoted.into_iter().map(PathBuf::from).collect()
        }
    }

    /// `rename LATEST.tmp-1-0`, for people.
    pub fn describe(&self) -> String {
        let name = self.paths().first().and_then(|path| {
            let name = path.file_name()?.to_string_lossy().into_owned();
            Some(name)
        });
        format!("{} #{} {}", self.name, self.nth, name.unwrap_or_default())
    }
}

/// How a traced process ended, and what it called.
pub struct Traced {
    pub ended: Ended,
    pub calls: Vec<Call>,
    log: String,
}

impl Traced {
    /// Whether strace reported an injected result, on something in the folder.
    pub fn injected_in(&self, run: &Path) -> bool {
        let run = run.display().to_string();
        let hit = |line: &&str| line.contains("(INJECTED)");
        self.log.lines().filter(hit).any(|line| line.contains(&run))
    }

    /// Whether the process was killed by an injected signal in that very call.
    pub fn killed_in(&self, call: &Call, run: &Path) -> bool {
        let last = self.calls.iter().rfind(|c| c.name == call.name);
        self.log.contains("+++ killed by SIGKILL +++")
            && last.is_some_and(|last| {
                last.nth == call.nth && last.line.contains(&*run.to_string_lossy())
            })
    }
}

/// Why tracing is impossible here.
pub fn unavailable() -> Option<&'static str> {
    (!installed("strace")).then_some("skipped: strace is not installed")
}

/// Trains under strace; `inject` is what stands behind `-e inject=`.
pub fn train(rig: &Rig, run: &Path, args: &[&str], inject: Option<&str>) -> Result<Traced> {
    let log = rig.path("strace.log");
    let mut command = Command::new("strace");
    // Not with --seccomp-bpf, which loses injected signals.
    command.args(["-f", "-q", "-y", "-s", "8", "-e"]);
    command.arg(format!("trace={CALLS}"));
    if let Some(inject) = inject {
        command.args(["-e", &format!("inject={inject}")]);
    }
    command.arg("-o").arg(&log);
    let program = rig.train(run, args);
    command.arg(program.get_program()).args(program.get_args());
    rig.dress(&mut command);
    let ended = Process::start(command)?.wait()?;
    let log = whole_calls(&fs::read_to_string(&log).context("strace left no log")?);
    let calls = calls(&log, run);
    ensure!(!log.is_empty(), "strace traced nothing: {}", ended.err);
    Ok(Traced { ended, calls, log })
}

/// The log with each call on one line, at its beginning: strace cuts those that a call of another thread came into.
fn whole_calls(log: &str) -> String {
    const CUT: &str = " <unfinished ...>";
    let mut lines: Vec<String> = Vec::new();
    let mut begun = std::collections::BTreeMap::new();
    for line in log.lines() {
        let (pid, rest) = line.split_once(' ').unwrap_or_default();
        if let Some(start) = line.strip_suffix(CUT) {
            begun.insert(pid, lines.len());
            lines.push(start.into());
        } else if rest.trim_start().starts_with("<... ")
            && let (Some(at), Some((_, end))) = (begun.remove(pid), rest.split_once(" resumed>"))
        {
            lines[at] += end;
        } else {
            lines.push(line.into());
        }
    }
    lines.join("\n")
}

fn calls(log: &str, run: &Path) -> Vec<Call> {
    let run = run.display().to_string();
    let main = log.split_whitespace().next().unwrap_or_default();
    let mut counts = std::collections::BTreeMap::new();
    let mut calls = Vec::new();
    for line in log.lines() {
        let Some((pid, rest)) = line.split_once(' ') else {
            continue;
        };
        let Some((name, _)) = rest.trim_start().split_once('(') else {
            continue;
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if pid != main || !name.chars().all(is_name) {
            continue; // another thread, or the end of a call that was begun above
        }
        let nth = counts.entry(name.to_string()).or_insert(0);
        *nth += 1;
        if line.contains(&run) {
            calls.push(Call {
                name: name.to_string(),
                nth: *nth,
                line: rest.trim_start().to_string(),
            });
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_another_thread_came_into_is_one_call_with_its_result() {
        let log = "7  openat(AT_FDCWD, \"/run/a\", O_RDONLY) = 3</run/a>\n\
                   7  openat(AT_FDCWD, \"/run/b\", O_WRONLY <unfinished ...>\n\
                   8  openat(AT_FDCWD, \"/run/c\", O_RDONLY <unfinished ...>\n\
                   7  <... openat resumed>) = -1 EIO (Input/output error) (INJECTED)\n\
                   8  <... openat resumed>) = 4</run/c>\n\
                   7  write(3</run/a>, \"\", 1 <unfinished ...>\n\
                   7  +++ killed by SIGKILL +++";
        let whole = whole_calls(log);
        let lines: Vec<&str> = whole.lines().collect();
        assert_eq!(
            lines[1],
            "7  openat(AT_FDCWD, \"/run/b\", O_WRONLY) = -1 EIO (Input/output error) (INJECTED)"
        );
        let found = calls(&whole, Path::new("/run"));
        let found: Vec<_> = found
            .iter()
            .map(|call| (call.name.as_str(), call.nth))
            .collect();
        assert_eq!(found, [("openat", 1), ("openat", 2), ("write", 1)]);
    }
}
