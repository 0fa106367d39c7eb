//! Tensors that are read when they are needed.
//!
//! A LoRA of two gigabytes is converted with a few megabytes in memory: a set of modules holds [`TensorRef`]s, and only
//! the tensor being written is ever loaded. Splitting a fused module, exchanging the halves of the final layer and
//! padding an input are selections on the reference, not copies.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use lora_core::files::host::{Dtype, HostTensor};
use lora_core::files::safetensors::TensorFile;

use super::error::{KeyProblem, LoraFormatError};
use super::rows::Rows;

/// A tensor somewhere else: where it is, and which of its rows and columns are meant.
#[derive(Clone)]
pub struct TensorRef {
    source: Source,
    /// Shape of all of the source.
    full: Vec<usize>,
    /// Rows of the source, in order.
    rows: Rows,
    columns: Columns,
}

#[derive(Clone)]
enum Source {
    File(Arc<TensorFile>, Arc<str>),
    Host(Arc<HostTensor>, Arc<str>),
    Computed(Arc<Computed>),
}

struct Computed {
    name: String,
    dtype: Dtype,
    compute: Compute,
}

type Compute = Box<dyn Fn() -> Result<HostTensor, LoraFormatError> + Send + Sync>;

#[derive(Clone, PartialEq)]
enum Columns {
    All,
    Pick(Vec<usize>),
    /// Zeros on the right, up to this width.
    Pad(usize),
}

impl TensorRef {
    /// A tensor of a file, without its trailing axes of length 1 (1x1 convolutions are linear layers).
    ///
    /// # Errors
    /// If there is no such tensor, or it is not floating point.
    pub fn in_file(file: &Arc<TensorFile>, key: &str) -> Result<Self, LoraFormatError> {
        let problem = |problem| LoraFormatError::key(file.path(), key, problem);
        let Some(info) = file.info(key) else {
            return Err(file.read(key).err().map_or_else(
                || problem(KeyProblem::Matrix { found: Vec::new() }),
                LoraFormatError::from,
            ));
        };
        if !info.dtype.is_float() {
            return Err(problem(KeyProblem::Dtype { dtype: info.dtype }));
        }
        let mut shape = info.shape.clone();
        while shape.len() > 2 && shape.last() == Some(&1) {
            shape.pop();
        }
        Ok(Self::whole(Source::File(file.clone(), key.into()), shape))
    }

    /// A tensor in memory; `name` stands for its key in messages.
    pub fn host(name: &str, tensor: HostTensor) -> Self {
        let shape = tensor.shape.clone();
        Self::whole(Source::Host(Arc::new(tensor), name.into()), shape)
    }

    /// A tensor that is computed on every load; `dtype` is what to store it as.
    pub(super) fn computed(
        name: String,
        shape: Vec<usize>,
        dtype: Dtype,
        compute: impl Fn() -> Result<HostTensor, LoraFormatError> + Send + Sync + 'static,
    ) -> Self {
        let compute = Box::new(compute);
        let computed = Computed {
            name,
            dtype,
            compute,
        };
        Self::whole(Source::Computed(Arc::new(computed)), shape)
    }

    fn whole(source: Source, full: Vec<usize>) -> Self {
        let count = full.first().copied().unwrap_or(1);
        Self {
            source,
            full,
            rows: Rows::all(count),
            columns: Columns::All,
        }
    }

    /// Key of the tensor, or what it was computed for.
    pub fn key(&self) -> &str {
        match &self.source {
            Source::File(_, key) | Source::Host(_, key) => key,
            Source::Computed(computed) => &computed.name,
        }
    }

    /// The file the tensor is in, or a stand-in for tensors in memory.
    pub fn path(&self) -> PathBuf {
        match &self.source {
            Source::File(file, _) => file.path().into(),
            Source::Host(..) | Source::Computed(_) => "memory".into(),
        }
    }

    /// Element type to store the tensor as if nothing else is asked for.
    pub fn dtype(&self) -> Dtype {
        match &self.source {
            // Opening has checked that the tensor exists.
            Source::File(file, key) => file.info(key).map_or(Dtype::F32, |info| info.dtype),
            Source::Host(tensor, _) => tensor.dtype,
            Source::Computed(computed) => computed.dtype,
        }
    }

