//! Writing, the same bytes for the same tensors and metadata.

use std::borrow::Borrow;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};

use serde::ser::{SerializeMap, Serializer};

use crate::files::host::{Dtype, HostTensor};

use super::header::{Entry, LENGTH, MAX_HEADER, METADATA, byte_len, is_valid_name};

/// Bytes of a safetensors file, the same for the same tensors and metadata.
///
/// # Panics
/// If a name is one that [`TensorFile::open`](super::TensorFile::open) refuses, or a tensor's bytes do not fill its shape.
pub fn serialize(
    tensors: &BTreeMap<String, HostTensor>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut out = Vec::new();
    match write_tensors(&mut out, tensors, metadata) {
        Ok(()) => out,
        Err(error) => panic!("{error}"),
    }
}

/// Writes the file that [`serialize`] makes, without a copy of the tensors.
///
/// # Errors
/// What `out` returns; [`io::ErrorKind::InvalidInput`] for a name that [`TensorFile::open`](super::TensorFile::open) refuses, or a tensor whose bytes
/// do not fill its shape.
pub fn write_tensors<W: Write + ?Sized, T: Borrow<HostTensor>>(
    out: &mut W,
    tensors: &BTreeMap<String, T>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let layout = tensors.iter().map(|(name, tensor)| {
        let tensor = tensor.borrow();
        (name.clone(), tensor.dtype, tensor.shape.clone())
    });
    let mut layout = layout.collect::<Vec<_>>();
    // Wide elements first keeps all of them aligned; the sort is stable, so names stay sorted.
    layout.sort_by_key(|(_, dtype, _)| Reverse(dtype.size()));
    write(out, &layout, metadata, |name| {
        Ok::<_, io::Error>(tensors[name].borrow())
    })
}

/// Streams a safetensors file: the header from `layout`, then `tensor(name)` for each of its rows, one in memory at a
/// time.
///
/// The data has the order of `layout`; with wide dtypes first, every tensor is aligned to its element size.
///
/// # Errors
/// What `tensor` and `out` return; and [`io::ErrorKind::InvalidInput`] if a name is one that [`TensorFile::open`](super::TensorFile::open)
/// refuses, occurs twice, or a tensor is not what `layout` says. What has been written by then is no use.
pub fn write_streaming<W: Write, E: From<io::Error>>(
    out: &mut W,
    layout: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
    tensor: impl FnMut(&str) -> Result<HostTensor, E>,
) -> Result<(), E> {
    write(out, layout, metadata, tensor)
}

fn write<W: Write + ?Sized, T: Borrow<HostTensor>, E: From<io::Error>>(
    out: &mut W,
    layout: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
    mut tensor: impl FnMut(&str) -> Result<T, E>,
) -> Result<(), E> {
    out.write_all(&header(layout, metadata)?)?;
    for (name, dtype, shape) in layout {
        let tensor = tensor(name)?;
        let tensor = tensor.borrow();
        let bytes = tensor.bytes.len();
        if (tensor.dtype, &tensor.shape) != (*dtype, shape)
            || byte_len(*dtype, shape) != Some(bytes as u64)
        {
            Err(invalid(format!(
                "tensor `{name}`: the layout says {dtype} {shape:?}, but it is {} {:?} of {bytes} bytes",
                tensor.dtype, tensor.shape
            )))?;
        }
        out.write_all(&tensor.bytes)?;
    }
    Ok(())
}

/// Header length and header, padded so that the data is aligned to 8 bytes.
fn header(
    layout: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
) -> io::Result<Vec<u8>> {
    let mut header = vec![0; LENGTH as usize];
    let mut json = serde_json::Serializer::new(&mut header);
    let mut map = json.serialize_map(None)?;
    if !metadata.is_empty() {
        map.serialize_entry(METADATA, metadata)?;
    }
    let mut names = BTreeSet::new();
    let mut begin = 0;
    for (name, dtype, shape) in layout {
        if !is_valid_name(name) {
            return Err(invalid(format!("tensor name {name:?} is not allowed")));
        }
        if !names.insert(name) {
            return Err(invalid(format!("tensor `{name}` occurs twice")));
        }
        let end = byte_len(*dtype, shape)
            .and_then(|len| len.checked_add(begin))
            .ok_or_else(|| invalid(format!("tensor `{name}`: shape {shape:?} overflows")))?;
        map.serialize_entry(
            name,
            &Entry {
                dtype: dtype.name().into(),
                shape: shape.clone(),
                data_offsets: [begin, end],
            },
        )?;
        begin = end;
    }
    map.end()?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let len = header.len() as u64 - LENGTH;
    if len > MAX_HEADER {
        return Err(invalid(format!("a header of {len} bytes is too large")));
    }
    header[..LENGTH as usize].copy_from_slice(&len.to_le_bytes());
    Ok(header)
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}
