//! How checkpoints store a weight in few bits: what lies beside it under other names, and what it then means.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;

use super::encode::NF4;
use super::{Factors, Quantised, Rounding, Values};
use crate::files::host::{Dtype, E4M3, E5M2, HostTensor};
use crate::files::safetensors::{FileError, TensorProblem, TensorSet};
use crate::files::strict_json::parse_json;

/// Between a weight's name and the kind of its 4 bits.
const QUANT_STATE: &str = ".quant_state.bitsandbytes__";

/// A weight in few bits, found in a checkpoint but not read.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    name: String,
    shape: Vec<usize>,
    form: Form,
    parts: Vec<String>,
}

/// How far a stored table may be from the published one: bf16 is within 0.002.
const TABLE_TOLERANCE: f32 = 0.005;

#[derive(Debug, Clone, PartialEq)]
enum Form {
    /// bitsandbytes' 4 bits.
    Packed(QuantState),
    /// Codes of 8 bits, each a number of the weight's dtype, times what this tensor holds, divided by the number.
    Scaled(Option<(String, f32)>),
}

/// What bitsandbytes says as JSON.
#[derive(Debug, Clone, PartialEq, Deserialize)]
struct QuantState {
    quant_type: Option<String>,
    blocksize: usize,
    shape: Vec<usize>,
    /// What the weight had, and is decoded to.
    dtype: String,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

impl Stored {
    /// Every weight in few bits of a checkpoint, by its name.
    ///
    /// # Errors
    /// A weight of 8-bit integers that nothing says the meaning of, a description that does not parse.
    pub fn all(set: &TensorSet) -> Result<BTreeMap<String, Self>, FileError> {
        let mut all = BTreeMap::new();
        for name in set.names() {
            let found = match name.split_once(QUANT_STATE) {
                Some((weight, _)) => Some(Self::packed(set, weight, name)?),
                None => Self::scaled(set, name)?,
            };
            if let Some(stored) = found {
                all.insert(stored.name.clone(), stored);
            }
        }
        for name in set.names().filter(|name| name.ends_with(".weight")) {
            let dtype = set.info(name).map(|info| info.dtype);
            if let Some(dtype @ (Dtype::I8 | Dtype::U8)) = dtype
                && !all.contains_key(name)
            {
                return Err(problem(
                    set,
                    name,
                    format!(
                        "it is {dtype}, and no tensor beside it says what its values stand for"
                    ),
                ));
            }
        }
        Ok(all)
    }

    /// Its shape when decoded.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Bits of a code.
    pub fn bits(&self) -> u32 {
        match self.form {
            Form::Packed(_) => 4,
            Form::Scaled(_) => 8,
        }
    }

    /// Names of the tensors that belong to it.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().map(String::as_str)
    }

    fn packed(set: &TensorSet, weight: &str, state: &str) -> Result<Self, FileError> {
        let parsed = parse_json::<QuantState>(&set.read(state)?.bytes)
            .map_err(|error| problem(set, state, format!("it is malformed: {error}")))?;
        let parts = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
            .map(|part| format!("{weight}.{part}"))
            .into_iter()
            .chain([state.to_string()]);
        Ok(Self {
            name: weight.into(),
            shape: parsed.shape.clone(),
            parts: existing(set, parts),
            form: Form::Packed(parsed),
        })
    }

    fn scaled(set: &TensorSet, name: &str) -> Result<Option<Self>, FileError> {
        let (Some(info), Some(module)) = (set.info(name), name.strip_suffix(".weight")) else {
            return Ok(None);
        };
        let is_float = matches!(info.dtype, Dtype::F8E4m3 | Dtype::F8E5m2);
        let scales = [("SCB", 127.0), ("scale_weight", 1.0), ("weight_scale", 1.0)];
        let mut scales = scales.map(|(part, number)| (format!("{module}.{part}"), number));
        let scale = scales
            .iter_mut()
            .find(|(scale, _)| set.info(scale).is_some())
            .map(|(scale, number)| (std::mem::take(scale), *number));
        if !is_float && (info.dtype != Dtype::I8 || scale.is_none()) {
            return Ok(None);
        }
        let others = ["weight_format", "scale_input", "input_scale", "comfy_quant"]
            .map(|part| format!("{module}.{part}"));
        let names = scale.iter().map(|(scale, _)| scale.clone()).chain(others);
        let stored = Self {
            name: name.into(),
            shape: info.shape.clone(),
            parts: existing(set, names),
            form: Form::Scaled(scale),
        };
        stored.check_described(set, module)?;
        Ok(Some(stored))
    }

    /// Refuses what a file says of itself and is not read here.
    fn check_described(&self, set: &TensorSet, module: &str) -> Result<(), FileError> {
        let read = |part: &str| {
            let name = format!("{module}.{part}");
            let tensor = set.info(&name).map(|_| set.read(&name)).transpose()?;
            Ok::<_, FileError>(tensor)
        };
        if let Some(format) = read("weight_format")?
            && format.to_f32().iter().any(|&format| format != 0.0)
        {
            let what = "bitsandbytes laid it out for a GPU (`weight_format`); save it again with a newer version";
            return Err(problem(set, &self.name, what.into()));
        }
        #[derive(Deserialize)]
        struct ComfyQuant {
            format: String,
        }
        if let Some(json) = read("comfy_quant")? {
            let quant = parse_json::<ComfyQuant>(&json.bytes)
                .map_err(|error| problem(set, &self.name, format!("`comfy_quant`: {error}")))?;
            if !["float8_e4m3fn", "float8_e5m2", "int8_tensorwise"].contains(&&*quant.format) {
                let what = format!("ComfyUI's format `{}` is not read here", quant.format);
                return Err(problem(set, &self.name, what));
            }
        }
        Ok(())
    }

