//! What stands where a pipeline folder or a component's weights belong, when it is not quite that: taken where it can be,
//! else said what it is and what mends it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::WeightsError;

/// Names of a component's weights without variant, in the order in which they are looked for.
const WEIGHTS: [&str; 2] = ["diffusion_pytorch_model", "model"];

/// Checks that `root` is a pipeline folder.
///
/// # Errors
/// Anything else, with what it is and what to name instead.
pub(crate) fn check_pipeline(root: &Path) -> Result<(), WeightsError> {
    if root.join("model_index.json").is_file() {
        return Ok(());
    }
    let unusable = |what: String| {
        Err(WeightsError::Unusable {
            path: root.into(),
            what,
        })
    };
    let Ok(metadata) = fs::metadata(root) else {
        return unusable(
            "does not exist; name a pipeline folder on this disk (with model_index.json), or a repository of the Hub as OWNER/NAME, which is downloaded once (to have it in a folder of your own: `hf download OWNER/NAME --local-dir FOLDER`)"
                .into(),
        );
    };
    if !metadata.is_dir() {
        let pickle = is_pickle(root);
        return unusable(match extension(root).as_str() {
            "gguf" => "is a GGUF file, which is not read here; name a pipeline folder in diffusers' form".into(),
            _ if pickle => "is a Python pickle, which is not read here; name a pipeline folder in diffusers' form with .safetensors files".into(),
            _ => "is a file, not a pipeline folder; name a folder in diffusers' form as `model.path`, and this file as `model.transformer` or `model.vae`".into(),
        });
    }
    let snapshots = names(&root.join("snapshots"));
    if let Some(newest) = snapshots.first() {
        return unusable(format!(
            "is a repository in the Hub's cache; name the snapshot in it: `{}`",
            root.join("snapshots").join(newest).display()
        ));
    }
    let found = names(root);
    let has = |ending: &str| found.iter().any(|name| name.ends_with(ending));
    unusable(
        if has("config.json") && (has(".safetensors") || has(".safetensors.index.json")) {
            "holds one component of a pipeline; name the folder above it, which has model_index.json".into()
        } else if has(".gguf") {
            "holds GGUF files, which are not read here, and no model_index.json; name a pipeline folder in diffusers' form".into()
        } else if has(".safetensors") {
            "holds single files and no model_index.json; name a pipeline folder in diffusers' form as `model.path`, and the file as `model.transformer`".into()
        } else {
            "has no model_index.json; name a pipeline folder in diffusers' form".into()
        },
    )
}

/// The weights file of a component folder: without variant, or of the only variant that is there (`model.fp16.safetensors`).
///
/// # Errors
/// None, weights of several variants, or weights in another form, each named.
pub(crate) fn component_file(folder: &Path) -> Result<PathBuf, WeightsError> {
    let found = names(folder);
    let of = |name: &str| {
        found
            .iter()
            .any(|own| own == name)
            .then(|| folder.join(name))
    };
    for ending in [".safetensors.index.json", ".safetensors"] {
        for stem in WEIGHTS {
            if let Some(path) = of(&format!("{stem}{ending}")) {
                return Ok(path);
            }
        }
    }
    let unusable = |what: String| {
        Err(WeightsError::Unusable {
            path: folder.into(),
            what,
        })
    };
    let variants: Vec<&String> = found.iter().filter(|name| is_variant(name)).collect();
    // The shards of a variant are named by its index.
    let indices = variants.iter().filter(|name| name.ends_with(".json"));
    let whole = variants.iter().filter(|name| !is_shard(name));
    let candidates: Vec<&&String> = match indices.clone().count() {
        0 => whole.collect(),
        _ => indices.collect(),
    };
    match candidates.as_slice() {
        [one] => return Ok(folder.join(one)),
        [] => {}
        several => {
            let names: Vec<&str> = several.iter().map(|name| name.as_str()).collect();
            return unusable(format!(
                "has weights of several variants ({}) and none without; leave one",
                names.join(", ")
            ));
        }
    }
    if let Some(name) = found.iter().find(|name| is_pickle(Path::new(name))) {
        return unusable(format!(
            "has its weights as `{name}`, a Python pickle, which is not read here; download the .safetensors form, or convert it"
        ));
    }
    if let Some(name) = found.iter().find(|name| name.ends_with(".gguf")) {
        return unusable(format!(
            "has its weights as `{name}`, a GGUF file, which is not read here; take the .safetensors checkpoint it was made from"
        ));
    }
    Err(WeightsError::NoComponent {
        path: folder.into(),
        what: format!(
            "weights file ({})",
            WEIGHTS
                .map(|stem| format!("{stem}.safetensors"))
                .join(" or ")
        ),
    })
}