    /// Shape after selection.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = self.full.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = self.rows.count();
        }
        match (&self.columns, shape.get_mut(1)) {
            (Columns::Pick(picked), Some(columns)) => *columns = picked.len(),
            (Columns::Pad(width), Some(columns)) => *columns = *width,
            _ => {}
        }
        shape
    }

    /// Rows and columns of a matrix; a vector is one column.
    pub(super) fn size(&self) -> (usize, usize) {
        let shape = self.shape();
        let rows = shape.first().copied().unwrap_or(1);
        (rows, shape.get(1).copied().unwrap_or(1))
    }

    /// As [`size`](Self::size), for sides of a Kronecker product.
    pub(super) fn axes(&self) -> [usize; 2] {
        self.size().into()
    }

    /// The same elements as a vector.
    pub(super) fn flat(mut self) -> Self {
        let count = self.full.iter().product();
        self.full = vec![count];
        self.rows = Rows::all(count);
        self
    }

    /// Some of the rows, in the given order.
    pub(super) fn select(&self, wanted: &Rows) -> Self {
        Self {
            rows: self.rows.select(wanted),
            ..self.clone()
        }
    }

    /// Some of the columns of a matrix.
    pub(super) fn pick_columns(&self, picked: &[usize]) -> Self {
        let picked = match &self.columns {
            Columns::Pick(earlier) => picked.iter().map(|&i| earlier[i]).collect(),
            _ => picked.to_vec(),
        };
        Self {
            columns: Columns::Pick(picked),
            ..self.clone()
        }
    }

    /// Zeros on the right of a whole matrix, up to `width` columns.
    pub(super) fn pad_columns(&self, width: usize) -> Self {
        Self {
            columns: Columns::Pad(width),
            ..self.clone()
        }
    }

    /// Whether both are the same selection of the same stored tensor.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.same_source(other) && self.rows == other.rows && self.columns == other.columns
    }

    fn same_source(&self, other: &Self) -> bool {
        let same = match (&self.source, &other.source) {
            (Source::File(a, key_a), Source::File(b, key_b)) => Arc::ptr_eq(a, b) && key_a == key_b,
            (Source::Host(a, _), Source::Host(b, _)) => Arc::ptr_eq(a, b),
            (Source::Computed(a), Source::Computed(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        same && self.full == other.full
    }

    /// The parts below each other, if all are rows of one stored tensor.
    pub(super) fn stacked(parts: &[&Self]) -> Option<Self> {
        let (first, rest) = parts.split_first()?;
        let alike = |other: &&Self| first.same_source(other) && first.columns == other.columns;
        let rows = parts.iter().map(|part| &part.rows);
        rest.iter().all(alike).then(|| Self {
            rows: Rows::stacked(rows),
            ..(*first).clone()
        })
    }

    /// Reads the tensor.
    ///
    /// # Errors
    /// If the file has changed or a value is not finite.
    pub fn load(&self) -> Result<HostTensor, LoraFormatError> {
        let mut tensor = match &self.source {
            Source::File(file, key) => self.read(file, key)?,
            Source::Host(tensor, _) => self.rows_of(HostTensor::clone(tensor)),
            Source::Computed(computed) => self.rows_of((computed.compute)()?),
        };
        if let Some(index) = tensor.first_non_finite() {
            let problem = KeyProblem::NotFinite { index };
            return Err(LoraFormatError::key(&self.path(), self.key(), problem));
        }
        match &self.columns {
            Columns::All => {}
            Columns::Pick(picked) => tensor = picked_columns(&tensor, picked),
            Columns::Pad(width) => tensor = padded_columns(&tensor, *width),
        }
        Ok(tensor)
    }

    /// Reads the tensor as `f32`.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_f32(&self) -> Result<Vec<f32>, LoraFormatError> {
        self.load().map(|tensor| tensor.to_f32())
    }

    fn read(&self, file: &TensorFile, key: &str) -> Result<HostTensor, LoraFormatError> {
        let stored = file.info(key).and_then(|info| info.shape.first().copied());
        if stored != self.full.first().copied() || self.rows.ranges().len() > 64 {
            return Ok(self.rows_of(file.read(key)?)); // flattened, or too many pieces to read one by one
        }
        let mut parts = self
            .rows
            .ranges()
            .iter()
            .map(|rows| file.read_rows(key, rows.clone()));
        let mut tensor = match parts.next() {
            Some(first) => first?,
            None => file.read_rows(key, 0..0)?,
        };
        for part in parts {
            tensor.bytes.extend(part?.bytes);
        }
        tensor.shape = self.full.clone();
        tensor.shape[0] = self.rows.count();
        Ok(tensor)
    }

    /// The selected rows of the whole tensor.
    fn rows_of(&self, mut tensor: HostTensor) -> HostTensor {
        tensor.shape.clone_from(&self.full);
        let [rows] = self.rows.ranges() else {
            let mut selected = HostTensor {
                dtype: tensor.dtype,
                shape: self.full.clone(),
                bytes: Vec::new(),
            };
            selected.shape[0] = self.rows.count();
            for rows in self.rows.ranges() {
                selected.bytes.extend(tensor.rows(rows.clone()).bytes);
            }
            return selected;
        };
        if self.full.first().is_none_or(|&count| *rows == (0..count)) {
            return tensor;
        }
        tensor.rows(rows.clone())
    }
}

impl fmt::Debug for TensorRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", self.key(), self.dtype(), self.shape())
    }
}