    /// Reads it, or some rows of it.
    ///
    /// # Errors
    /// Parts that are missing or do not fit together, rows that are not there.
    pub fn read(
        &self,
        set: &TensorSet,
        rows: Option<Range<usize>>,
    ) -> Result<Quantised, FileError> {
        if let Some(rows) = &rows
            && self
                .shape
                .first()
                .is_none_or(|&all| rows.end > all || rows.start > rows.end)
        {
            let what = format!("it has shape {:?}, and no rows {rows:?}", self.shape);
            return Err(problem(set, &self.name, what));
        }
        let fail = |what: String| problem(set, &self.name, what);
        match &self.form {
            Form::Packed(state) => {
                let read = self.read_packed(set, state)?;
                Ok(match rows {
                    Some(rows) => read.rows(rows),
                    None => read,
                })
            }
            Form::Scaled(scale) => {
                let tensor = match rows.clone() {
                    Some(rows) => set.read_rows(&self.name, rows)?,
                    None => set.read(&self.name)?,
                };
                let mut factors = match scale {
                    None => vec![1.0],
                    Some((name, number)) => {
                        let scales = set.read(name)?.to_f32();
                        scales.iter().map(|scale| scale / number).collect()
                    }
                };
                let numel = tensor.numel();
                let height = self.shape.first().copied().unwrap_or(1);
                let block = match factors.len() {
                    1 => numel,
                    found if found == height => {
                        if let Some(rows) = rows {
                            factors = factors[rows].to_vec();
                        }
                        numel / factors.len().max(1)
                    }
                    found => {
                        return Err(fail(format!(
                            "{found} scales are there, for {height} rows; one for the whole or for each row is read"
                        )));
                    }
                };
                if numel == 0 {
                    factors.clear();
                }
                let HostTensor {
                    dtype,
                    shape,
                    bytes,
                } = tensor;
                let values = match dtype {
                    Dtype::F8E4m3 => Values::Bytes(Box::new(E4M3)),
                    Dtype::F8E5m2 => Values::Bytes(Box::new(E5M2)),
                    _ => Values::Int8,
                };
                let factors = Factors::Plain(factors);
                Quantised::new(shape, bytes, values, block.max(1), factors).map_err(fail)
            }
        }
    }

    fn read_packed(&self, set: &TensorSet, state: &QuantState) -> Result<Quantised, FileError> {
        let fail = |what: String| problem(set, &self.name, what);
        let part = |part: &str| set.read(&format!("{}.{part}", self.name));
        let absmax = part("absmax")?;
        let factors = if set.info(&format!("{}.nested_absmax", self.name)).is_some() {
            let (Some(block), Some(offset)) = (state.nested_blocksize, state.nested_offset) else {
                return Err(fail(
                    "its `quant_state` lacks what `nested_absmax` needs".into(),
                ));
            };
            if absmax.dtype.size() != 1 {
                return Err(fail(format!("its quantised `absmax` is {}", absmax.dtype)));
            }
            let table = part("nested_quant_map")?
                .to_f32()
                .try_into()
                .map_err(|_| fail("its `nested_quant_map` has not 256 values".into()))?;
            let nested = Factors::Plain(part("nested_absmax")?.to_f32());
            let (count, values) = (absmax.bytes.len(), Values::Bytes(table));
            let codes = Quantised::new(vec![count], absmax.bytes, values, block, nested);
            Factors::Quantised(Box::new(codes.map_err(fail)?), offset)
        } else if absmax.dtype.is_float() {
            Factors::Plain(absmax.to_f32())
        } else {
            return Err(fail(
                "its `absmax` is quantised, and `nested_absmax` is missing".into(),
            ));
        };
        let table = part("quant_map")?.to_f32().try_into();
        let table: [f32; 16] =
            table.map_err(|_| fail("its `quant_map` has not 16 values".into()))?;
        let is_nf4 = |table: &[f32; 16]| {
            table
                .iter()
                .zip(NF4)
                .all(|(own, value)| (own - value).abs() < TABLE_TOLERANCE)
        };
        // bitsandbytes goes by the name of the table, this reader by its values: they must say the same.
        let is_known = state.quant_type.as_deref() != Some("nf4") || is_nf4(&table);
        let codes = set.read(&self.name)?.bytes; // of whatever dtype: `bnb_4bit_quant_storage`
        let (shape, values) = (self.shape.clone(), Values::Nibbles(table));
        let rounding = match state.dtype.as_str() {
            "float32" => Rounding::F32,
            "bfloat16" => Rounding::Bf16,
            "float16" => Rounding::F16,
            other => return Err(fail(format!("its dtype `{other}` is not known"))),
        };
        let read = Quantised::new(shape, codes, values, state.blocksize, factors).map_err(fail)?;
        if !is_known {
            return Err(fail(
                "its `quant_map` is not the table of bitsandbytes' NF4; quantise the model again"
                    .into(),
            ));
        }
        Ok(read.rounded_to(rounding))
    }
}

/// Those of the names that the checkpoint has.
fn existing(set: &TensorSet, names: impl IntoIterator<Item = String>) -> Vec<String> {
    let has = |name: &String| set.info(name).is_some();
    names.into_iter().filter(has).collect()
}

fn problem(set: &TensorSet, name: &str, problem: String) -> FileError {
    FileError::Tensor {
        path: set.path().into(),
        name: name.into(),
        problem: TensorProblem::Quantised { problem },
    }
}
