//! Adapters of several networks in one file, each under a prefix of its own, as diffusers' `save_lora_weights` packs them.
//!
//! Source: diffusers 0.38 `loaders/lora_base.py` (`_pack_dict_with_prefix`): the tensors of all components side by side, and one
//! `lora_adapter_metadata` with the fields of all.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde_json::Map;

use crate::error::LoraError;
use crate::files::safetensors::{TensorFile, write_tensors};
use crate::peft::file::{AdapterFile, SPLIT_KEY, header};

/// Writes adapters, each with the prefix of its keys, as [`AdapterFile::write`] does one.
///
/// # Errors
/// What `out` returns; the path of a layer that a file cannot hold.
pub fn write_together<'a>(
    adapters: impl IntoIterator<Item = (&'a str, &'a AdapterFile)>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let plain: Vec<_> = adapters
        .into_iter()
        .map(|(prefix, adapter)| (prefix, adapter, adapter.plain()))
        .collect();
    let (mut tensors, mut fields) = (BTreeMap::new(), Map::new());
    let mut split = Vec::new();
    for (index, (prefix, adapter, plain)) in plain.iter().enumerate() {
        tensors.extend(plain.tensors(prefix));
        fields.extend(plain.peft_config().to_peft(prefix));
        let entry = adapter.split_entry();
        split.extend(entry.map(|entry| (split_key(index, prefix), entry)));
    }
    let mut metadata = header(fields);
    metadata.extend(split);
    write_tensors(out, &tensors, &metadata)
}

/// Reads what [`write_together`] has written under these prefixes, in their order; those that the file has nothing under are
/// left out.
///
/// # Errors
/// As [`AdapterFile::load`]; a key with none of the prefixes.
pub fn load_together<'a>(
    path: &Path,
    prefixes: &[&'a str],
) -> Result<BTreeMap<&'a str, AdapterFile>, LoraError> {
    let file = TensorFile::open(path)?;
    let mut keys: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
    for key in file.names() {
        let of = prefixes.iter().position(|prefix| key.starts_with(prefix));
        let of = of.ok_or_else(|| LoraError::Leftover {
            key: key.into(),
            reason: format!("its name starts with none of {}", prefixes.join(", ")),
        })?;
        keys.entry(of).or_default().push(key);
    }
    let adapters = keys.into_iter().map(|(index, keys)| {
        let prefix = prefixes[index];
        let split = split_key(index, prefix);
        let adapter = AdapterFile::from_keys(&file, keys.into_iter(), prefix, &split)?;
        Ok((prefix, adapter))
    });
    adapters.collect()
}

/// The first adapter's key is that of a file that has no other.
fn split_key(index: usize, prefix: &str) -> String {
    match index {
        0 => SPLIT_KEY.into(),
        _ => format!("{prefix}{SPLIT_KEY}"),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::attach;
    use crate::attach::DEFAULT_ADAPTER;
    use crate::peft::{InitLoraWeights, LoraConfig, Targets};
    use crate::test_model::Mlp;

    fn adapter(layer: &str, r: usize, init: InitLoraWeights) -> AdapterFile {
        let config = LoraConfig {
            r,
            lora_alpha: 3.0,
            init_lora_weights: init,
            target_modules: Targets::List(vec![layer.into()]),
            ..LoraConfig::default()
        };
        let model = Mlp::new(8, &Device::flex());
        let model = attach(model, config.clone().fresh(7)).expect("attached");
        AdapterFile::from_model(&model, DEFAULT_ADAPTER, Some(&config)).expect("an adapter")
    }

    #[test]
    fn adapters_of_several_networks_come_back_as_they_were() {
        // The second is split off the base weight, the first is not; "b." is no prefix of "b_2.".
        let adapters = [
            ("a.", adapter("up", 2, InitLoraWeights::Gaussian)),
            ("b.", adapter("down", 3, InitLoraWeights::Pissa)),
            ("b_2.", adapter("up", 4, InitLoraWeights::Gaussian)),
        ];
        let path = tempfile::tempdir().expect("a folder");
        let path = path.path().join("x.safetensors");
        let write = |adapters: &[(&str, AdapterFile)]| {
            let mut bytes = Vec::new();
            let adapters = adapters.iter().map(|(prefix, adapter)| (*prefix, adapter));
            write_together(adapters, &mut bytes).expect("written");
            std::fs::write(&path, &bytes).expect("a file");
            bytes
        };
        write(&adapters);
        let loaded = load_together(&path, &["a.", "b.", "b_2.", "c."]).expect("what was written");
        assert_eq!(loaded, BTreeMap::from(adapters.clone()));

        // One alone is the file that it has always been.
        for (prefix, adapter) in &adapters {
            let one = [(*prefix, adapter.clone())];
            assert_eq!(write(&one), adapter.to_bytes(prefix));
        }
        write(&adapters[..2]);
        let error = load_together(&path, &["a."]).expect_err("another's keys");
        let said = error.to_string();
        assert!(
            said.contains("b.down") && said.contains("none of a."),
            "{said}"
        );
    }
}