/// By what program a checkpoint with these tensors was quantised in a form that is not read here.
pub(crate) fn quantised<'a>(mut keys: impl Iterator<Item = &'a str>) -> Option<&'static str> {
    keys.find_map(|key| {
        if key.ends_with(".qweight") || key.ends_with(".qzeros") {
            Some("GPTQ, AWQ or SVDQuant")
        } else if key.ends_with(".weight._data") {
            Some("optimum-quanto")
        } else {
            None
        }
    })
}

/// `model.fp16.safetensors`, its shards, and the index of them (`model.safetensors.index.fp16.json`).
fn is_variant(name: &str) -> bool {
    WEIGHTS.iter().any(|stem| {
        let Some(rest) = name.strip_prefix(stem) else {
            return false;
        };
        let one_word = |word: &str| !word.is_empty() && !word.contains('.');
        let file = rest
            .strip_prefix('.')
            .and_then(|r| r.strip_suffix(".safetensors"));
        let index =
            (rest.strip_prefix(".safetensors.index.")).and_then(|r| r.strip_suffix(".json"));
        file.is_some_and(one_word) || index.is_some_and(one_word)
    })
}

/// `model.fp16-00001-of-00002.safetensors`.
fn is_shard(name: &str) -> bool {
    name.contains("-of-")
}

fn is_pickle(path: &Path) -> bool {
    ["bin", "pt", "pth", "ckpt", "pkl"].contains(&extension(path).as_str())
}

fn extension(path: &Path) -> String {
    let extension = path.extension().unwrap_or_default();
    extension.to_string_lossy().to_ascii_lowercase()
}

/// Names in a folder, sorted; none where it cannot be read.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().expect("it has one")).expect("created");
            fs::write(path, b"{}").expect("written");
        }
        folder
    }

    fn said(root: &Path) -> String {
        check_pipeline(root).expect_err("refused").to_string()
    }

    #[test]
    fn what_is_no_pipeline_folder_is_named() {
        let at = folder(&["flux.safetensors", "flux.gguf", "flux.ckpt"]);
        for (name, says) in [
            ("models/FLUX.1-dev", "a repository of the Hub as OWNER/NAME"),
            ("flux.safetensors", "this file as `model.transformer`"),
            ("flux.gguf", "GGUF"),
            ("flux.ckpt", "pickle"),
            ("", "holds GGUF files"),
        ] {
            let message = said(&at.path().join(name));
            assert!(message.contains(says), "{message}");
        }
        for (files, says) in [
            (
                &["config.json", "model.safetensors"][..],
                "the folder above it",
            ),
            (&["snapshots/abc/model_index.json"], "snapshots/abc`"),
            (&["flux.safetensors"], "the file as `model.transformer`"),
            (&["notes.txt"], "has no model_index.json"),
        ] {
            let message = said(folder(files).path());
            assert!(message.contains(says), "{message}");
        }
        let whole = folder(&["model_index.json"]);
        check_pipeline(whole.path()).expect("a pipeline folder");
    }

    #[test]
    fn the_only_variant_is_taken() {
        for (files, taken) in [
            (
                &["model.safetensors", "model.fp16.safetensors"][..],
                "model.safetensors",
            ),
            (
                &["model.fp16.safetensors", "config.json"],
                "model.fp16.safetensors",
            ),
            (
                &[
                    "diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
                    "diffusion_pytorch_model.bf16-00002-of-00002.safetensors",
                    "diffusion_pytorch_model.safetensors.index.bf16.json",
                ],
                "diffusion_pytorch_model.safetensors.index.bf16.json",
            ),
        ] {
            let at = folder(files);
            let found = component_file(at.path()).expect("found");
            assert_eq!(found, at.path().join(taken));
        }
    }

    #[test]
    fn weights_that_cannot_be_read_are_named() {
        for (files, says) in [
            (
                &["model.fp16.safetensors", "model.bf16.safetensors"][..],
                "several variants",
            ),
            (
                &["pytorch_model.bin"],
                "`pytorch_model.bin`, a Python pickle",
            ),
            (&["model-Q4_K.gguf"], "`model-Q4_K.gguf`, a GGUF file"),
            (&["config.json"], "has no weights file"),
        ] {
            let message = component_file(folder(files).path()).expect_err("refused");
            assert!(message.to_string().contains(says), "{message}");
        }
    }
}
