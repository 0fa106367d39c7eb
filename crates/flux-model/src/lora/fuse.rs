//! Updates of the parts of a fused module as one update of the whole.
//!
//! Parts that came from one fused module select rows of the same tensors, and these are put back as they were. Parts with
//! equal down projections are stacked. Anything else of low rank becomes block-diagonal: the down projections below each
//! other, each up projection in its own rows and columns, the rank the sum of the ranks.

use lora_core::files::host::{Dtype, HostTensor};
use lora_core::kinds::parts::{DIFF, Kind};

use super::error::LoraFormatError;
use super::lycoris::to_low_rank;
use super::rows::Rows;
use super::split::is_cut;
use super::tensor::TensorRef;
use super::{Axis, Bias, Factors, Magnitude, ModuleUpdate};

/// Why parts have no fused form; becomes part of a message.
pub(super) type Obstacle = &'static str;

/// A tensor at a place in a larger one.
pub(super) struct Piece {
    pub row: usize,
    pub column: usize,
    pub scale: f64,
    pub tensor: TensorRef,
}

/// The pieces in a tensor of zeros.
pub(super) fn assemble(shape: Vec<usize>, mut pieces: Vec<Piece>) -> TensorRef {
    if let [
        Piece {
            scale: 1.0, tensor, ..
        },
    ] = pieces.as_slice()
        && tensor.shape() == shape
    {
        return tensor.clone();
    }
    pieces.retain(|piece| piece.tensor.size().0 > 0);
    let dtype = match pieces.split_first() {
        Some((first, rest))
            if rest
                .iter()
                .all(|piece| piece.tensor.dtype() == first.tensor.dtype()) =>
        {
            first.tensor.dtype()
        }
        _ => Dtype::F32,
    };
    let name = pieces
        .first()
        .map_or_else(String::new, |piece| piece.tensor.key().into());
    let exact = dtype != Dtype::F64 && pieces.iter().all(|piece| piece.scale == 1.0);
    let work = if exact { dtype } else { Dtype::F32 };
    TensorRef::computed(name, shape.clone(), dtype, move || {
        let mut whole = HostTensor {
            dtype: work,
            bytes: vec![0; shape.iter().product::<usize>() * work.size()],
            shape: shape.clone(),
        };
        pieces.iter().try_for_each(|piece| piece.put(&mut whole))?;
        Ok(whole)
    })
}

impl Piece {
    fn put(&self, whole: &mut HostTensor) -> Result<(), LoraFormatError> {
        let mut part = self.tensor.load()?.cast(whole.dtype);
        if self.scale != 1.0 {
            let scaled: Vec<f32> = part
                .to_f32()
                .iter()
                .map(|x| (f64::from(*x) * self.scale) as f32)
                .collect();
            part = HostTensor::from_f32(part.shape, &scaled);
        }
        let size = whole.dtype.size();
        let (stride, width) = match (whole.shape.as_slice(), part.shape.as_slice()) {
            ([_, columns], [_, part]) => (columns * size, part * size),
            _ => (size, size),
        };
        for (i, row) in part.bytes.chunks_exact(width.max(1)).enumerate() {
            let at = (self.row + i) * stride + self.column * size;
            whole.bytes[at..at + width].copy_from_slice(row);
        }
        Ok(())
    }
}

/// One update of the whole. `rows[i]` is the height of part `i`, absent parts change nothing.
///
/// `Ok(None)` if no part changes anything.
pub(super) fn fuse(
    parts: &[Option<&ModuleUpdate>],
    rows: &[usize],
    paths: &[&str],
) -> Result<Option<ModuleUpdate>, FuseError> {
    let present: Vec<_> = parts.iter().flatten().copied().collect();
    if present.is_empty() {
        return Ok(None);
    }
    let magnitude = fuse_magnitudes(parts, paths)?;
    let mut fused = if present.iter().all(|part| part.factors.is_none()) {
        ModuleUpdate::of(None, 1.0)
    } else {
        match rejoin(parts) {
            Some(whole) => whole,
            None => fuse_factors(parts, rows)?,
        }
    };
    fused.bias = fuse_biases(parts, rows)?;
    fused.magnitude = magnitude;
    Ok(Some(fused))
}

/// Why fusing failed: the form does not exist, or a tensor could not be read.
pub(super) enum FuseError {
    Obstacle(Obstacle),
    Failed(LoraFormatError),
}

