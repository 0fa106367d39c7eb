use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use super::*;

/// A temporary folder, in memory where there is such a place: the simulations make hundreds of
/// thousands of small files.
pub(crate) fn memory_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// How the chosen call of a [`FailingFs`] goes wrong.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Failure {
    /// Nothing is done and this error number is returned.
    Errno(i32),
    /// A write stores half of its bytes, then the disk is full; any other call is an I/O error.
    ShortWrite,
    /// A write stores half of its bytes and reports success; other calls are left alone.
    LyingWrite,
}

pub(crate) const ENOSPC: i32 = 28;
pub(crate) const EIO: i32 = 5;

/// Fails at call number `at` (from 0), and with `broken_since` at every call from there on.
pub(crate) struct FailingFs {
    pub(crate) at: usize,
    pub(crate) failure: Failure,
    pub(crate) broken_since: bool,
    calls: Cell<usize>,
    fired: Cell<bool>,
}

impl FailingFs {
    pub(crate) fn new(at: usize, failure: Failure, broken_since: bool) -> Self {
        Self {
            at,
            failure,
            broken_since,
            calls: Cell::new(0),
            fired: Cell::new(false),
        }
    }

    /// Calls made so far.
    pub(crate) fn calls(&self) -> usize {
        self.calls.get()
    }

    /// Whether a call was made to fail.
    pub(crate) fn fired(&self) -> bool {
        self.fired.get()
    }

    fn hit(&self, is_write: bool) -> bool {
        let call = self.calls.replace(self.calls.get() + 1);
        let chosen = call == self.at || (self.broken_since && call > self.at);
        let hit = chosen && (is_write || self.failure != Failure::LyingWrite);
        self.fired.set(self.fired.get() || hit);
        hit
    }

    fn pass<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match (self.hit(false), self.failure) {
            (true, Failure::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            (true, _) => Err(io::Error::from_raw_os_error(EIO)),
            (false, _) => call(),
        }
    }

    fn write(&self, bytes: &[u8], call: impl FnOnce(&[u8]) -> io::Result<()>) -> io::Result<()> {
        match (self.hit(true), self.failure) {
            (false, _) => call(bytes),
            (true, Failure::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            (true, Failure::LyingWrite) => call(&bytes[..bytes.len() / 2]),
            (true, Failure::ShortWrite) => {
                call(&bytes[..bytes.len() / 2])?;
                Err(io::Error::from_raw_os_error(ENOSPC))
            }
        }
    }
}

impl Vfs for FailingFs {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.pass(|| RealFs.create_dir(path))
    }
    fn create_file(&self, path: &Path) -> io::Result<File> {
        self.pass(|| RealFs.create_file(path))
    }
    fn append(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()> {
        self.write(bytes, |bytes| RealFs.append(path, file, bytes))
    }
    fn sync_file(&self, _path: &Path, _file: &File) -> io::Result<()> {
        self.pass(|| Ok(()))
    }
    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        self.pass(|| Ok(()))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pass(|| RealFs.rename(from, to))
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.pass(|| RealFs.remove_file(path))
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.pass(|| RealFs.remove_dir(path))
    }
}

/// One recorded call; paths are relative to the root of the recorder.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    CreateDir(PathBuf),
    CreateFile(PathBuf),
    Append(PathBuf, Vec<u8>),
    SyncFile(PathBuf),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    RemoveFile(PathBuf),
    RemoveDir(PathBuf),
}

/// Does what it is told on the real file system, except syncing, and keeps the list of what it
/// was told.
pub(crate) struct Recorder {
    root: PathBuf,
    /// The canary: this sync (from 0, files and folders together) is forgotten.
    forget_sync: Option<usize>,
    syncs: RefCell<Vec<usize>>,
    ops: RefCell<Vec<Op>>,
    /// The process is killed once something got this name: the rest is neither done nor recorded.
    pub(crate) kill_after: RefCell<Option<PathBuf>>,
    killed: Cell<bool>,
}

impl Recorder {
    pub(crate) fn new(root: &Path, forget_sync: Option<usize>) -> Self {
        Self {
            root: root.to_path_buf(),
            forget_sync,
            syncs: RefCell::default(),
            ops: RefCell::default(),
            kill_after: RefCell::default(),
            killed: Cell::new(false),
        }
    }

    pub(crate) fn ops(&self) -> Vec<Op> {
        self.ops.borrow().clone()
    }

    pub(crate) fn len(&self) -> usize {
        self.ops.borrow().len()
    }

    /// For each sync, forgotten ones too, how many calls were recorded before it.
    pub(crate) fn syncs(&self) -> Vec<usize> {
        self.syncs.borrow().clone()
    }

    fn note(&self, op: Op) -> io::Result<()> {
        if self.killed.get() {
            return Err(ErrorKind::Interrupted.into());
        }
        let sync = matches!(op, Op::SyncFile(_) | Op::SyncDir(_));
        let forgotten = sync && self.forget_sync == Some(self.syncs.borrow().len());
        if sync {
            self.syncs.borrow_mut().push(self.len());
        }
        if !forgotten {
            self.ops.borrow_mut().push(op);
        }
        Ok(())
    }

