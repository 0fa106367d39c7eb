//! Which files of a repository a pipeline needs: configurations, tokenizers, and one form of each component's weights.

use std::collections::BTreeSet;

use anyhow::bail;

use super::api::{HubFile, Listing};

/// Weights in the forms that are read here, without variant.
const WEIGHTS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// Small files that say what the rest is.
const SMALL: [&str; 4] = ["json", "txt", "model", "jinja"];

/// Which files of a repository are not wanted, because single files stand in their place.
#[derive(Debug, Clone, Copy, Default)]
pub struct Replaced {
    /// The transformer's weights.
    pub transformer: bool,
    /// The autoencoder.
    pub vae: bool,
}

/// The files to download.
///
/// # Errors
/// A repository that is no pipeline, or has a component in no form that can be read.
pub(crate) fn needed(listing: &Listing, replaced: Replaced) -> anyhow::Result<Vec<HubFile>> {
    let safe = |file: &&HubFile| {
        let parts = || file.path.split('/');
        parts().all(|part| {
            !part.is_empty() && part != ".." && part != "." && !part.contains(['\\', ':', '\0'])
        })
    };
    let files: Vec<&HubFile> = listing.files.iter().filter(safe).collect();
    if !files.iter().any(|file| file.path == "model_index.json") {
        let single = files
            .iter()
            .find(|file| file.path.ends_with(".safetensors"));
        bail!(match single {
            Some(file) => format!(
                "it has no model_index.json, so it is no pipeline in diffusers' form; a single file such as `{}` goes to `model.transformer`, with a pipeline as `model.path`",
                file.path
            ),
            None => "it has no model_index.json, so it is no pipeline in diffusers' form".into(),
        });
    }
    let mut needed = vec!["model_index.json"];
    let folders: BTreeSet<&str> = files
        .iter()
        .filter_map(|file| Some(file.path.split_once('/')?.0))
        .collect();
    for folder in folders {
        let own: Vec<&str> = files
            .iter()
            .filter_map(|file| {
                Some((
                    file.path.as_str(),
                    file.path.strip_prefix(folder)?.strip_prefix('/')?,
                ))
            })
            .filter(|(_, name)| !name.contains('/'))
            .map(|(path, _)| path)
            .collect();
        let wanted = ["scheduler", "transformer", "vae"].contains(&folder)
            || folder.starts_with("text_encoder")
            || folder.starts_with("tokenizer");
        if !wanted || (folder == "vae" && replaced.vae) {
            continue;
        }
        let small = own.iter().filter(|path| {
            let extension = path.rsplit('.').next().unwrap_or_default();
            SMALL.contains(&extension) && !path.ends_with(".index.json") && !is_foreign(path)
        });
        needed.extend(small);
        let has_weights = !(folder.starts_with("tokenizer") || folder == "scheduler");
        if has_weights && !(folder == "transformer" && replaced.transformer) {
            needed.extend(weights(folder, &own)?);
        }
    }
    let found = files
        .iter()
        .filter(|file| needed.contains(&file.path.as_str()));
    Ok(found.map(|file| (*file).clone()).collect())
}

/// Configurations of other frameworks.
fn is_foreign(path: &str) -> bool {
    path.contains("flax") || path.contains("onnx") || path.contains("openvino")
}

/// The weights of a component: sharded or whole, without variant if there are such, else of the only variant.
fn weights<'a>(folder: &str, own: &[&'a str]) -> anyhow::Result<Vec<&'a str>> {
    let stems = WEIGHTS.map(|stem| format!("{folder}/{stem}"));
    for stem in &stems {
        let index = format!("{stem}.safetensors.index.json");
        if own.contains(&index.as_str()) {
            let is_shard = |path: &&&str| {
                let rest = path.strip_prefix(stem.as_str());
                **path == index
                    || rest
                        .is_some_and(|rest| rest.starts_with('-') && rest.ends_with(".safetensors"))
            };
            return Ok(own.iter().filter(is_shard).copied().collect());
        }
        let whole = format!("{stem}.safetensors");
        if let Some(path) = own.iter().find(|path| **path == whole) {
            return Ok(vec![*path]);
        }
    }
    let variants: Vec<&str> = own
        .iter()
        .copied()
        .filter(|path| {
            let of_variant = stems
                .iter()
                .any(|stem| path.starts_with(&format!("{stem}.")));
            of_variant && (path.ends_with(".safetensors") || path.contains(".safetensors.index."))
        })
        .collect();
    let names: BTreeSet<&str> = variants
        .iter()
        .filter_map(|path| {
            let rest = path.rsplit('/').next()?.split_once('.')?.1;
            rest.split('.')
                .find(|word| !["safetensors", "index", "json"].contains(word))
                .map(|word| word.split('-').next().unwrap_or(word))
        })
        .collect();
    match names.len() {
        1 => Ok(variants),
        0 => bail!("`{folder}` has no weights in safetensors form, and no other is read here"),
        _ => bail!(
            "`{folder}` has weights of several variants ({}) and none without: download the one you want by hand, and name the folder",
            names.into_iter().collect::<Vec<_>>().join(", ")
        ),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;

    fn listing(paths: &[&str]) -> Listing {
        let file = |path: &&str| HubFile {
            path: (*path).into(),
            size: Some(1),
            blob_id: None,
            lfs: None,
        };
        Listing {
            commit: "0".repeat(40),
            files: paths.iter().map(file).collect(),
        }
    }

    /// What `black-forest-labs/FLUX.1-dev` has, one of each sort.
    const DEV: [&str; 22] = [
        ".gitattributes",
        "LICENSE.md",
        "README.md",
        "ae.safetensors",
        "dev_grid.jpg",
        "flux1-dev.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_2/spiece.model",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00001.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    #[test]
    fn only_what_a_pipeline_is_read_from_is_downloaded() {
        let paths = |replaced| -> Vec<String> {
            needed(&listing(&DEV), replaced)
                .unwrap()
                .into_iter()
                .map(|file| file.path)
                .collect()
        };
        assert_eq!(paths(Replaced::default()), DEV[6..]);
        let all = Replaced {
            transformer: true,
            vae: true,
        };
        let mut less = DEV[6..18].to_vec();
        less.retain(|path| !path.contains("diffusion_pytorch"));
        assert_eq!(paths(all), less);
    }

    #[test]
    fn other_forms_of_the_same_weights_are_left_out() {
        let paths = [
            "model_index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "vae/flax_config.json",
            "../evil.json",
            "vae/../../evil.json",
        ];
        let found = needed(&listing(&paths), Replaced::default()).unwrap();
        let found: Vec<&str> = found.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(found, [paths[0], paths[1], paths[4]]);
        let only = [paths[0], paths[3]];
        assert_eq!(
            needed(&listing(&only), Replaced::default()).unwrap().len(),
            2
        );
        let error = needed(&listing(&[paths[0], paths[2]]), Replaced::default()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("`vae` has no weights in safetensors form"),
            "{error}"
        );
        let error = needed(&listing(&["lora.safetensors"]), Replaced::default()).unwrap_err();
        assert!(
            error.to_string().contains("no model_index.json")
                && error.to_string().contains("lora.safetensors"),
            "{error}"
        );
    }
}