impl From<Obstacle> for FuseError {
    fn from(obstacle: Obstacle) -> Self {
        Self::Obstacle(obstacle)
    }
}

impl From<LoraFormatError> for FuseError {
    fn from(error: LoraFormatError) -> Self {
        Self::Failed(error)
    }
}

fn fuse_magnitudes(
    parts: &[Option<&ModuleUpdate>],
    paths: &[&str],
) -> Result<Option<Magnitude>, Obstacle> {
    let of = |part: &Option<&ModuleUpdate>| part.and_then(|part| part.magnitude.clone());
    let magnitudes: Vec<_> = parts.iter().filter_map(of).collect();
    if magnitudes.is_empty() {
        return Ok(None);
    }
    if magnitudes.len() < parts.len() {
        return Err("a DoRA magnitude is missing for some parts");
    }
    let values: Vec<_> = magnitudes
        .iter()
        .map(|magnitude| &magnitude.values)
        .collect();
    if magnitudes
        .iter()
        .all(|magnitude| magnitude.axis == Axis::Output)
    {
        let stacked = TensorRef::stacked(&values);
        let values =
            stacked.unwrap_or_else(|| stack(&values.into_iter().cloned().collect::<Vec<_>>()));
        return Ok(Some(Magnitude {
            values,
            axis: Axis::Output,
        }));
    }
    let whole = Axis::Input {
        across: paths.iter().map(|path| path.to_string()).collect(),
    };
    let one =
        |magnitude: &Magnitude| magnitude.axis == whole && magnitude.values.is_same(values[0]);
    if magnitudes.iter().all(one) {
        return Ok(Some(magnitudes[0].clone()));
    }
    Err("a DoRA magnitude of the input axis belongs to the part it was trained with")
}

/// Vectors one after the other.
fn stack(parts: &[TensorRef]) -> TensorRef {
    let mut pieces = Vec::new();
    let mut row = 0;
    for tensor in parts {
        pieces.push(Piece {
            row,
            column: 0,
            scale: 1.0,
            tensor: tensor.clone(),
        });
        row += tensor.size().0;
    }
    assemble(vec![row], pieces)
}

fn fuse_biases(parts: &[Option<&ModuleUpdate>], rows: &[usize]) -> Result<Option<Bias>, Obstacle> {
    let biases: Vec<_> = parts
        .iter()
        .map(|part| part.and_then(|part| Some((part.bias.as_ref()?, part.scale))))
        .collect();
    let present: Vec<_> = biases.iter().flatten().collect();
    let Some((first, _)) = present.first() else {
        return Ok(None);
    };
    let tensors: Vec<_> = present.iter().map(|(bias, _)| bias.tensor()).collect();
    let all = present.len() == parts.len();
    let stacked = TensorRef::stacked(&tensors).filter(|_| all);
    let kind = |bias: &Bias| std::mem::discriminant(bias);
    let one_kind = present
        .iter()
        .all(|(bias, scale)| kind(bias) == kind(first) && *scale == present[0].1);
    if let (Some(stacked), true) = (stacked, one_kind) {
        return Ok(Some(first.with(stacked)));
    }
    let mut pieces = Vec::new();
    let mut row = 0;
    for (bias, height) in biases.iter().zip(rows) {
        let scale = match bias {
            None => None,
            Some((Bias::Scaled(_), scale)) => Some(*scale),
            Some((Bias::Added(_), _)) => Some(1.0),
            Some((Bias::Replaced(_), _)) => {
                return Err("some parts replace their bias and others do not");
            }
        };
        if let (Some((bias, _)), Some(scale)) = (bias, scale) {
            pieces.push(Piece {
                row,
                column: 0,
                scale,
                tensor: bias.tensor().clone(),
            });
        }
        row += height;
    }
    Ok(Some(Bias::Added(assemble(vec![row], pieces))))
}