    /// The next process.
    pub(crate) fn revive(&self) {
        self.kill_after.replace(None);
        self.killed.set(false);
    }

    fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().to_path_buf()
    }
}

impl Vfs for Recorder {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.note(Op::CreateDir(self.relative(path)))?;
        RealFs.create_dir(path)
    }
    fn create_file(&self, path: &Path) -> io::Result<File> {
        self.note(Op::CreateFile(self.relative(path)))?;
        RealFs.create_file(path)
    }
    fn append(&self, path: &Path, file: &File, bytes: &[u8]) -> io::Result<()> {
        self.note(Op::Append(self.relative(path), bytes.to_vec()))?;
        RealFs.append(path, file, bytes)
    }
    fn sync_file(&self, path: &Path, _file: &File) -> io::Result<()> {
        self.note(Op::SyncFile(self.relative(path)))
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.note(Op::SyncDir(self.relative(path)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.note(Op::Rename(self.relative(from), self.relative(to)))?;
        RealFs.rename(from, to)?;
        let last = self.kill_after.borrow().as_deref() == Some(&self.relative(to));
        self.killed.set(last);
        Ok(())
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.note(Op::RemoveFile(self.relative(path)))?;
        RealFs.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.note(Op::RemoveDir(self.relative(path)))?;
        RealFs.remove_dir(path)
    }
}

/// What becomes of one effect that was not yet synced.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fate {
    Lost,
    Kept,
    /// Of file content, a part survives, chosen by the number; of a change of names, all or
    /// nothing.
    Torn(u64),
}

/// A file tree: `None` is a folder.
pub(crate) type Tree = BTreeMap<PathBuf, Option<Vec<u8>>>;

/// A disk that promises only what POSIX does, so less than any file system in use.
///
/// File content not followed by a sync of the file may be missing, cut, zeroed or garbage. Each
/// change of names not followed by a sync of the folder is there or not, whatever became of the
/// changes before and after it and of the content of the file. A rename is atomic.
pub(crate) struct Disk {
    nodes: Vec<Node>,
}

#[derive(Default)]
struct Node {
    is_dir: bool,
    content: Vec<u8>,
    synced_content: Vec<u8>,
    names: BTreeMap<String, usize>,
    synced_names: BTreeMap<String, usize>,
    /// Changes of names since the last sync of this folder: old name, new name, which node.
    unsynced: Vec<(Option<String>, Option<String>, usize)>,
}

impl Disk {
    /// The disk after these calls, with everything that is still in memory only.
    pub(crate) fn replay(ops: &[Op]) -> Self {
        let mut disk = Self {
            nodes: vec![Node {
                is_dir: true,
                ..Node::default()
            }],
        };
        for op in ops {
            match op {
                Op::CreateDir(path) => disk.create(path, true),
                Op::CreateFile(path) => disk.create(path, false),
                Op::Append(path, bytes) => disk.node(path).content.extend(bytes),
                Op::SyncFile(path) => {
                    let node = disk.node(path);
                    node.synced_content = node.content.clone();
                }
                Op::SyncDir(path) => {
                    let node = disk.node(path);
                    node.synced_names = node.names.clone();
                    node.unsynced.clear();
                }
                Op::Rename(from, to) => {
                    assert_eq!(from.parent(), to.parent(), "renames stay in one folder");
                    disk.change(
                        from.parent().unwrap(),
                        Some(name(from)),
                        Some(name(to)),
                        None,
                    );
                }
                Op::RemoveFile(path) | Op::RemoveDir(path) => {
                    disk.change(path.parent().unwrap(), Some(name(path)), None, None);
                }
            }
        }
        disk
    }

    fn node(&mut self, path: &Path) -> &mut Node {
        let mut at = 0;
        for part in path {
            at = self.nodes[at].names[part.to_str().unwrap()];
        }
        &mut self.nodes[at]
    }

    fn create(&mut self, path: &Path, is_dir: bool) {
        let new = self.nodes.len();
        self.nodes.push(Node {
            is_dir,
            ..Node::default()
        });
        self.change(path.parent().unwrap(), None, Some(name(path)), Some(new));
    }

    fn change(&mut self, dir: &Path, from: Option<String>, to: Option<String>, new: Option<usize>) {
        let dir = self.node(dir);
        let node = new.unwrap_or_else(|| dir.names[from.as_ref().unwrap()]);
        apply(&mut dir.names, from.as_ref(), to.as_ref(), node);
        dir.unsynced.push((from, to, node));
    }

    /// How many effects are not synced; [`Disk::crash`] asks for the fate of each.
    pub(crate) fn unsynced(&self) -> usize {
        self.nodes
            .iter()
            .map(|node| node.unsynced.len())
            .sum::<usize>()
            + self
                .nodes
                .iter()
                .filter(|node| node.content != node.synced_content)
                .count()
    }