fn picked_columns(tensor: &HostTensor, picked: &[usize]) -> HostTensor {
    let (size, rows) = (tensor.dtype.size(), tensor.shape[0]);
    let stride = tensor.shape[1] * size;
    let mut bytes = Vec::with_capacity(rows * picked.len() * size);
    for row in 0..rows {
        for &column in picked {
            let at = row * stride + column * size;
            bytes.extend_from_slice(&tensor.bytes[at..at + size]);
        }
    }
    HostTensor {
        dtype: tensor.dtype,
        shape: vec![rows, picked.len()],
        bytes,
    }
}

fn padded_columns(tensor: &HostTensor, width: usize) -> HostTensor {
    let (size, rows) = (tensor.dtype.size(), tensor.shape[0]);
    let mut bytes = Vec::with_capacity(rows * width * size);
    for row in tensor.bytes.chunks_exact((tensor.shape[1] * size).max(1)) {
        bytes.extend_from_slice(row);
        bytes.resize(bytes.len() + width * size - row.len(), 0);
    }
    HostTensor {
        dtype: tensor.dtype,
        shape: vec![rows, width],
        bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting(rows: usize, columns: usize) -> TensorRef {
        let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        TensorRef::host("t", HostTensor::from_f32([rows, columns], &values))
    }

    #[test]
    fn exchanging_halves_twice_is_the_tensor_itself() {
        let tensor = counting(4, 2);
        let swap = Rows::exchanged_halves(4);
        let swapped = tensor.select(&swap);
        let values = swapped.load_f32().expect("in memory");
        assert_eq!(values, [4.0, 5.0, 6.0, 7.0, 0.0, 1.0, 2.0, 3.0]);
        let twice = swapped.select(&swap);
        assert!(twice.is_same(&tensor));
    }

    #[test]
    fn parts_of_one_tensor_stack_to_it() {
        let tensor = counting(6, 2);
        let parts = [
            tensor.select(&Rows::span(0..2)),
            tensor.select(&Rows::span(2..6)),
        ];
        let stacked = TensorRef::stacked(&[&parts[0], &parts[1]]).expect("one source");
        assert!(stacked.is_same(&tensor));
        assert!(TensorRef::stacked(&[&parts[0], &counting(6, 2)]).is_none());
    }

    #[test]
    fn columns_are_picked_and_padded() {
        let tensor = counting(2, 3);
        let picked = tensor.pick_columns(&[2, 0]).load_f32().expect("in memory");
        assert_eq!(picked, [2.0, 0.0, 5.0, 3.0]);
        let padded = tensor.pad_columns(4).load_f32().expect("in memory");
        assert_eq!(padded, [0.0, 1.0, 2.0, 0.0, 3.0, 4.0, 5.0, 0.0]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_named() {
        let tensor = TensorRef::host("a.b", HostTensor::from_f32([2], &[0.0, f32::NAN]));
        assert_eq!(
            tensor.load().expect_err("NaN").to_string(),
            "`memory`: `a.b` holds a value that is not finite at element 1"
        );
    }
}
