//! A file that is replaced whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Writes a file beside its place, makes it durable, then renames it.
///
/// Whatever happens, `path` holds all of the old or all of the new; a process that is killed leaves `NAME.tmp-PID` at most.
///
/// # Errors
/// What `write` returns, or the file system, also where it stored less than it said; what was there before stays.
pub fn replace_file<E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> Result<(), E>,
) -> Result<(), E> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp-{}", std::process::id()));
    let beside = path.with_file_name(name);
    let written = (|| {
        let mut out = Counted {
            file: File::create(&beside)?,
            bytes: 0,
        };
        write(&mut out)?;
        out.file.sync_all()?;
        let stored = out.file.metadata()?.len();
        if stored != out.bytes {
            let problem = format!("{} bytes were written, but {stored} are there", out.bytes);
            return Err(io::Error::other(problem).into());
        }
        Ok(fs::rename(&beside, path)?)
    })();
    if let Err(error) = written {
        let _ = fs::remove_file(&beside); // the reason it failed matters more
        return Err(error);
    }
    Ok(sync_folder(path)?)
}

/// A file, and how many bytes it says it took.
struct Counted {
    file: File,
    bytes: u64,
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.file.write(bytes)?;
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Makes the name of a file survive a power loss.
#[cfg(unix)]
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// Windows has no such call; NTFS journals names in order.
#[cfg(not(unix))]
fn sync_folder(_path: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let path = folder.path().join("a");
        let replace = |text: &str, fails: bool| {
            replace_file(&path, |file| {
                file.write_all(text.as_bytes())?;
                assert_eq!(
                    fs::read_dir(&folder).expect("a folder").count(),
                    if fails { 2 } else { 1 }
                );
                match fails {
                    true => Err(io::Error::other("full")),
                    false => Ok(()),
                }
            })
        };
        replace("old", false).expect("a writable folder");
        assert_eq!(replace("new", true).expect_err("full").to_string(), "full");
        assert_eq!(fs::read(&path).expect("the old file"), b"old");
        assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 1);
    }
}