    /// What is found after the power is back.
    pub(crate) fn crash(&self, fate: impl Fn(usize) -> Fate) -> Tree {
        let mut effect = 0;
        let mut next = || {
            effect += 1;
            fate(effect - 1)
        };
        let mut names = Vec::new();
        for node in &self.nodes {
            let mut survived = node.synced_names.clone();
            for (from, to, target) in &node.unsynced {
                let kept = match next() {
                    Fate::Lost => false,
                    Fate::Kept => true,
                    Fate::Torn(seed) => seed % 2 == 0,
                };
                if kept {
                    apply(&mut survived, from.as_ref(), to.as_ref(), *target);
                }
            }
            names.push(survived);
        }
        let mut contents = Vec::new();
        for node in &self.nodes {
            contents.push(match node.content == node.synced_content {
                true => node.content.clone(),
                false => match next() {
                    Fate::Lost => node.synced_content.clone(),
                    Fate::Kept => node.content.clone(),
                    Fate::Torn(seed) => tear(node, seed),
                },
            });
        }

        let mut tree = Tree::new();
        let mut folders = vec![(0, PathBuf::new())];
        while let Some((folder, path)) = folders.pop() {
            for (name, &node) in &names[folder] {
                let path = path.join(name);
                let content = (!self.nodes[node].is_dir).then(|| contents[node].clone());
                if content.is_none() {
                    folders.push((node, path.clone()));
                }
                tree.insert(path, content);
            }
        }
        tree
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_string()
}

fn apply(
    names: &mut BTreeMap<String, usize>,
    from: Option<&String>,
    to: Option<&String>,
    node: usize,
) {
    if let Some(from) = from
        && names.get(from) == Some(&node)
    {
        names.remove(from);
    }
    if let Some(to) = to {
        names.retain(|_, other| *other != node);
        names.insert(to.clone(), node);
    }
}

/// The part of the unsynced tail that `seed` chooses: cut short, zeroed, cut and zeroed, or
/// garbage.
fn tear(node: &Node, seed: u64) -> Vec<u8> {
    let synced = node.synced_content.len();
    let unsynced = node.content.len() - synced;
    let cut = synced + (seed / 4) as usize % unsynced;
    let mut torn = node.content.clone();
    match seed % 4 {
        0 => torn.truncate(cut),
        1 => torn[synced..].fill(0),
        2 => torn[cut..].fill(0),
        _ => torn[cut..].iter_mut().for_each(|byte| *byte ^= 0x5a),
    }
    torn
}

/// The tree on the real file system, changed from one state to the next by their difference
/// alone.
pub(crate) struct Stage {
    root: PathBuf,
    now: Tree,
}

impl Stage {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
            now: Tree::new(),
        }
    }

    pub(crate) fn show(&mut self, tree: Tree) {
        // A changed file is made anew: ext4 would flush one that is cut and rewritten,
        // thousands of times.
        for (path, content) in self.now.iter().rev() {
            match content {
                _ if tree.get(path) == Some(content) => {}
                Some(_) => fs::remove_file(self.root.join(path)).unwrap(),
                None => fs::remove_dir(self.root.join(path)).unwrap(),
            }
        }
        for (path, content) in &tree {
            match content {
                _ if self.now.get(path) == Some(content) => {}
                Some(bytes) => fs::write(self.root.join(path), bytes).unwrap(),
                None => fs::create_dir(self.root.join(path)).unwrap(),
            }
        }
        self.now = tree;
    }
}

/// A small repeatable stream of numbers (splitmix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[test]
fn unsynced_content_and_names_may_be_lost() {
    let file = PathBuf::from("a");
    let ops = [
        Op::CreateFile(file.clone()),
        Op::Append(file.clone(), b"abcd".to_vec()),
    ];
    let disk = Disk::replay(&ops);
    assert_eq!(disk.unsynced(), 2); // the name, the content
    assert_eq!(disk.crash(|_| Fate::Lost), Tree::new());
    assert_eq!(
        disk.crash(|_| Fate::Kept),
        Tree::from([(file.clone(), Some(b"abcd".to_vec()))])
    );
    let name_only = disk.crash(|effect| if effect == 0 { Fate::Kept } else { Fate::Lost });
    assert_eq!(name_only, Tree::from([(file, Some(vec![]))]));
}

#[test]
fn synced_content_under_a_synced_name_is_never_lost() {
    let (a, b) = (PathBuf::from("a"), PathBuf::from("b"));
    let ops = [
        Op::CreateFile(a.clone()),
        Op::Append(a.clone(), b"abcd".to_vec()),
        Op::SyncFile(a.clone()),
        Op::Rename(a, b.clone()),
        Op::SyncDir(PathBuf::new()),
    ];
    let disk = Disk::replay(&ops);
    assert_eq!(disk.unsynced(), 0);
    assert_eq!(
        disk.crash(|_| Fate::Lost),
        Tree::from([(b, Some(b"abcd".to_vec()))])
    );
}
