//! One reference case, read as `case.json` says it: what a kind needs and the case leaves out is an error that names the key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor, TensorData};
use lora_core::files::host::HostTensor;
use lora_core::files::safetensors::TensorFile;
use serde_json::Value;

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, HostTensor>;

/// One reference case.
pub(crate) struct Case {
    /// Its folder.
    pub(crate) dir: PathBuf,
    pub(crate) name: String,
    pub(crate) kind: String,
    /// The family of its models.
    pub(crate) family: String,
    json: Value,
    inputs: Option<TensorFile>,
    pub(crate) expected: TensorFile,
}

impl Case {
    /// Opens the case in `dir`.
    ///
    /// # Errors
    /// A file that is missing or does not parse.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("case.json");
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let json: Value =
            serde_json::from_slice(&text).with_context(|| format!("parse {}", path.display()))?;
        let text = |key: &str| {
            json.get(key)
                .and_then(Value::as_str)
                .map(String::from)
                .with_context(|| format!("{} has no `{key}`", path.display()))
        };
        let inputs = dir.join("inputs.safetensors");
        let expected = TensorFile::open(&dir.join("expected.safetensors"))?;
        if expected.names().next().is_none() {
            bail!("{} expects nothing", dir.display());
        }
        Ok(Self {
            name: text("name")?,
            kind: text("kind")?,
            family: match json.get("family") {
                None => "flux1".into(),
                Some(_) => text("family")?,
            },
            inputs: inputs
                .is_file()
                .then(|| TensorFile::open(&inputs))
                .transpose()?,
            expected,
            dir: dir.into(),
            json,
        })
    }

    /// A value of `case.json` by JSON pointer.
    pub(crate) fn value(&self, pointer: &str) -> anyhow::Result<&Value> {
        self.json
            .pointer(pointer)
            .with_context(|| format!("case.json has no `{pointer}`"))
    }

    /// A value that the format lets a case leave out.
    pub(crate) fn optional(&self, pointer: &str) -> Option<&Value> {
        self.json.pointer(pointer)
    }

    pub(crate) fn str(&self, pointer: &str) -> anyhow::Result<&str> {
        string(self.value(pointer)?, pointer)
    }

    pub(crate) fn f64(&self, pointer: &str) -> anyhow::Result<f64> {
        self.value(pointer)?
            .as_f64()
            .with_context(|| format!("`{pointer}` of case.json is not a number"))
    }

    pub(crate) fn usize(&self, pointer: &str) -> anyhow::Result<usize> {
        let value = self
            .value(pointer)?
            .as_u64()
            .with_context(|| format!("`{pointer}` of case.json is not a count"))?;
        Ok(value as usize)
    }

    /// A list of strings, or one string as a list of one.
    pub(crate) fn strings(&self, pointer: &str) -> anyhow::Result<Vec<&str>> {
        match self.value(pointer)? {
            Value::Array(values) => values.iter().map(|value| string(value, pointer)).collect(),
            value => Ok(vec![string(value, pointer)?]),
        }
    }

    /// A path in `case.json`, relative to the case.
    pub(crate) fn path(&self, pointer: &str) -> anyhow::Result<PathBuf> {
        Ok(self.dir.join(self.str(pointer)?))
    }

    /// Names of the inputs.
    ///
    /// # Errors
    /// A case without inputs.
    fn inputs(&self) -> anyhow::Result<&TensorFile> {
        self.inputs
            .as_ref()
            .context("the case has no inputs.safetensors")
    }

    /// All inputs by name.
    pub(crate) fn all_inputs(&self) -> anyhow::Result<Tensors> {
        let inputs = self.inputs()?;
        let read = |name: &str| Ok((name.to_string(), inputs.read(name)?));
        inputs.names().map(read).collect()
    }

    pub(crate) fn input(&self, name: &str) -> anyhow::Result<HostTensor> {
        Ok(self.inputs()?.read(name)?)
    }

    pub(crate) fn has_input(&self, name: &str) -> bool {
        self.inputs
            .as_ref()
            .is_some_and(|inputs| inputs.info(name).is_some())
    }

    pub(crate) fn tensor<const D: usize>(
        &self,
        name: &str,
        device: &Device,
    ) -> anyhow::Result<Tensor<D>> {
        let host = self.input(name)?;
        if host.shape.len() != D {
            bail!(
                "input `{name}` has shape {:?}, not {D} dimensions",
                host.shape
            );
        }
        Ok(Tensor::from_data(
            TensorData::new(host.to_f32(), host.shape),
            device,
        ))
    }
}

fn string<'a>(value: &'a Value, pointer: &str) -> anyhow::Result<&'a str> {
    value
        .as_str()
        .with_context(|| format!("`{pointer}` of case.json is not a string"))
}