/// The update that [`super::split`] took apart, if all parts are there and unchanged: what it cut stacks up to rows of one
/// tensor, and all else is the same tensor.
fn rejoin(parts: &[Option<&ModuleUpdate>]) -> Option<ModuleUpdate> {
    let parts: Vec<&ModuleUpdate> = parts.iter().copied().collect::<Option<_>>()?;
    let first = parts[0];
    let factors: Vec<&Factors> = parts
        .iter()
        .map(|part| part.factors.as_ref())
        .collect::<Option<_>>()?;
    let alike = parts.iter().all(|part| {
        let rows = part.rows.is_some() == first.rows.is_some();
        part.scale == first.scale && part.kind() == first.kind() && rows
    });
    if !alike {
        return None;
    }
    if first.rows.is_some() {
        let rows = Rows::stacked(parts.iter().filter_map(|part| part.rows.as_ref()));
        if rows != Rows::all(factors[0].size(TensorRef::axes)[0]) {
            return None;
        }
    }
    let joined = factors[0].as_ref().try_map(|part, tensor| {
        let tensors = factors.iter().map(|factors| factors.get(part));
        let tensors: Vec<&TensorRef> = tensors.collect::<Option<_>>().ok_or(())?;
        if first.rows.is_none() && is_cut(part) {
            return TensorRef::stacked(&tensors).ok_or(());
        }
        let same = tensors.iter().all(|other| other.is_same(tensor));
        same.then(|| tensor.clone()).ok_or(())
    });
    Some(ModuleUpdate {
        factors: Some(joined.ok()?),
        rows: None,
        ..first.clone()
    })
}

fn fuse_factors(
    parts: &[Option<&ModuleUpdate>],
    rows: &[usize],
) -> Result<ModuleUpdate, FuseError> {
    let full = |part: &&ModuleUpdate| part.kind() == Some(Kind::Diff);
    let changed: Vec<_> = parts
        .iter()
        .map(|part| part.filter(|part| part.factors.is_some()))
        .collect();
    let out: usize = rows.iter().sum();
    if changed.iter().flatten().all(full) {
        return Ok(fuse_full(&changed, rows, out));
    }
    let low_rank: Vec<_> = changed
        .iter()
        .map(|part| {
            part.map(|part| to_low_rank(part).ok_or("its parts have no common low-rank form"))
                .transpose()
        })
        .collect::<Result<_, _>>()?;
    let pairs: Vec<_> = low_rank
        .iter()
        .map(|part| {
            let part = part.as_ref()?;
            let (down, up) = part.pair()?;
            Some((down, up, part.scale))
        })
        .collect();
    let present: Vec<_> = pairs.iter().flatten().collect();
    let (down, _, scale) = *present[0];
    let one_scale = present.iter().all(|(_, _, other)| *other == scale);
    let mut shared = one_scale;
    for (other, ..) in &present[1..] {
        shared = shared && equal(down, other)?;
    }
    let input = down.size().1;
    let rank = if shared {
        down.size().0
    } else {
        present.iter().map(|(down, ..)| down.size().0).sum()
    };
    let (mut downs, mut ups) = (Vec::new(), Vec::new());
    let (mut row, mut column) = (0, 0);
    for (pair, height) in pairs.iter().zip(rows) {
        if let Some((down, up, scale)) = pair {
            downs.push(Piece {
                row: column,
                column: 0,
                scale: 1.0,
                tensor: TensorRef::clone(down),
            });
            ups.push(Piece {
                row,
                column,
                scale: if one_scale { 1.0 } else { *scale },
                tensor: TensorRef::clone(up),
            });
            if !shared {
                column += down.size().0;
            }
        }
        row += height;
    }
    if shared {
        downs.truncate(1);
    }
    Ok(ModuleUpdate::low_rank(
        assemble(vec![rank, input], downs),
        assemble(vec![out, rank], ups),
        if one_scale { scale } else { 1.0 },
    ))
}

fn fuse_full(parts: &[Option<&ModuleUpdate>], rows: &[usize], out: usize) -> ModuleUpdate {
    let mut pieces = Vec::new();
    let (mut row, mut input) = (0, 0);
    for (part, height) in parts.iter().zip(rows) {
        if let Some((part, factors)) = part.and_then(|part| Some((part, part.factors.as_ref()?))) {
            let tensor = factors[DIFF].clone();
            input = tensor.size().1;
            pieces.push(Piece {
                row,
                column: 0,
                scale: part.scale,
                tensor,
            });
        }
        row += height;
    }
    let change = Factors::diff(assemble(vec![out, input], pieces));
    ModuleUpdate::of(Some(change), 1.0)
}

/// Whether two tensors hold the same bytes.
fn equal(a: &TensorRef, b: &TensorRef) -> Result<bool, LoraFormatError> {
    if a.is_same(b) {
        return Ok(true);
    }
    if a.shape() != b.shape() || a.dtype() != b.dtype() {
        return Ok(false);
    }
    Ok(a.load()?.bytes == b.load()?.bytes)
}
