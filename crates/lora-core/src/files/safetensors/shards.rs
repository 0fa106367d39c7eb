//! Several files read as one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use serde::de::MapAccess;

use crate::files::host::HostTensor;
use crate::files::strict_json::{Object, Skipped, Unique};

use super::check::{TensorInfo, foreign_format};
use super::error::{FileError, TensorProblem};
use super::header::{is_valid_name, parse_json};
use super::read::{TensorFile, open_regular};

/// Largest shard index read, in bytes; real ones stay below one MiB.
pub(super) const MAX_INDEX: u64 = 64 << 20;

/// Several safetensors files read as one: a single file, or the shards an index names.
#[derive(Debug)]
pub struct TensorSet {
    path: PathBuf,
    /// Never empty.
    files: Vec<TensorFile>,
    /// Tensor name to index in `files`.
    owners: BTreeMap<String, usize>,
}

impl TensorSet {
    /// Opens a `.safetensors` file, or every shard of a `.safetensors.index.json`.
    ///
    /// Shards must lie in the folder of the index, or, where the index is a symbolic link, in the folder of its target:
    /// that is how the Hugging Face cache stores a checkpoint.
    ///
    /// # Errors
    /// As [`TensorFile::open`], and if index and shards do not agree on where each tensor is.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            Self::open_index(path)
        } else {
            TensorFile::open(path).map(Self::from_file)
        }
    }

    /// A set of one file.
    pub fn from_file(file: TensorFile) -> Self {
        Self {
            path: file.path().into(),
            owners: file.names().map(|name| (name.into(), 0)).collect(),
            files: vec![file],
        }
    }

    fn open_index(path: &Path) -> Result<Self, FileError> {
        let Index { weight_map } = parse_json(path, "shard index", &read_index(path)?)?;
        if weight_map.is_empty() {
            return Err(FileError::EmptyIndex { path: path.into() });
        }
        let shards = Vec::from_iter(weight_map.values().collect::<BTreeSet<_>>());
        let mut files = Vec::new();
        let mut owners = BTreeMap::new();
        for (i, &shard) in shards.iter().enumerate() {
            let file = TensorFile::open(&shard_path(path, shard)?)?;
            for name in file.names() {
                let shard = shard.clone();
                if !weight_map.contains_key(name) {
                    let problem = TensorProblem::NotInIndex { shard };
                    return Err(FileError::tensor(path, name, problem));
                }
                if let Some(first) = owners.insert(name.to_owned(), i) {
                    let (first, second) = (shards[first].clone(), shard);
                    let problem = TensorProblem::TwoShards { first, second };
                    return Err(FileError::tensor(path, name, problem));
                }
            }
            files.push(file);
        }
        for (name, shard) in &weight_map {
            if owners.get(name).is_none_or(|&i| shards[i] != shard) {
                let shard = shard.clone();
                let problem = TensorProblem::NotInShard { shard };
                return Err(FileError::tensor(path, name, problem));
            }
        }
        Ok(Self {
            path: path.into(),
            files,
            owners,
        })
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.owners.keys().map(String::as_str)
    }

    /// Dtype and shape of a tensor, without reading it.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.files[*self.owners.get(name)?].info(name)
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub fn read(&self, name: &str) -> Result<HostTensor, FileError> {
        self.owner(name)?.read(name)
    }

    /// Reads a slice of a tensor's outermost axis, and only that from disk.
    ///
    /// # Errors
    /// As [`TensorFile::read_rows`].
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor, FileError> {
        self.owner(name)?.read_rows(name, rows)
    }

    /// The elements of a tensor, or of a slice of its outermost axis, where the system's cache has the file, if they can be had so.
    ///
    /// # Errors
    /// As [`TensorFile::map`].
    pub fn map(&self, name: &str, rows: Option<Range<usize>>) -> Result<Option<Bytes>, FileError> {
        self.owner(name)?.map(name, rows)
    }

    /// The path given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata of the first file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.files[0].metadata()
    }

    /// The files, in the order of their names; at least one.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    fn owner(&self, name: &str) -> Result<&TensorFile, FileError> {
        let owner = self.owners.get(name).map(|&i| &self.files[i]);
        owner.ok_or_else(|| FileError::tensor(&self.path, name, TensorProblem::Missing))
    }
}

/// A shard index; its `metadata` is not used.
#[derive(Default)]
struct Index {
    /// Tensor name to shard.
    weight_map: BTreeMap<String, String>,
}

impl Object for Index {
    const REQUIRED: &[&str] = &["weight_map"];

    fn read<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "weight_map" => self.weight_map = map.next_value::<Unique<_>>()?.0,
            _ => Skipped = map.next_value()?,
        }
        Ok(())
    }
}

fn read_index(path: &Path) -> Result<Vec<u8>, FileError> {
    let (file, bytes) = open_regular(path)?;
    if bytes > MAX_INDEX {
        return Err(FileError::TooLarge {
            path: path.into(),
            part: "shard index",
            bytes,
            limit: MAX_INDEX,
        });
    }
    let mut json = Vec::new();
    let outcome = file.take(MAX_INDEX).read_to_end(&mut json);
    outcome.map_err(FileError::read(path))?;
    match foreign_format(&json[..json.len().min(64)]) {
        Some(found) => Err(FileError::NotSafetensors {
            path: path.into(),
            found,
        }),
        None => Ok(json),
    }
}

/// Where a shard of this index is, if that is a place the index may name.
fn shard_path(index: &Path, shard: &str) -> Result<PathBuf, FileError> {
    let outside = || FileError::ShardOutside {
        path: index.into(),
        shard: shard.into(),
    };
    let descends = Path::new(shard)
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if !is_valid_name(shard) || shard.contains('\\') || !descends {
        return Err(outside());
    }
    let path = index.with_file_name(shard);
    let real_path = match path.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(FileError::NoShard {
                path: index.into(),
                shard: shard.into(),
            });
        }
        outcome => outcome.map_err(FileError::read(&path))?,
    };
    let folder = index.with_file_name(".").canonicalize();
    let target = index.canonicalize().map(|index| index.with_file_name(""));
    for folder in [folder, target] {
        if real_path.starts_with(folder.map_err(FileError::read(index))?) {
            return Ok(path);
        }
    }
    Err(outside())
}
